"""The socket: uvicorn with our own protocol limits, signals and end.

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
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.frontend.edge import LINGER_S, PROBLEM, new_request_id
from server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from server.service import Service

log = logging.getLogger(__name__)

# SO_ATTACH_FILTER of Linux, which Python does not name.
_ATTACH_FILTER = 26
_EMPTY_THE_BACKLOG_S = 0.03

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
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(HttpToolsProtocol):
    """One connection: uvicorn's, with bounds on the header's size and on the time it may take to come.

    uvicorn waits for ever for the rest of a header, or for a first byte. `max_header_bytes` and `header_timeout_s` are
    set by `make_server`.
    """

    max_header_bytes = 65536
    header_timeout_s = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Only chunks that come wholly while a header is awaited are counted: what precedes it may be a body's end.
        awaited = self._in_header
        super().data_received(data)
        if awaited and self._in_header:
            self._header_bytes += len(data)
            if self._header_bytes > self.max_header_bytes:
                self._refuse(
                    431, "request_header_too_large", f"The header is larger than {self.max_header_bytes} bytes"
                )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self._await_header()

    def on_headers_complete(self) -> None:
        self._header_came()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP at all; uvicorn would answer in plain text."""
        self._refuse(400, "bad_request", msg)

    @property
    def _in_header(self) -> bool:
        return self._header_timer is not None

    def _await_header(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self._header_is_late)

    def _header_came(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _header_is_late(self) -> None:
        self._header_timer = None
        if self.scope is None:  # not one byte of a request: there is nothing to answer
            self.transport.close()
        elif self._answering:  # a pipelined header may be late for as long as the answer before it takes
            self._await_header()
        else:
            self._refuse(408, "request_timeout", f"The header was not complete after {self.header_timeout_s:g} s")

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Answer outside of the application, and close. The answers to earlier requests go first."""
        if self.transport.is_closing():
            return
        self._header_came()
        if self._answering:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        request_id = new_request_id()
        phrase = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
        body = orjson.dumps(
            {
                "type": f"urn:dvt-serve:problem:{code}",
                "title": phrase,
                "status": status,
                "detail": detail,
                "code": code,
                "request_id": request_id,
            }
        )
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: {PROBLEM}\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


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

    class Bounded(Connection):
        max_header_bytes = settings.max_header_bytes
        header_timeout_s = settings.header_timeout_s

    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=Bounded,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=settings.backlog,
        timeout_keep_alive=int(max(1, settings.keep_alive_timeout_s)),
        timeout_graceful_shutdown=int(LINGER_S) + 1,
    )
    return Server(config, app.state.service, started)


def run(app: FastAPI, settings: Settings, listener: socket.socket, started: Callable[[], None] = lambda: None) -> bool:
    """Serve until told to stop. False where the server ended because it failed."""
    server = make_server(app, settings, started)
    server.run(sockets=[listener])
    return server.started and not server.failed
