"""A stream of images through a bundle's engine and thresholds, in this process: what answers when nobody waits.

    with Cascade.open("bundles/photo10", target={"gmacs": 0.04}) as cascade:
        for name, answer in cascade.classify((path, path) for path in paths):
            ...  # an ImageResult, or a ServeError for an image that is none

Theory of operation
-------------------
The scheduler is the server's, one request an image, without deadlines. What differs is when a batch may go: nobody
waits, so it goes when it is full (`FullBatches`), and survivors gather over the whole stream. Smaller ones go where
nothing can come that would fill them: at the stream's end, or where its bounds let nothing more in.

- *Bounds.* `_live` images are being decoded, wait or run: as many as it takes to keep every thread at work while each
  later stage holds nearly a batch. `_window` images lie between the last that was taken in and the first that was not
  given out: in order, one that waits for its stage to fill holds up those behind it, and only so many. What a stream
  holds depends on neither its length nor on who takes the answers.
- *Threads.* Pools decode and run batches. Everything else is the generator's, so it runs while the caller asks for the
  next answer: batches are handed out one ahead, so that a thread finds one while the caller is at something else.
- *Answers* do not depend on how images meet in batches as long as the engine's do not: ONNX Runtime's on CPUs are
  bitwise the same, those of GPUs within rounding.
"""

from __future__ import annotations

import math
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from server.budget.controller import Solution, default_solution, solve
from server.bundle.manifest import EMBEDDED, Bundle, Preprocessing
from server.calibration.profiling import kept_profile
from server.cascade.scheduler import Batch, Outcome, Request, Scheduler, StageView
from server.core import Engine, ImageResult, OperatingPoint, Pixels, StageOutput
from server.documents import cause, read_file
from server.engines import load_engine
from server.errors import BadImage, EngineFailed, InvalidRequest, ServeError
from server.frontend import images
from server.frontend.images import ImageLimits
from server.settings import usable_cores

Image = str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8]
"""A file's path, a file's content, or pixels, (H, W, 3) RGB; these are resized and cropped unless they are of the
model's input size already."""

Key = TypeVar("Key")

MAX_SLOTS = 1024  # states that an engine on a GPU should hold: batches are large there, and later stages gather long
_AHEAD = 1  # batches that are ready before a thread is idle
_DECODES = 4  # images, for each thread that decodes, which it decodes or which are next: these are held as they came
_LEAST_WINDOW = 2048  # images
_MAX_IMAGE_BYTES = 256 * 2**20


