"""The socket: uvicorn with our own connections, signals and end.

Stopping is a sequence. SIGTERM: not ready -> keep serving for the drain delay -> no new work -> drain -> stop to
accept -> answer what came in meanwhile -> close the engine. SIGINT (Ctrl-C) skips the delay; a second signal skips
whatever is being waited for. Every request that was accepted is answered, the queued ones too.

Should the batch loop die, all waiters have been answered by the batcher; the process then ends, and says so in its
exit status.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from server.frontend.connection import LINGER_S, Connection
from server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.service import Service

log = logging.getLogger(__name__)

# SO_ATTACH_FILTER of Linux, which Python does not name.
_ATTACH_FILTER = 26
_EMPTY_THE_BACKLOG_S = 0.03

# Bytes of answers that the kernel keeps for a client that does not read. By itself it would take megabytes.
SEND_BUFFER = 128 * 1024

# Between "no more connections" and "close the idle ones": time for bytes that are already on their way to become
# requests, which are then answered.
LAST_CALL_S = 0.2


def bind(settings: Settings) -> socket.socket:
    """Take the address before anything slow is done. Raises SettingsError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"cannot listen on {settings.host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server with our signals, and our sequence before its own end."""

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._tell_started = started
        self._stopping: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.failed = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number, delay_s in ((signal.SIGTERM, self._service.settings.drain_delay_s), (signal.SIGINT, 0.0)):
            loop.add_signal_handler(number, self._signalled, delay_s)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._service.batcher.died.add_done_callback(self._batcher_died)
        self._tell_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            for listener in server.sockets:
                _take_no_more(listener)
        await asyncio.sleep(_EMPTY_THE_BACKLOG_S)  # the loop accepts what waits
        for server in self.servers:
            server.close()
        if not self._hurry.is_set():
            await asyncio.sleep(LAST_CALL_S)
        await super().shutdown(sockets)

    def _signalled(self, delay_s: float) -> None:
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop(delay_s))
        else:
            self._hurry.set()

    async def _stop(self, delay_s: float) -> None:
        log.info("stopping")
        self._service.leave()
        await self._unless_hurried(asyncio.sleep(delay_s))
        await self._unless_hurried(self._service.drain(self._service.settings.drain_timeout_s))
        self.should_exit = True

    async def _unless_hurried(self, step: Any) -> None:
        tasks = [asyncio.ensure_future(step), asyncio.ensure_future(self._hurry.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _batcher_died(self, died: asyncio.Future[BaseException]) -> None:
        if died.cancelled():
            return
        self.failed = True
        self._service.leave()
        self.should_exit = True


def _take_no_more(listener: socket.socket) -> None:
    """Let no new connection reach the listener, and keep those that the kernel has accepted for it.

    Closing a listener resets the connections in its backlog, whose clients may have sent a request already. So first a
    packet filter that drops everything is attached to it: those in the backlog can then be accepted, and clients that
    come later find nobody, as after the close. Elsewhere than on Linux the backlog is lost.
    """
    if sys.platform != "linux":
        return
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0, keep no byte
    with contextlib.suppress(OSError):  # some sandboxes forbid it
        fileno = listener.fileno()
        with socket.socket(fileno=os.dup(fileno)) as same:  # asyncio hands out a wrapper without setsockopt
            same.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(drop)))


def make_server(app: FastAPI, settings: Settings, started: Callable[[], None] = lambda: None) -> Server:
    """`started` is called once connections are accepted."""

    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=functools.partial(Connection, service.connections),  # type: ignore[arg-type]  # called like a class
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=settings.backlog,
        timeout_graceful_shutdown=int(LINGER_S) + 1,
    )
    return Server(config, service, started)


def run(app: FastAPI, settings: Settings, listener: socket.socket, started: Callable[[], None] = lambda: None) -> bool:
    """Serve until told to stop. False where the server ended because it failed."""
    server = make_server(app, settings, started)
    server.run(sockets=[listener])
    return server.started and not server.failed
