"""An open-loop load: every request has its moment, fixed in advance, and its latency counts from that moment on.

Clients that wait for an answer before they ask again slow down with the server, and so hide what it does to those who
come regardless. One process, one event loop; connections are kept and opened as needed.

Clients have machines of their own. This one shares its cores with the server, and one that waits for them is late as if
the server were: so where the system allows it (root on Linux) the load goes before everything else that runs, and each
shot tells how late it left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.clients import CHUNKED, dechunked
from benchmarks.harness import HOST
from server.bench.senders import before_all_others

GRACE_S = 10.0  # after the last request: who has no answer by then has none


@dataclass(frozen=True, slots=True)
class Shot:
    """One request: which of the load's, seconds from its moment to its answer, and the answer."""

    request: int
    seconds: float  # inf where there was no answer
    status: int  # 0 where there was none
    body: bytes
    behind: float = 0.0  # seconds after its moment at which it was sent: that was not the server

    @property
    def results(self) -> list[Any]:
        """Of its images; empty unless it was answered with 200."""
        return orjson.loads(self.body)["results"] if self.status == 200 else []  # type: ignore[no-any-return]


def fire(port: int, requests: Sequence[bytes], which: NDArray[np.int64], times: NDArray[np.float64]) -> list[Shot]:
    """Send requests[which[n]] at times[n] seconds from now, in order; blocks until all are answered, or GRACE_S later.

    `requests`: the bytes of whole HTTP/1.1 requests (`clients.classify`).
    """
    with before_all_others():
        return asyncio.run(_fire(port, requests, which.tolist(), times.tolist()))


async def _fire(port: int, requests: Sequence[bytes], which: list[int], times: list[float]) -> list[Shot]:
    loop = asyncio.get_running_loop()
    idle: list[_Connection] = []
    shots: list[Shot | None] = [None] * len(times)
    behind = [0.0] * len(times)
    left = len(times)
    finished = asyncio.Event()
    start = time.perf_counter() + 0.1

    def done(number: int, status: int, body: bytes) -> None:
        nonlocal left
        seconds = time.perf_counter() - start - times[number]
        shots[number] = Shot(which[number], seconds, status, body, behind[number])
        left -= 1
        if not left:
            finished.set()

    def ask(connection: _Connection, number: int) -> None:
        behind[number] = time.perf_counter() - start - times[number]
        connection.ask(number, requests[which[number]])

    async def one(number: int) -> None:
        try:
            _, connection = await loop.create_connection(lambda: _Connection(idle, done), HOST, port)
        except OSError:
            done(number, 0, b"")
        else:
            ask(connection, number)

    opening = set()
    for number, moment in enumerate(times):
        wait = start + moment - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        elif number % 16 == 0:
            await asyncio.sleep(0)  # late: answers must be read all the same
        while idle and idle[-1].closed:
            idle.pop()
        if idle:
            ask(idle.pop(), number)
        else:
            task = loop.create_task(one(number))
            opening.add(task)
            task.add_done_callback(opening.discard)
    try:
        async with asyncio.timeout(GRACE_S):
            await finished.wait()
    except TimeoutError:
        pass
    for connection in idle:
        connection.transport.close()
    return [shot or Shot(which[n], float("inf"), 0, b"") for n, shot in enumerate(shots)]


class _Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self, idle: list[_Connection], done: Any) -> None:
        self._idle, self._done = idle, done
        self._number = -1
        self._data = b""
        self.closed = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, number: int, request: bytes) -> None:
        self._number, self._data = number, b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._data[:end].lower()
        body: bytes | None = self._data[end + 4 :]
        at = head.find(b"content-length: ")
        if at >= 0:
            if len(self._data) - end - 4 < int(head[at + 16 :].split(b"\r\n", 1)[0]):
                return
        elif CHUNKED in head and (body := dechunked(self._data[end + 4 :])) is None:
            return
        number, self._number = self._number, -1
        if b"connection: close" in head:
            self.closed = True
            self.transport.close()
        else:
            self._idle.append(self)
        self._done(number, int(head[9:12]), body or b"")

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.closed = True
        if self._number >= 0:
            number, self._number = self._number, -1
            self._done(number, 0, b"")
