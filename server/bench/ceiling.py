"""The driver's own ceiling: what it sends to a server that answers everybody with the same bytes, at once.

That server is a process with next to nothing in it; where the machine has few cores, it shares them with the senders,
and the ceiling is a low one.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np

from server.bench.orders import Order, Outcome
from server.bench.senders import DriverFailed, Senders, deaf, orders_of, soon

CLIENTS = 16  # of each sender
SETTLE_S = 0.2
PATH = "/classify"


@dataclass(frozen=True)
class Ceiling:
    per_s: float
    cpu_us: float  # of the senders, a request


def ceiling(senders: Senders, answer: bytes, bodies: int, seconds: float = 0.8) -> Ceiling:
    """`answer`: the body that the server gives; `bodies`: how many the senders have. Raises DriverFailed."""
    with answering(answer) as port:
        return _ceiling(senders, port, bodies, seconds)


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """The server, in a process of its own; its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, answer), daemon=True)
    with deaf():
        server.start()
    theirs.close()
    try:
        try:
            port: int = ours.recv()
        except (EOFError, OSError):
            raise DriverFailed("the server that only answers did not start") from None
        yield port
    finally:
        ours.close()
        server.join(2)
        server.kill()


def _ceiling(senders: Senders, port: int, bodies: int, seconds: float) -> Ceiling:
    which = np.arange(max(bodies, senders.count * CLIENTS)) % bodies
    order = Order(
        url=f"http://127.0.0.1:{port}{PATH}",
        start=soon(),
        times=np.array([SETTLE_S + seconds]),
        which=which,
        kinds=np.zeros_like(which),
        clients=senders.count * CLIENTS,
    )
    log, interrupted = senders.carry_out(orders_of(senders.count, order))
    if interrupted:
        raise KeyboardInterrupt
    done = log.due + log.took
    steady = (log.outcome == Outcome.ANSWERED) & (done >= SETTLE_S) & (done < SETTLE_S + seconds)
    return Ceiling(float(steady.sum()) / seconds, 1e6 * log.cpu_s / max(1, len(log)))


def serve(pipe: Connection, answer: bytes) -> None:
    """Until the other end of the pipe is closed."""
    import uvloop

    with suppress(EOFError, OSError):
        uvloop.run(_serve(pipe, answer))


async def _serve(pipe: Connection, answer: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(answer)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    server = await loop.create_server(lambda: _Same(head.encode() + answer), "127.0.0.1", 0, backlog=1024)
    pipe.send(server.sockets[0].getsockname()[1])
    loop.add_reader(pipe.fileno(), ended.set)
    await ended.wait()
    loop.remove_reader(pipe.fileno())


class _Same(asyncio.Protocol):
    """Counts the bytes of a request, and looks at nothing else of it."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._head = b""
        self._missing = -1  # bytes of the body; -1: the head is not whole yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(Any, transport)

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            at = self._head.lower().find(b"content-length:")
            length = int(self._head[at + 15 : self._head.index(b"\r\n", at)])
            self._missing = length - (len(self._head) - end - 4)
            self._head = b""
        else:
            self._missing -= len(data)
        if self._missing == 0:
            self._missing = -1
            self._transport.write(self._answer)
