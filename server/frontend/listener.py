"""The socket: uvicorn with our own connections, signals and end.

Stopping is a sequence. SIGTERM: not ready -> keep serving for the drain delay -> no new work -> drain -> stop to
accept -> answer what came in meanwhile -> close the engine. SIGHUP is the same; SIGINT (Ctrl-C) skips the delay; a
second signal skips whatever is being waited for, a third ends the process. Every request that was accepted is answered,
the queued ones too. `run` bounds all of it.

Should the batch loop die, all waiters have been answered by the batcher; the process then ends, and says so in its
exit status.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import logging
import math
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE

from server import process
from server.frontend.address import listen
from server.frontend.connection import LINGER_S, Connection, Connections
from server.frontend.remote.fleet import Fleet
from server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from server.service import Service

log = logging.getLogger(__name__)

# SO_ATTACH_FILTER of Linux, which Python does not name.
_ATTACH_FILTER = 26
_EMPTY_THE_BACKLOG_S = 0.03

# Between "no more connections" and "close the idle ones": time for bytes that are already on their way to become
# requests, which are then answered.
LAST_CALL_S = 0.2

# From "no more connections" to the end: 2 to 3 seconds for clients that do not read on, the rest for the threads.
END_S = 8.0

ENDING, ENDED, LATE = 253, 254, 255  # events of `run`, besides signals, which have their own numbers


class Server(uvicorn.Server):
    """uvicorn's server with our start, and with our sequence before its own end. Lives on the event loop; `run` starts
    it, and tells it of signals."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        started: Callable[[], None],
        ending: Callable[[], object],
        fleet: Fleet | None = None,
    ) -> None:
        """`fleet`: the front ends that take the connections; by default this process does."""
        super().__init__(config)
        self._fleet = fleet
        self.service = service
        self._tell_started = started
        self._tell_ending = ending
        self._stopping: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.failed = False
        self.address_taken = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are heard elsewhere."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(loop_failed)
        self.servers = []
        front_ends = None
        if self._fleet is not None:
            (listener,) = sockets or []
            front_ends = asyncio.ensure_future(self._fleet.start(listener))  # beside the warm-up of the engine
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        self.service.batcher.died.add_done_callback(self._batcher_died)
        self.started = True
        if self._fleet is not None and front_ends is not None:
            await front_ends
            self._fleet.failed.add_done_callback(self._fleet_failed)
            if self._fleet.failed.done():
                return
        try:
            # uvloop would not tell that somebody else listens, and close the socket behind our back.
            for listener in sockets or []:
                listen(listener, self.config.backlog)
        except OSError:
            self.address_taken = self.should_exit = True
            return
        if self._fleet is not None:
            self._fleet.open()
        for listener in sockets or [] if self._fleet is None else []:
            self.servers.append(
                await self.loop.create_server(self._connection, sock=listener, backlog=self.config.backlog)
            )
        self._tell_started()

    def _connection(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._tell_ending()
        for listener in sockets or []:
            _take_no_more(listener)
        await asyncio.sleep(_EMPTY_THE_BACKLOG_S)  # the loop accepts what waits
        for server in self.servers:
            server.close()
        if self._fleet is not None:
            self._fleet.shut()
        if not self._hurry.is_set():
            await asyncio.sleep(LAST_CALL_S)
        if self._fleet is not None:
            await self._fleet.finish()
        await super().shutdown(sockets)

    def signalled(self, number: int) -> None:
        """SIGINT skips the delay; what comes second skips whatever is being waited for."""
        if self._stopping is None:
            delay_s = 0.0 if number == signal.SIGINT else self.service.settings.drain_delay_s
            self._stopping = self.loop.create_task(self._stop(delay_s))
        else:
            self._hurry.set()

    async def _stop(self, delay_s: float) -> None:
        log.info("stopping")
        self.service.leave()
        await self._unless_hurried(asyncio.sleep(delay_s))
        await self._unless_hurried(self.service.drain(self.service.settings.drain_timeout_s))
        if self._hurry.is_set():
            await self.service.drain(0)  # those that were waited for are answered with what is known
        self.should_exit = True

    async def _unless_hurried(self, step: Any) -> None:
        tasks = [asyncio.ensure_future(step), asyncio.ensure_future(self._hurry.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _fleet_failed(self, failed: asyncio.Future[str]) -> None:
        if failed.cancelled():
            return
        log.critical("%s", failed.result())
        self._fail()

    def _batcher_died(self, died: asyncio.Future[BaseException]) -> None:
        if not died.cancelled():
            self._fail()

    def _fail(self) -> None:
        self.failed = True
        self.service.leave()
        self.should_exit = True


def loop_failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A connection that the network, or its client, broke is no failure of ours; asyncio knows that, uvloop only of
    resets."""
    if isinstance(context.get("exception"), OSError) and "transport" in context:
        log.debug("a connection broke: %s", context["exception"])
    else:
        loop.default_exception_handler(context)


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


def make_server(
    app: Starlette,
    settings: Settings,
    started: Callable[[], None] = lambda: None,
    ending: Callable[[], object] = lambda: None,
) -> Server:
    """`started` is called once connections are accepted, `ending` when no more are."""

    service: Service = app.state.service
    fleet = Fleet(service, app) if settings.frontends else None
    return Server(config_of(app, service.connections, settings, lifespan="on"), service, started, ending, fleet)


def config_of(
    app: ASGIApp, connections: Connections | None, settings: Settings, lifespan: Literal["on", "off"]
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        interface="asgi3",
        loop="uvloop",
        http=functools.partial(Connection, connections),  # type: ignore[arg-type]  # called like a class
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=settings.backlog,
        timeout_graceful_shutdown=int(LINGER_S) + 1,
    )


def run(
    app: Starlette,
    settings: Settings,
    listener: socket.socket,
    started: Callable[[], None] = lambda: None,
    end_s: float = END_S,
) -> bool:
    """Serve until told to stop. False where the server failed. Raises SettingsError where another one has the address.

    The event loop runs in a thread of its own, and this one waits for signals. So the end has a bound whatever hangs:
    the engine, a decoding thread, a disk, a client, or the loop itself. What is not at its end `end_s` after the drain
    is left behind: the process ends here, with exit status 1.
    """
    events, post = socket.socketpair()
    post.setblocking(False)
    server = make_server(app, settings, started, lambda: post.send(bytes([ENDING])))
    thread = threading.Thread(target=_serve, args=(server, listener, post), name="event-loop", daemon=True)
    # By this way, as the kernel may give a signal to any thread, and that would not wake this one.
    signal.set_wakeup_fd(post.fileno(), warn_on_full_buffer=False)
    process.hear_stop(lambda _: None)
    thread.start()
    asked, until = 0, math.inf  # signals so far; when the process ends at the latest
    while (event := _next(events, until)) != ENDED:
        within_s = end_s
        if event in process.STOP:
            asked += 1
            if not server.started:  # nobody was served yet, so nobody waits for an answer
                log.info("stopping before the server was ready")
                process.leave(0)
            if asked == 1:
                within_s += settings.drain_timeout_s + (settings.drain_delay_s if event != signal.SIGINT else 0.0)
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has just ended
                server.loop.call_soon_threadsafe(server.signalled, event)
        if event == LATE or asked > 2:
            log.critical("the process ends, and does not wait for %s", _what_hangs(server, thread))
            process.leave(1)
        until = min(until, time.monotonic() + within_s)
    signal.set_wakeup_fd(-1)
    if server.address_taken:
        raise SettingsError(f"cannot listen on {settings.host} port {settings.port}: {os.strerror(errno.EADDRINUSE)}")
    return server.started and not server.failed


def _serve(server: Server, listener: socket.socket, post: socket.socket) -> None:
    try:
        server.run(sockets=[listener])
    except SystemExit:  # the start failed, and uvicorn has said why
        pass
    except BaseException:
        server.failed = True
        log.critical("the server failed", exc_info=True)
    finally:
        post.send(bytes([ENDED]))


def _next(events: socket.socket, until: float) -> int:
    left_s = until - time.monotonic()
    if left_s <= 0:
        return LATE
    events.settimeout(None if left_s == math.inf else left_s)
    try:
        return events.recv(1)[0]
    except TimeoutError:
        return LATE


def _what_hangs(server: Server, thread: threading.Thread) -> str:
    if found := server.service.unfinished():
        return "; ".join(found)
    frame = sys._current_frames().get(thread.ident or 0)
    return "the event loop, " + (f"in {frame.f_code.co_filename}:{frame.f_lineno}" if frame else "which has ended")