class Cascade:
    """A bundle, its engine, and an operating point that stays. One stream at a time; not to be shared by threads."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        target: Mapping[str, Any] | None = None,
        *,
        decode_threads: int | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        """Takes over the engine, which is warm or will be by its first batches. `target` as `solve_target` takes it.
        Raises as that."""
        self.bundle = bundle
        self.engine = engine
        self.solution = solve_target(bundle, target)
        profile = kept_profile(bundle, engine, engine.executors)
        self.batch_sizes = engine.max_batch_sizes if profile is None else profile.sizes_that_pay()
        self.batches = [0] * engine.num_stages  # that have run, by stage
        self.rows = [0] * engine.num_stages  # images in them
        self._limits = limits or ImageLimits()
        self._decode_threads = decode_threads or usable_cores()
        self._decoders = ThreadPoolExecutor(self._decode_threads, thread_name_prefix="decode")
        self._executors = ThreadPoolExecutor(engine.executors, thread_name_prefix="executor")
        self._stream: _Stream[Any] | None = None  # that has begun and not ended

    @classmethod
    def open(
        cls,
        bundle: Path | str | None = None,
        *,
        engine: str = "auto",
        target: Mapping[str, Any] | None = None,
        decode_threads: int | None = None,
        engine_dir: Path | None = None,
    ) -> Cascade:
        """The bundle in this folder, by default the embedded one, on an engine as `dvt serve --engine` names it.
        `engine_dir`: where TensorRT's plans lie, by default in the bundle.

        Raises BundleError, EngineUnavailable, and as `solve_target`.
        """
        loaded = Bundle.load(EMBEDDED if bundle is None else Path(bundle))
        solve_target(loaded, target)  # before the engine, which takes its time
        running = load_engine(loaded, engine=engine, max_slots=MAX_SLOTS, engine_dir=engine_dir)
        running.warm_up()
        return cls(loaded, running, target, decode_threads=decode_threads)

    @property
    def point(self) -> OperatingPoint:
        return OperatingPoint(1, self.solution.setting.thresholds)

    def classify(
        self, images: Iterable[tuple[Key, Image]], *, in_order: bool = True
    ) -> Generator[tuple[Key, ImageResult | ServeError], None, None]:
        """Every image's key with its answer, or with what is wrong with the image: in the order of the images, or
        else as they come, which is sooner, and holds less.

        Images are taken from the iterable as there is room for them. What the iterable raises is raised, so is
        EngineFailed, where the engine fails on a batch; who stops early should `close` the generator.
        """
        if self._stream is not None:
            raise RuntimeError("one stream at a time")
        self._stream = stream = _Stream(self, iter(images), in_order)
        try:
            yield from stream.run()
        finally:
            stream.close()
            self._stream = None

    def close(self) -> None:
        """End the stream, the threads and the engine. May be called twice."""
        if self._stream is not None:  # as where what is done with its answers has failed
            self._stream.close()
        self._decoders.shutdown(cancel_futures=True)
        self._executors.shutdown(cancel_futures=True)
        self.engine.close()

    def __enter__(self) -> Cascade:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def solve_target(bundle: Bundle, target: Mapping[str, Any] | None) -> Solution:
    """The operating point for a target as PUT /budget takes it, without hold, mix and latencies: thresholds stay, so
    that an image's answer does not depend on the others. None: what a server starts with.

    Raises InvalidRequest, BudgetInfeasible.
    """
    if target is None:
        return default_solution(bundle.frontier)
    if "latency_ms" in target:
        raise InvalidRequest("latency_ms is a target for a server; without one, give gmacs, accuracy or thresholds")
    return solve(bundle.frontier, target, "quality")


def to_pixels(image: Image, how: Preprocessing, limits: ImageLimits) -> Pixels:
    """As the server would see the image. Raises BadImage and what else `images.decode` raises."""
    if isinstance(image, np.ndarray):
        return images.fit(image, how)
    if isinstance(image, bytes):
        return images.decode(image, None, how, limits)
    if isinstance(image, str | os.PathLike):
        try:
            content = read_file(Path(image), _MAX_IMAGE_BYTES)
        except (OSError, ValueError) as error:
            raise BadImage(f"The file cannot be read: {cause(error)}", reason=cause(error)) from None
        return images.decode(content, None, how, limits)
    reason = f"a {type(image).__name__} is no image"
    raise BadImage(f"The image cannot be decoded: {reason}", reason=reason)


class FullBatches:
    """A scheduler's policy: the deepest stage that fills a batch; a smaller one only where nothing can come to it."""

    def __init__(self, sizes: Sequence[int], running: Sequence[int], coming: Callable[[], bool]) -> None:
        """`running`: images that run, by stage, kept up to date by its owner. `coming`: whether new images are on
        their way to the first stage."""
        self._sizes = tuple(sizes)
        self._running = running
        self._coming = coming

    def __call__(self, views: Sequence[StageView], now: float) -> int | None:  # noqa: ARG002
        for stage in range(len(views), 0, -1):
            if views[stage - 1].ready >= self._sizes[stage - 1]:
                return stage
        if self._coming():
            return None
        for stage, (view, running) in enumerate(zip(views, self._running, strict=True), start=1):
            if view.ready:
                return stage
            # Survivors of these may fill the batches of later stages. Where images wait for states to become free,
            # nothing but a later stage frees one.
            if running or (view.waiting and any(self._running)):
                return None
        return None


_Event = tuple[Batch, StageOutput | BaseException] | tuple[int, Pixels | BaseException]
"""What a thread hands back: a batch and what the engine said, or an image's number and its pixels."""


