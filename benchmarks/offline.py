"""The engine without a server: what every exit says of every image, thresholds for a mix of exits, the raw loop.

The engine is bitwise equal at every batch size, so what is known here is exactly what the server must answer.

Legend: N images, E exits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from server.bundle.frontier import NEVER
from server.bundle.manifest import Bundle
from server.calibration.every_stage import every_stage
from server.core import Engine, Floats, Pixels, Slot, StageBatch
from server.engines import load_engine
from server.frontend.images import ImageLimits, decode


@dataclass(frozen=True)
class Known:
    """Images, and the confidence of every exit in each of them."""

    pixels: tuple[Pixels, ...]
    confidence: Floats  # (E, N)

    def exit_at(self, image: int, thresholds: Sequence[float]) -> int:
        """Where this image leaves, from 1: the first exit whose confidence is at least the threshold."""
        for exit_, (confidence, threshold) in enumerate(zip(self.confidence[:, image], thresholds, strict=True), 1):
            if float(confidence) >= threshold:
                return exit_
        raise ValueError(f"the last threshold is not 0: {thresholds}")

    def mix(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        """The fraction of the images that leaves at each exit."""
        exits = [self.exit_at(image, thresholds) for image in range(len(self.pixels))]
        return tuple(exits.count(exit_) / len(exits) for exit_ in range(1, len(thresholds) + 1))


def decoded(bundle: Bundle, files: Sequence[bytes]) -> tuple[Pixels, ...]:
    return tuple(decode(file, None, bundle.preprocessing, ImageLimits()) for file in files)


def know(bundle: Bundle, engine: Engine, files: Sequence[bytes]) -> Known:
    """Run every image through every stage."""
    pixels = decoded(bundle, files)
    size = min(engine.max_batch_sizes)
    parts = [
        np.stack([output.confidence for output in every_stage(engine, pixels[start : start + size])])
        for start in range(0, len(pixels), size)
    ]
    return Known(pixels, np.concatenate(parts, axis=1))


def know_bundle(bundle: Bundle, files: Sequence[bytes]) -> Known:
    """`know`, with an engine of its own that is closed again."""
    engine = load_engine(bundle)
    try:
        return know(bundle, engine, files)
    finally:
        engine.close()


def thresholds_for(confidence: Floats, mix: Sequence[float]) -> tuple[float, ...]:
    """Thresholds at which the fractions `mix` of these images leave, as near as whole images and ties allow.

    confidence (at least E-1, N): the last exit's does not matter.
    """
    images = confidence.shape[1]
    inside = np.ones(images, dtype=bool)
    thresholds = []
    for row, leaves in zip(confidence, np.cumsum(mix[:-1]), strict=False):
        quota = round(leaves * images) - int(images - inside.sum())  # of this exit, whatever rounding did before
        ranked = np.sort(row[inside])[::-1]
        threshold = float(ranked[quota - 1]) if 0 < quota <= len(ranked) else NEVER
        thresholds.append(threshold)
        inside &= row < np.float32(threshold)
    return (*thresholds, 0.0)


@dataclass(frozen=True)
class RawRun:
    """What the loop did. `batches` and `rows` per stage."""

    images: int
    seconds: float
    exits: tuple[int, ...]
    batches: tuple[int, ...]
    rows: tuple[int, ...]


class RawLoop:
    """The most that an engine can give: threads that take full batches, the deepest first, with no request behind them.

    All images are there from the start, so every batch is as large as the engine wants it, but for the last few of a
    run. One run at a time.
    """

    def __init__(self, engine: Engine, pixels: Sequence[Pixels], thresholds: Sequence[float], threads: int) -> None:
        self._engine = engine
        self._pixels = pixels
        self._thresholds = thresholds
        self._threads = threads
        self._change = threading.Condition()

    def run(self, seconds: float) -> RawRun:
        """Images in turn, again and again, for so long; then what is still inside goes through."""
        stages = self._engine.num_stages
        self._waiting: list[list[tuple[int, Slot]]] = [[] for _ in range(stages)]  # survivors, per stage
        self._next = self._running = 0
        self._exits, self._batches, self._rows = [0] * stages, [0] * stages, [0] * stages
        self._failure: BaseException | None = None
        began = time.monotonic()
        self._until = began + seconds
        threads = [threading.Thread(target=self._execute, name=f"raw-{n}") for n in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        spent = time.monotonic() - began
        return RawRun(sum(self._exits), spent, tuple(self._exits), tuple(self._batches), tuple(self._rows))

    def _execute(self) -> None:
        while (batch := self._take()) is not None:
            images, run = batch
            try:
                output = self._engine.run(run)
            except BaseException as error:
                with self._change:
                    self._failure = error
                    self._change.notify_all()
                return
            with self._change:
                self._running -= 1
                self._batches[run.stage - 1] += 1
                self._rows[run.stage - 1] += len(images)
                for image, slot in zip(images, output.slots, strict=True):
                    if slot is None:
                        self._exits[run.stage - 1] += 1
                    else:
                        self._waiting[run.stage].append((image, slot))
                self._change.notify_all()

    def _take(self) -> tuple[list[int], StageBatch] | None:
        """The next batch; None once nothing is left."""
        with self._change:
            while self._failure is None:
                if batch := self._choose():
                    self._running += 1
                    return batch
                if not self._running:
                    return None
                self._change.wait()
            return None

    def _choose(self) -> tuple[list[int], StageBatch] | None:
        over = time.monotonic() >= self._until
        for stage in range(self._engine.num_stages, 1, -1):
            size = self._engine.max_batch_sizes[stage - 1]
            waiting = self._waiting[stage - 1]
            # Once no new image comes, a batch may be smaller, as soon as nothing runs that could still fill it.
            if len(waiting) >= size or (over and waiting and not self._running):
                taken, self._waiting[stage - 1] = waiting[:size], waiting[size:]
                return self._batch(stage, [image for image, _ in taken], [slot for _, slot in taken])
        if over:
            return None
        images = [(self._next + n) % len(self._pixels) for n in range(self._engine.max_batch_sizes[0])]
        self._next += len(images)
        return self._batch(1, images, [])

    def _batch(self, stage: int, images: list[int], slots: list[Slot]) -> tuple[list[int], StageBatch]:
        pixels = [self._pixels[image] for image in images]
        return images, StageBatch(stage, pixels, slots, [self._thresholds[stage - 1]] * len(images))


class RawProcess:
    """A RawLoop in a process of its own, which sleeps on a pipe between runs."""

    def __init__(self, bundle: Path, files: Sequence[bytes], thresholds: Sequence[float], threads: int) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, bundle, tuple(files), tuple(thresholds), threads)
        self._process = context.Process(target=_serve_runs, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # warmed up; EOFError where it died

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def run(self, seconds: float) -> RawRun:
        self._pipe.send(seconds)
        run: RawRun = self._pipe.recv()
        return run

    def __enter__(self) -> RawProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # its recv ends, and with it the process
        self._process.join(10)
        self._process.kill()


def _serve_runs(
    pipe: Connection, path: Path, files: Sequence[bytes], thresholds: Sequence[float], threads: int
) -> None:
    bundle = Bundle.load(path)
    engine = load_engine(bundle)
    engine.warm_up()
    loop = RawLoop(engine, decoded(bundle, files), thresholds, threads)
    pipe.send("ready")
    while True:
        try:
            seconds = pipe.recv()
        except EOFError:
            return
        pipe.send(loop.run(seconds))
