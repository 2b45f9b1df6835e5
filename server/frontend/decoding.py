"""The threads that decode images, with a bounded line before them.

A pool of our own in place of `concurrent.futures`: work that nobody waits for any more is skipped, work that is late is
not begun, and an image costs one hand-over and one call back.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

from server.bundle.manifest import Preprocessing
from server.core import Pixels
from server.errors import BadImage, DeadlineExceeded, ImageTooLarge, Overloaded, UnsupportedMediaType
from server.frontend import images
from server.frontend.bodies import EncodedImage

RUN_S = 30.0  # for what is run here without a deadline of its own

P = ParamSpec("P")
R = TypeVar("R")

_Line = queue.SimpleQueue[Callable[[bool], None] | None]  # told whether this is the line of large images
_Refusal = BadImage | ImageTooLarge | UnsupportedMediaType | DeadlineExceeded


class Decoder:
    """Owns the decoding threads and the count of images that wait for them. Full means refused."""

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
        self._pending = 0  # images that wait or are being decoded
        self._began: dict[str, float] = {}  # when a thread, by name, began what it is at
        self._line: _Line = queue.SimpleQueue()  # bounded by `_pending`
        # Large images take turns, to bound memory. They do it in a thread of their own, so that none of the others
        # waits with them.
        self._large: _Line = queue.SimpleQueue()
        lines = {f"decode-{number}": self._line for number in range(1, threads + 1)} | {"decode-large": self._large}
        self._threads = {
            threading.Thread(target=self._serve, args=(name, line), name=name, daemon=True): line
            for name, line in lines.items()
        }

    @property
    def out(self) -> dict[str, float]:
        """When each thread that is at something began it, by the thread's name."""
        return self._began.copy()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    async def decode(self, encoded: Sequence[EncodedImage], deadline: float) -> list[Pixels]:
        """All images of one request, in order. Cancelling gives up those that no thread has begun.

        Raises Overloaded, DeadlineExceeded, or what `images.decode` raises with `index` added: that of the first bad
        image.
        """
        count = len(encoded)
        if self._pending + count > self._most:
            raise Overloaded("Too many images wait to be decoded", retry_after_s=1)
        self._pending += count
        try:
            async with _within(deadline - self._clock()):
                outcomes = [
                    self._put(partial(self._decode, index, data, media_type, deadline))
                    for index, (data, media_type) in enumerate(encoded)
                ]
                decoded = [await outcomes[0]] if count == 1 else await asyncio.gather(*outcomes)
        finally:
            self._pending -= count
        pixels = []
        for outcome in decoded:
            if isinstance(outcome, Exception):
                raise outcome
            pixels.append(outcome)
        return pixels

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run something that would block in one of the threads. Cancelling skips what was not begun.

        Raises what it raises, and DeadlineExceeded.
        """
        async with _within(RUN_S):
            return await self._put(lambda _: function(*args, **kwargs))

    def _put(self, call: Callable[[bool], R]) -> asyncio.Future[R]:
        """`call` is told whether it may wait for the turn of a large image."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def work(in_turn: bool) -> None:
            if future.cancelled():
                return
            try:
                result = call(in_turn)
            except images.NeedsTurnError:
                self._large.put(work)
            except Exception as error:
                _tell(loop, future, future.set_exception, error)
            else:
                _tell(loop, future, future.set_result, result)

        self._line.put(work)
        return future

    async def close(self) -> None:
        """End the threads, after what is in the line. May be called twice."""
        for line in self._threads.values():
            line.put(None)
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:  # started
                thread.join()

    def _serve(self, name: str, line: _Line) -> None:
        while (work := line.get()) is not None:
            self._began[name] = self._clock()
            work(line is self._large)
            del self._began[name], work  # an idle thread must not keep an image alive

    def _decode(
        self, index: int, data: bytes, media_type: str | None, deadline: float, in_turn: bool
    ) -> Pixels | _Refusal:
        """In a thread. Hands the error back, so that the first bad image of a request is named, not the fastest."""
        if self._clock() >= deadline:
            return DeadlineExceeded("The deadline passed before the images were decoded")
        try:
            return images.decode(
                data,
                media_type,
                self._preprocessing,
                self._limits,
                wait_for_turn=in_turn,
            )
        except (BadImage, ImageTooLarge, UnsupportedMediaType) as error:
            error.extra["index"] = index
            return error


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """Also where a thread hangs, nobody waits for it for ever."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded("The deadline passed before the images were decoded") from None


def _tell(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[R], settle: Callable[[Any], None], outcome: Any
) -> None:
    def finish() -> None:
        if not future.done():  # cancelled meanwhile
            settle(outcome)

    loop.call_soon_threadsafe(finish)
