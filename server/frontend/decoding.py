"""The threads that decode images, with a bounded line before them. A single small image is decoded without them.

A pool of our own in place of `concurrent.futures`: work that nobody waits for any more is skipped, work that is late is
not begun, and an image costs one hand-over and one call back.

A thread cannot be stopped. Where a deadline passes, or a client leaves, while an image is being decoded, the thread
finishes it for nobody, and counts as taken until it has: so nobody gets more out of the threads by waiting less.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
from collections.abc import Callable, Sequence

from server.bundle.manifest import Preprocessing
from server.cascade.scheduler import BACKGROUND, HIGH, LOW, NORMAL, Priority
from server.core import Pixels
from server.errors import DeadlineExceeded, Overloaded, ServeError
from server.frontend import images

_ROOM = {HIGH: 2.0, NORMAL: 1.0, LOW: 0.5, BACKGROUND: 0.5}  # of the line


class _Request:
    """What the images of one call of `decode` have in common."""

    __slots__ = ("deadline", "done", "left", "loop", "outcomes")

    def __init__(self, images: int, deadline: float) -> None:
        self.loop = asyncio.get_running_loop()
        # With its images, or at the deadline without. Errors are not put into it: their tracebacks would keep the
        # request alive for as long as a thread is busy with it.
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.deadline = deadline
        self.left = images
        self.outcomes: list[Pixels | Exception | None] = [None] * images

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class _Image:
    """One image in a line. It belongs to whoever pops its file: a thread, or the loop that gives it up."""

    __slots__ = ("file", "index", "request")

    def __init__(self, request: _Request, index: int, file: images.EncodedImage) -> None:
        self.request: _Request | None = request  # none for one that was given up
        self.index = index
        self.file = [file]


_Line = queue.SimpleQueue[_Image | None]


class Decoder:
    """Owns the decoding threads and the count of images that wait for them or keep them busy. Full means refused."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        limits: images.ImageLimits,
        threads: int,
        max_waiting: int,
        clock: Callable[[], float],
    ) -> None:
        self._preprocessing = preprocessing
        self._limits = limits
        self._clock = clock
        self._most = threads + max_waiting
        self._pending = 0  # images that wait or are being decoded, whether or not somebody waits for them
        self._began: dict[str, float] = {}  # when a thread, by name, began what it is at
        self._given_up = 0  # images that may lie in a line with nothing to do, at most
        self._line: _Line = queue.SimpleQueue()  # bounded by `_pending` and `_given_up`
        # Large images take turns, to bound memory. They do it in a thread of their own, so that none of the others
        # waits with them.
        self._large: _Line = queue.SimpleQueue()
        lines = {f"decode-{number}": self._line for number in range(1, threads + 1)} | {"decode-large": self._large}
        self._threads = {
            threading.Thread(target=self._serve, args=(name, line), name=name, daemon=True): line
            for name, line in lines.items()
        }

    @property
    def pending(self) -> int:
        """Images that wait for a thread or occupy one."""
        return self._pending

    @property
    def out(self) -> dict[str, float]:
        """When each thread that is at something began it, by the thread's name."""
        return self._began.copy()

    @property
    def oldest(self) -> float:
        """When the thread that has been at something for the longest began it; inf where all are idle."""
        return min(self._began.copy().values(), default=math.inf) if self._began else math.inf

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    async def decode(
        self, encoded: Sequence[images.EncodedImage], deadline: float, priority: Priority = NORMAL
    ) -> list[Pixels]:
        """All images of one request, in order. Cancelling gives up those that no thread has begun.

        The line is first come, first served, but a flood of lower priority cannot fill it for a higher one.

        Raises Overloaded, DeadlineExceeded at the deadline, or what `images.decode` raises with `index` added: that of
        the first bad image.
        """
        count = len(encoded)
        if count == 1 and (quick := self._at_once(encoded[0], deadline)) is not None:
            return [quick]
        if self._pending + count > self._most * _ROOM[priority]:
            raise Overloaded("Too many images wait to be decoded", retry_after_s=1)
        seconds = deadline - self._clock()
        if seconds <= 0:
            raise _late()
        request = _Request(count, deadline)
        waiting = [_Image(request, index, file) for index, file in enumerate(encoded)]
        self._pending += count
        for image in waiting:
            self._line.put(image)
        timer = request.loop.call_later(seconds, request.finish)
        try:
            await request.done
        finally:
            timer.cancel()
            if request.left:
                self._give_up(waiting)
        pixels = []
        for outcome in request.outcomes:
            if outcome is None:
                raise _late()
            if isinstance(outcome, Exception):
                raise outcome
            pixels.append(outcome)
        return pixels

    async def close(self) -> None:
        """End the threads, after what is in the line. May be called twice."""
        await asyncio.to_thread(self._join)

    # In the event loop

    def _at_once(self, file: images.EncodedImage, deadline: float) -> Pixels | None:
        """An image that takes less time than to hand it over. None for any other. Raises as `decode` does."""
        try:
            pixels = images.decode(*file, self._preprocessing, self._limits, only_quick=True)
        except images.NeedsThreadError:
            return None
        except ServeError as error:
            error.extra["index"] = 0
            raise
        if self._clock() >= deadline:
            raise _late()
        return pixels

    def _give_up(self, waiting: list[_Image]) -> None:
        for image in waiting:
            try:
                image.file.pop()
            except IndexError:
                continue  # a thread has it, or had it, and tells
            image.request = None
            self._pending -= 1
            self._given_up += 1
        if self._given_up > self._most:
            self._given_up = 0
            for line in (self._line, self._large):
                _sweep(line)

    def _ended(self, request: _Request, index: int, outcome: Pixels | Exception | None) -> None:
        self._pending -= 1
        request.outcomes[index] = outcome
        request.left -= 1
        if not request.left:
            request.finish()

    # In the threads

    def _serve(self, name: str, line: _Line) -> None:
        while (image := line.get()) is not None:
            self._take(name, image, line is self._large)
            self._began.pop(name, None)
            del image  # an idle thread must not keep an image alive

    def _take(self, name: str, image: _Image, in_turn: bool) -> None:
        try:
            file = image.file.pop()
        except IndexError:
            return  # given up
        self._began[name] = self._clock()
        request = image.request
        assert request is not None
        try:
            outcome = self._decode(request, image.index, file, in_turn)
        except images.NeedsTurnError:
            image.file.append(file)
            if not request.done.done():
                self._large.put(image)
                return
            try:  # it may have been given up, in vain, before the file was back
                image.file.pop()
            except IndexError:
                return
            outcome = None
        request.loop.call_soon_threadsafe(self._ended, request, image.index, outcome)

    def _decode(
        self, request: _Request, index: int, file: images.EncodedImage, in_turn: bool
    ) -> Pixels | Exception | None:
        """None where it is too late. Hands an error back, so that the first bad image of a request is named, not the
        fastest."""
        if request.done.done() or self._clock() >= request.deadline:
            return None
        try:
            return images.decode(*file, self._preprocessing, self._limits, wait_for_turn=in_turn)
        except images.NeedsTurnError:
            raise
        except Exception as error:
            if isinstance(error, ServeError):
                error.extra["index"] = index
            return error

    def _join(self) -> None:
        for line in (self._line, self._large):  # in this order: the threads of the first feed the second
            threads = [thread for thread, served in self._threads.items() if served is line]
            for _ in threads:
                line.put(None)
            for thread in threads:
                if thread.ident is not None:  # started
                    thread.join()


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("The deadline passed before the images were decoded")


def _sweep(line: _Line) -> None:
    """Take out the images that were given up; the others keep their order."""
    kept = []
    try:
        while True:
            image = line.get_nowait()
            if image is None or image.file:
                kept.append(image)
    except queue.Empty:
        pass
    for image in kept:
        line.put(image)
