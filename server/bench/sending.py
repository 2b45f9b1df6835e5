"""One sender: every request at its moment, whatever became of those before it.

A latency counts from the moment that the schedule set, so a server that stalls is charged with all who came meanwhile;
a client that waits for its answer before it asks again would come less often, and hide them ("coordinated omission").
What the driver itself was late is in the latency, and in the log beside it.

The client is aiohttp: a connection is kept where there is one, and opened where all are busy.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import numpy as np
import orjson

from server.bench.orders import IMAGE, Body, Client, Log, Order, Outcome

_IDLE_S = 10.0  # shorter than any server keeps an idle connection: none is to be closed just as it is used again
_PIECES = 10  # in which a slow client sends
_HURRY_S = 2.0  # for what is under way when the load is stopped
_MOST_EXITS, _LONGEST_ERROR = 64, 80  # that a server of whatever kind may tell of
_YIELD_EVERY = 16  # requests that are late: answers must be read all the same

Stopping = Callable[[Callable[[], None]], None]


async def send(order: Order, bodies: Sequence[Body], on_stop: Stopping) -> Log:
    """Carry out an order; returns once all are answered, have given up, or were stopped and had a last moment.

    `on_stop` is handed what stops the load before its time.
    """
    sender = _Sender(order, bodies)
    cpu = time.process_time()
    # A cookie or a redirect is no part of what is measured, and a proxy of the environment has no business here.
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
        timeout=aiohttp.ClientTimeout(),
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        await sender.run(session, on_stop)
    return sender.log(time.process_time() - cpu)


class _Sender:
    def __init__(self, order: Order, bodies: Sequence[Body]) -> None:
        self._order = order
        self._bodies = bodies
        self._headers = [{"content-type": body.content_type} for body in bodies]
        self._due, self._late, self._took = array("d"), array("d"), array("d")
        self._outcome, self._kind, self._body, self._error = array("q"), array("q"), array("q"), array("q")
        self._errors: dict[str, int] = {}
        self._images = array("d")
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, session: aiohttp.ClientSession, on_stop: Stopping) -> None:
        self._session = session
        patience = self._order.manners.give_up_s + self._order.manners.dawdle_s
        load = asyncio.create_task(self._closed() if self._order.clients else self._open())

        def stop() -> None:
            nonlocal patience
            patience = _HURRY_S
            load.cancel()

        on_stop(stop)
        with suppress(asyncio.CancelledError):
            await load
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=patience)
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left)

    async def _open(self) -> None:
        order = self._order
        alarm = Alarm()
        try:
            for number, (moment, which, kind) in enumerate(
                zip(order.times.tolist(), order.which.tolist(), order.kinds.tolist(), strict=True)
            ):
                wait = order.start + moment - time.monotonic()
                if wait > 0:
                    await alarm.sleep(wait)
                elif number % _YIELD_EVERY == 0:
                    await asyncio.sleep(0)
                self._spawn(self._ask(moment, which, kind))
        finally:
            alarm.close()

    async def _closed(self) -> None:
        await asyncio.sleep(max(0.0, self._order.start - time.monotonic()))
        for client in range(self._order.clients):
            self._spawn(self._again_and_again(client))
        await asyncio.sleep(self._until - time.monotonic())

    async def _again_and_again(self, client: int) -> None:
        at = client
        which, kinds = self._order.which.tolist(), self._order.kinds.tolist()
        while (now := time.monotonic()) < self._until:
            await self._ask(now - self._order.start, which[at % len(which)], kinds[at % len(which)])
            if self._outcome[-1] != Outcome.ANSWERED:  # refused at once: not to be asked as fast as can be
                await asyncio.sleep(0.001)
            at += self._order.clients

    @property
    def _until(self) -> float:
        return self._order.start + float(self._order.times[-1])

    def _spawn(self, asking: Awaitable[None]) -> None:
        task = asyncio.ensure_future(asking)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, due: float, which: int, kind: int) -> None:
        began = self._order.start + due
        number = len(self._due)
        self._due.append(due)
        self._late.append(time.monotonic() - began)
        self._took.append(float("nan"))
        self._outcome.append(Outcome.UNANSWERED)
        self._kind.append(kind)
        self._body.append(which)
        self._error.append(-1)
        body, headers = self._bodies[which], self._headers[which]
        manners = self._order.manners
        data: Any = body.content
        if kind == Client.SLOW:
            data = _in_pieces(body.content, manners.dawdle_s)
            headers = {**headers, "content-length": str(len(body.content))}
        patience = began + manners.patience_s - time.monotonic() if kind == Client.LEAVING else manners.give_up_s
        try:
            async with (
                asyncio.timeout(max(0.0, patience)),
                self._session.post(self._order.url, data=data, headers=headers, allow_redirects=False) as response,
            ):
                content = await response.read()
        except TimeoutError:
            if kind == Client.LEAVING:
                self._outcome[number] = Outcome.LEFT
            else:
                self._fail(number, "no answer", Outcome.UNANSWERED)
        except (aiohttp.ClientError, OSError) as error:
            self._fail(number, _cause(error))
        else:
            self._took[number] = time.monotonic() - began
            self._answered(number, response.status, content, body, kind)

    def _answered(self, number: int, status: int, content: bytes, body: Body, kind: int) -> None:
        try:
            answer = orjson.loads(content)
            if status == 200:
                rows = [
                    _row(number, result, label) for result, label in zip(answer["results"], body.labels, strict=True)
                ]
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            answer = rows = None
        if status == 200 and rows is not None:
            self._outcome[number] = Outcome.ANSWERED
            for row in rows:
                self._images.extend(row)
            return
        code = str(answer["code"]) if isinstance(answer, dict) and "code" in answer else f"status {status}"
        if status == 503:
            self._fail(number, code, Outcome.REFUSED)
        elif status == 504:
            self._fail(number, code, Outcome.EXPIRED)
        elif status == 400 and kind == Client.SPOILT:
            self._fail(number, code, Outcome.REJECTED)
        else:
            self._fail(number, "not an answer of /classify" if status == 200 else code)

    def _fail(self, number: int, error: str, outcome: Outcome = Outcome.FAILED) -> None:
        self._outcome[number] = outcome
        self._error[number] = self._errors.setdefault(error[:_LONGEST_ERROR], len(self._errors))

    def log(self, cpu_s: float) -> Log:
        return Log(
            due=np.array(self._due),
            late=np.array(self._late),
            took=np.array(self._took),
            outcome=np.array(self._outcome, dtype=np.int64),
            kind=np.array(self._kind, dtype=np.int64),
            body=np.array(self._body, dtype=np.int64),
            error=np.array(self._error, dtype=np.int64),
            errors=tuple(self._errors),
            images=np.array(self._images).reshape(-1, len(IMAGE)),
            planned=len(self._due) if self._order.clients else len(self._order.times),
            seconds=time.monotonic() - self._order.start,
            cpu_s=cpu_s,
        )


class Alarm:
    """Sleeps to within a tenth of a millisecond. The loop's own timers count whole ones, which is as long as a fast
    answer takes. Linux has timers to be read from (timerfd_create(2)), which Python knows from 3.13 on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        self._wake: asyncio.Future[None] | None = None
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None)
            self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._ring)

    async def sleep(self, seconds: float) -> None:
        if self._fd < 0:
            await asyncio.sleep(seconds)
            return
        self._wake = self._loop.create_future()
        nanoseconds = max(1, int(seconds * 1e9))  # 0 would stop the timer
        when = (ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 10**9))  # struct itimerspec: interval, value
        self._libc.timerfd_settime(self._fd, 0, when, None)
        await self._wake

    def _ring(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._fd, 8)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)


async def _in_pieces(content: bytes, seconds: float) -> AsyncIterator[bytes]:
    size = -(-len(content) // _PIECES)
    for at in range(0, len(content), size):
        await asyncio.sleep(seconds / _PIECES)
        yield content[at : at + size]


def _row(number: int, result: dict[str, Any], label: str | None) -> tuple[float, ...]:
    """Of IMAGE. Raises LookupError, TypeError or ValueError where it is not what /classify answers."""
    timing = result.get("timing_ms") or {}
    right = -1 if label is None else result["predictions"][0]["label"] == label
    return (
        number,
        _exit(result["exit"]),
        bool(result.get("degraded")),
        right,
        float(result.get("gmacs", "nan")),
        *(float(timing.get(part, "nan")) for part in ("queue", "compute", "total")),
    )


def _exit(value: Any) -> int:
    if not 1 <= int(value) <= _MOST_EXITS:
        raise ValueError(value)
    return int(value)


def _cause(error: BaseException) -> str:
    """In few words, without the address: many alike are counted together."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was closed before the answer"
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number).lower() if number else type(error).__name__
