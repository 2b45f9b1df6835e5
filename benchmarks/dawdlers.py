"""Clients that hold connections and hardly use them, or never read: a crowd of them, in a process of its own.

One process, one event loop, plain sockets. A connection that the server closes is made again a second later, so that
the crowd stays as large as it was. Loopback only, and it ends when told to or when its parent does.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.clients import classify
from benchmarks.harness import HOST

# header  one byte of a header now and then, without end
# body    a header that promises a body, and one byte of it now and then
# idle    nothing; every other one asks once, reads the answer, and is silent from then on
# deaf    many requests at once, no answer ever read
# polite  for comparison: a small request now and then, its answer read
KINDS = ("header", "body", "idle", "deaf")
POLITE = "polite"

_SMALL = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
_NO_IMAGE = classify(b"no image", "image/jpeg")
_DEAF = (
    _SMALL,
    b"GET /model HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n",
    _NO_IMAGE,
)
_OPENINGS = {
    "header": b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "body": classify(bytes(10**6))[: -(10**6)],
}
_AT_ONCE = 16  # requests a deaf client hands over before it looks whether they still go out
_DEAF_BUFFER = 4096  # bytes that the kernel may take in for a client that never reads
_AGAIN_S = 1.0
_LOOK_S = 0.2  # how often the kernel is asked for the state of connections that nobody reads
_ESTABLISHED = 1  # of TCP_INFO, tcp(7)


@dataclass
class Held:
    """One connection: for how long the server let it be, from its last whole request or its beginning on."""

    kind: str
    first: bool  # not one that was made again
    seconds: float = 0.0
    closed: bool = False  # by the server
    statuses: Counter[int] = field(default_factory=Counter)


class Crowd:
    """`each` connections of every kind: `with Crowd(port, ("idle",), 500) as crowd: ...; crowd.held` afterwards."""

    def __init__(self, port: int, kinds: Sequence[str], each: int, pause_s: float, pipelined: int) -> None:
        self.held: list[Held] = []
        self.refused = 0  # connections that could not be made
        processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(
            target=_run, args=(theirs, port, tuple(kinds), each, pause_s, pipelined), daemon=True
        )

    def __enter__(self) -> Crowd:
        """Once every connection was tried."""
        self._process.start()
        self._hear(120)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._pipe.send("stop")
                self.held, self.refused = self._hear(60)
        finally:
            self._process.terminate()
            self._process.join()

    def _hear(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError("the process of the slow clients says nothing")
        return self._pipe.recv()


def _run(pipe: Connection, port: int, kinds: Sequence[str], each: int, pause_s: float, pipelined: int) -> None:
    raise_open_files()
    asyncio.run(_Loop(port, pause_s, pipelined).run(pipe, [kind for kind in kinds for _ in range(each)]))


def raise_open_files() -> None:
    """As many as may be; processes started later inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Loop:
    def __init__(self, port: int, pause_s: float, pipelined: int) -> None:
        self.port, self.pause_s, self.pipelined = port, pause_s, pipelined
        self.open: dict[_Dawdler, int] = {}
        self.done: list[Held] = []
        self.refused = 0
        self._again: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def run(self, pipe: Connection, kinds: list[str]) -> None:
        loop = asyncio.get_running_loop()
        for start in range(0, len(kinds), 100):  # no more at a time than any backlog takes
            part = enumerate(kinds[start : start + 100], start)
            await asyncio.gather(*(self._connect(kind, number, True) for number, kind in part))
        told = asyncio.Event()
        loop.add_reader(pipe.fileno(), told.set)  # also when the parent is gone
        pipe.send("there")
        while not told.is_set():
            for dawdler in [one for one in self.open if one.held.kind == "deaf"]:
                dawdler.look()
            try:
                async with asyncio.timeout(_LOOK_S):
                    await told.wait()
            except TimeoutError:
                pass
        loop.remove_reader(pipe.fileno())
        self._stopping = True
        now = time.monotonic()
        for dawdler in list(self.open):
            dawdler.held.seconds = now - dawdler.since
            self.done.append(dawdler.held)
            dawdler.transport.abort()
        pipe.send((self.done, self.refused))

    def ended(self, dawdler: _Dawdler) -> None:
        number = self.open.pop(dawdler)
        if self._stopping:
            return
        dawdler.held.seconds, dawdler.held.closed = time.monotonic() - dawdler.since, True
        self.done.append(dawdler.held)
        task = asyncio.get_running_loop().create_task(self._reconnect(dawdler.held.kind, number))
        self._again.add(task)
        task.add_done_callback(self._again.discard)

    async def _reconnect(self, kind: str, number: int) -> None:
        await asyncio.sleep(_AGAIN_S)
        if not self._stopping:
            await self._connect(kind, number, False)

    async def _connect(self, kind: str, number: int, first: bool) -> None:
        plain = socket.socket()
        plain.setblocking(False)
        if kind == "deaf":
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _DEAF_BUFFER)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(plain, (HOST, self.port))
            await loop.create_connection(lambda: _Dawdler(self, Held(kind, first), number), sock=plain)
        except OSError:
            self.refused += 1
            plain.close()


class _Dawdler(asyncio.Protocol):
    def __init__(self, crowd: _Loop, held: Held, number: int) -> None:
        self.held = held
        self._crowd, self._number = crowd, number
        self._left = crowd.pipelined
        self._full = False
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.since = time.monotonic()
        self._crowd.open[self] = self._number
        kind = self.held.kind
        if kind in _OPENINGS:
            transport.write(_OPENINGS[kind])
            self._later(self._byte)
        elif kind == POLITE:
            # Not all in one moment.
            self._later(self._ask, (self._number % 97) / 97)
        elif kind == "idle" and self._number % 2:
            transport.write(_SMALL)
        elif kind == "deaf":
            transport.pause_reading()
            transport.set_write_buffer_limits(1)
            self._flood()

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 "):
            self.held.statuses[int(data[9:12])] += 1
            if self.held.kind in ("idle", POLITE):
                self.since = time.monotonic()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._flood()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self._next is not None:
            self._next.cancel()
        if self in self._crowd.open:
            self._crowd.ended(self)

    def look(self) -> None:
        """Whether the server has closed: who does not read is not told."""
        if self.transport.is_closing():
            return
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        if info[0] != _ESTABLISHED:
            self.transport.abort()

    def _later(self, what: Any, share: float = 1.0) -> None:
        self._next = asyncio.get_running_loop().call_later(share * self._crowd.pause_s, what)

    def _byte(self) -> None:
        self.transport.write(b"x")
        self._later(self._byte)

    def _ask(self) -> None:
        self.transport.write(_SMALL)
        self._later(self._ask)

    def _flood(self) -> None:
        while self._left > 0 and not self._full:
            count = min(_AT_ONCE, self._left)
            self._left -= count
            self.transport.write(_DEAF[self._number % len(_DEAF)] * count)