class _Stream(Generic[Key]):
    """One run over one iterable. All but `_decode` and `_execute` happens in the caller's thread."""

    def __init__(self, cascade: Cascade, source: Iterator[tuple[Key, Image]], in_order: bool) -> None:
        engine = cascade.engine
        self._cascade = cascade
        self._engine = engine
        self._source = source
        self._in_order = in_order
        sizes = cascade.batch_sizes
        batches = engine.executors + _AHEAD
        slots = batches * max(sizes) + sum(sizes[1:])
        self._most_decoding = _DECODES * cascade._decode_threads
        self._live = slots + batches * sizes[0] + self._most_decoding
        self._window = max(_LEAST_WINDOW, 4 * self._live)
        self._running = [0] * engine.num_stages
        self._scheduler = Scheduler(
            cascade.point,
            max_batch_sizes=sizes,
            max_queued_images=self._live,
            max_slots=min(slots, engine.max_slots or slots),
            policy=FullBatches(sizes, self._running, self._coming),
            executors=batches,
        )
        self._most_out = batches
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()  # bounded by `_live`
        self._flying: set[Future[None]] = set()  # what the threads have not handed back
        self._ended = False  # the source
        self._stopped = False
        self._pulled = self._given = self._out = self._decoding = 0
        self._numbers: dict[Request, int] = {}
        self._keys: dict[int, Key] = {}  # of images without an answer, by number
        self._held: dict[int, tuple[Key, ImageResult | ServeError]] = {}  # until those before them have theirs
        self._next = 0  # the number that is to be given out next, in order
        self._ready: deque[tuple[Key, ImageResult | ServeError]] = deque()

    def run(self) -> Iterator[tuple[Key, ImageResult | ServeError]]:
        while True:
            if self._stopped:
                raise RuntimeError("the cascade is closed")
            while not self._events.empty():
                self._take_in(self._events.get())
            pulled = self._has_room() and self._pull()
            self._hand_out()
            if self._ready:
                self._given += 1
                yield self._ready.popleft()
            elif pulled:
                continue
            elif self._decoding or self._out:
                self._take_in(self._events.get())
            elif not self._has_room():
                return

    def close(self) -> None:
        """Wait for what runs, and leave no state in the engine. May be called twice.

        Ctrl-C can come between any two instructions of `run`, so what is counted there may be off by one here: who
        waits for a thread asks the thread. The state of a batch that was being taken in right then is left to the
        engine's end."""
        self._stopped = True
        self._free(self._scheduler.stop(time.monotonic()))
        wait(list(self._flying))
        while not self._events.empty():
            about, result = self._events.get()
            if not isinstance(about, int):
                self._free(self._came_back(about, result))

    def _has_room(self) -> bool:
        """Whether the source is to be asked for one more."""
        return (
            not self._ended
            and self._decoding < self._most_decoding
            and len(self._keys) < self._live
            and self._pulled - self._given < self._window
        )

    def _coming(self) -> bool:
        return self._decoding > 0 or self._has_room()

    def _pull(self) -> bool:
        """One more image, to be decoded. False at the end of the source."""
        try:
            key, image = next(self._source)
        except StopIteration:
            self._ended = True
            return False
        number, self._pulled = self._pulled, self._pulled + 1
        self._keys[number] = key
        if isinstance(image, np.ndarray):
            image = image.copy()  # its owner may use the memory again, for the next
        elif isinstance(image, bytearray | memoryview):
            image = bytes(image)
        self._fly(self._cascade._decoders, self._decode, number, image)
        self._decoding += 1
        return True

    def _hand_out(self) -> None:
        while self._out < self._most_out and (batch := self._scheduler.schedule(time.monotonic())) is not None:
            self._out += 1
            self._running[batch.run.stage - 1] += len(batch.images)
            self._fly(self._cascade._executors, self._execute, batch)

    def _fly(self, pool: ThreadPoolExecutor, work: Callable[..., None], *arguments: object) -> None:
        future = pool.submit(work, *arguments)
        self._flying.add(future)
        future.add_done_callback(self._flying.discard)

    def _take_in(self, event: _Event) -> None:
        about, result = event
        if isinstance(about, int):
            self._decoding -= 1
            if isinstance(result, ServeError):
                self._finish(about, result)
            elif isinstance(result, BaseException):
                raise result
            else:
                assert isinstance(result, np.ndarray)
                request, _ = self._scheduler.admit([result], time.monotonic(), deadline=math.inf)
                self._numbers[request] = about
            return
        outcome = self._came_back(about, result)
        self._free(outcome)
        if isinstance(result, BaseException):
            raise EngineFailed(f"the engine failed at stage {about.run.stage}: {result}") from result
        for request in outcome.settled:
            answer = request.answer.results[0] if request.answer is not None else request.error
            assert answer is not None, "nobody cancels, and there are no deadlines"
            self._finish(self._numbers.pop(request), answer)

    def _came_back(self, batch: Batch, result: object) -> Outcome:
        stage, size, now = batch.run.stage, len(batch.images), time.monotonic()
        self._out -= 1
        self._running[stage - 1] -= size
        self._cascade.batches[stage - 1] += 1
        self._cascade.rows[stage - 1] += size
        if isinstance(result, StageOutput):
            return self._scheduler.update(batch, result, now)
        return self._scheduler.fail(batch, now)

    def _free(self, outcome: Outcome) -> None:
        if outcome.freed:
            self._engine.free(outcome.freed)

    def _finish(self, number: int, answer: ImageResult | ServeError) -> None:
        found = self._keys.pop(number), answer
        if not self._in_order:
            self._ready.append(found)
            return
        self._held[number] = found
        while self._next in self._held:
            self._ready.append(self._held.pop(self._next))
            self._next += 1

    # -- in the pools' threads

    def _decode(self, number: int, image: Image) -> None:
        result: Pixels | BaseException
        try:
            if self._stopped:
                raise InterruptedError
            result = to_pixels(image, self._cascade.bundle.preprocessing, self._cascade._limits)
        except BaseException as error:  # whatever it was, the stream must hear of it, or it waits for ever
            result = error
        self._events.put((number, result))

    def _execute(self, batch: Batch) -> None:
        result: StageOutput | BaseException
        try:
            result = self._engine.run(batch.run)
        except BaseException as error:
            result = error
        self._events.put((batch, result))
