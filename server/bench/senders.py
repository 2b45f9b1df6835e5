"""Senders in processes of their own: neither a progress bar nor another sender's work is in their way.

They listen to their pipe alone. Ctrl-C is heard by whoever holds a `Senders`, who stops them; where that process ends,
its ends of the pipes close, and they end.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from server import process
from server.bench.orders import Body, Log, Order, merge

_STOP = "stop"
_END_S = 5.0
_TICK_S = 0.1

Tick = Callable[[], object]


class DriverFailed(Exception):
    """In one line."""


class Senders:
    """`with Senders(2, bodies) as senders: log = senders.carry_out(orders)`."""

    def __init__(self, count: int, bodies: Sequence[Body]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            started = context.Process(target=_obey, args=(theirs,), daemon=True)
            with deaf():
                started.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(started)
        try:
            for pipe in self._pipes:
                pipe.send(bodies)
            for pipe in self._pipes:
                self._answer(pipe)  # it is there
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Senders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def count(self) -> int:
        return len(self._pipes)

    def carry_out(self, orders: Sequence[Order], tick: Tick = lambda: None) -> tuple[Log, bool]:
        """One order each, at once. The log of all, and whether Ctrl-C ended it. `tick` is called now and then.

        Ctrl-C stops the load; what was sent until then is in the log. A second one is a KeyboardInterrupt.
        """
        for pipe, order in zip(self._pipes, orders, strict=True):
            self._tell(pipe, order)
        interrupted = False
        logs: dict[int, Log] = {}
        while len(logs) < self.count:
            try:
                waiting = [pipe for number, pipe in enumerate(self._pipes) if number not in logs]
                for ready in wait(waiting, timeout=_TICK_S):
                    assert isinstance(ready, Connection)
                    logs[self._pipes.index(ready)] = self._answer(ready)
                tick()
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                for pipe in self._pipes:
                    self._tell(pipe, _STOP)
        return merge([logs[number] for number in range(self.count)]), interrupted

    def _tell(self, pipe: Connection, what: Order | str) -> None:
        try:
            pipe.send(what)
        except OSError:
            raise self._failed(pipe) from None

    def _answer(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            raise self._failed(pipe) from None

    def _failed(self, pipe: Connection) -> DriverFailed:
        ended = self._processes[self._pipes.index(pipe)]
        ended.join(_END_S)
        return DriverFailed(f"a process that sends has ended (status {ended.exitcode})")

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for started in self._processes:
            started.join(_END_S)
            if started.is_alive():
                started.kill()


@contextmanager
def deaf() -> Iterator[None]:
    """A process that is started in here ignores Ctrl-C from its first moment."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def orders_of(count: int, order: Order) -> list[Order]:
    """A load dealt out to so many senders, in turn."""
    if order.clients:
        shares = [len(range(n, order.clients, count)) for n in range(count)]
        nothing = replace(order, times=order.times[:0], which=order.which[:0], kinds=order.kinds[:0], clients=0)
        return [
            replace(order, which=order.which[n:], kinds=order.kinds[n:], clients=share) if share else nothing
            for n, share in enumerate(shares)
        ]
    return [
        replace(order, times=order.times[n::count], which=order.which[n::count], kinds=order.kinds[n::count])
        for n in range(count)
    ]


def soon(requests: int = 0) -> float:
    """A start that all senders will have heard of by then, with so many moments to hear of."""
    return time.monotonic() + 0.25 + requests / 1e6


def _obey(pipe: Connection) -> None:
    """The life of a sender."""
    process.raise_descriptor_limit()
    import uvloop  # heavy, with all that comes with the client: not where senders are only held

    from server.bench.sending import send

    bodies = pipe.recv()
    pipe.send(True)
    gc.collect()
    gc.freeze()
    while (order := _next(pipe)) is not None:
        if order != _STOP:  # which may come just behind the last answer
            with before_all_others() if not order.clients else nullcontext():
                log = uvloop.run(_carry_out(pipe, order, bodies, send))
            pipe.send(log)


def _next(pipe: Connection) -> Any:
    """None where nobody is left who might say it."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


@contextmanager
def before_all_others() -> Iterator[None]:
    """Clients have machines of their own; these may share theirs with the server, and one that waits for its core is
    late as if the server were. So where the system allows it (root on Linux) the load goes before all else that runs.
    Not clients of a closed loop: they would leave nothing to the server that they wait for."""
    if sys.platform != "linux":
        yield
        return
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


async def _carry_out(pipe: Connection, order: Order, bodies: Sequence[Body], send: Any) -> Log:
    loop = asyncio.get_running_loop()

    def heed(stop: Callable[[], None]) -> None:
        def heard() -> None:
            loop.remove_reader(pipe.fileno())
            with suppress(EOFError, OSError):
                pipe.recv()
            stop()

        loop.add_reader(pipe.fileno(), heard)

    try:
        log: Log = await send(order, bodies, heed)
        return log
    finally:
        loop.remove_reader(pipe.fileno())
        os.set_blocking(pipe.fileno(), True)  # as uvloop found it
