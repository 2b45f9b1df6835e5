"""A front end in a process of its own: what `remote.fleet` starts.

It listens on the socket of the engine's process, so that no connection that waits there is lost when a front end dies,
and takes one at a time, so that all of them get their share. Signals are the engine's process's to hear: it says when
to stop. When it is gone, what waits is answered, and the front end ends; the main thread sees to that, whatever the
event loop is at.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from server import process
from server.budget.places import Places
from server.bundle.manifest import Manifest
from server.frontend.connection import Connection
from server.frontend.listener import config_of, loop_failed
from server.frontend.origin import hosts_for
from server.frontend.remote import records
from server.frontend.remote.counts import CELLS
from server.frontend.remote.engine_link import EngineLink, FrontApp
from server.frontend.remote.memory import SharedMemory
from server.frontend.remote.records import Kind, Reader
from server.settings import Settings

log = logging.getLogger(__name__)

END_S = 5.0  # from the engine's end to ours, at the latest
_FIRST_WORD_S = 30.0
_AT_ONCE = 2  # connections
_PAUSE_S = 0.001


def main(link: int, memory: int, listener: int) -> None:
    """The three are descriptors that the process was given."""
    for number in process.STOP:
        signal.signal(number, signal.SIG_IGN)
    to_engine = socket.socket(fileno=link)
    thread = threading.Thread(target=_serve, args=(to_engine, memory, socket.socket(fileno=listener)), daemon=True)
    thread.name = "event-loop"
    thread.start()
    engine = select.poll()
    engine.register(link, 0)  # its end alone
    engine.poll()
    time.sleep(END_S)
    process.leave(1)


def _serve(to_engine: socket.socket, memory: int, listener: socket.socket) -> None:
    try:
        start = _Start(to_engine)
        process.log_to_stderr(start.settings.log_level)
        process.hush()
        server = FrontServer(start, to_engine, start.memory(memory), listener)
        server.run()
        status = int(server.lost)
    except _EngineGone:
        status = 1
    except BaseException:
        log.critical("the front end failed", exc_info=True)
        status = 1
    process.leave(status)


class _EngineGone(Exception):
    pass


class _Start:
    """What the engine's process says first; more it says when it has heard HELLO."""

    def __init__(self, to_engine: socket.socket) -> None:
        reader = Reader([Kind.WELCOME], max_items=0)
        to_engine.settimeout(_FIRST_WORD_S)
        record = None
        while record is None:
            data = to_engine.recv(2**16)
            if not data:
                raise _EngineGone
            record = next(reader.feed(data), None)
        to_engine.setblocking(False)
        document = records.get_document(record)
        self.settings = Settings(**document["settings"])
        self.manifest = Manifest.model_validate(document["manifest"])
        self.places = Places(bytes.fromhex(document["places"]))
        self.slots = int(document["slots"])

    @property
    def input_size(self) -> tuple[int, int]:
        return self.manifest.preprocessing.crop

    def memory(self, descriptor: int) -> SharedMemory:
        return SharedMemory(descriptor, cells=CELLS, slots=self.slots, input_size=self.input_size)


class FrontServer(uvicorn.Server):
    """uvicorn's server with our start, and told to stop by the engine's process."""

    def __init__(self, start: _Start, to_engine: socket.socket, memory: SharedMemory, listener: socket.socket) -> None:
        # Its application and its connections are made on the loop.
        super().__init__(config_of(_nothing, None, start.settings, lifespan="off"))
        self._start = start
        self._to_engine = to_engine
        self._memory = memory
        self._listener = listener
        self._accepts = False
        self.servers = []
        self.lost = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are the engine's process's."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(loop_failed)
        start = self._start
        reader = Reader(records.TO_FRONT_END, classes=len(start.manifest.labels), max_items=start.settings.max_images)
        self._link = EngineLink(
            start.settings, start.manifest, start.places, self._memory, time.monotonic, reader, self._heard
        )
        self.config.loaded_app = FrontApp(self._link, hosts_for(start.settings.host, start.settings.allowed_hosts))
        self.config.http_protocol_class = functools.partial(Connection, self._link.connections)  # type: ignore[assignment]
        self._link.decoder.start()
        await self._loop.create_unix_connection(lambda: self._link, sock=self._to_engine)
        self.started = True
        self._link.write(records.plain(Kind.HELLO))

    def _heard(self, kind: Kind) -> None:
        if kind == Kind.OPEN and not self._accepts:
            process.settle()
            self._accepts = True
            self._listener.setblocking(False)
            self._look()
        elif kind in (Kind.SHUT, Kind.FINISH):
            if self._accepts:
                self._accepts = False
                self._loop.remove_reader(self._listener)
                self._accept_the_rest()
                self._listener.close()  # so that, where the engine's process is gone, the next server gets the address
            if kind == Kind.FINISH:
                self.lost = self._link.lost
                self.should_exit = True

    def _accept(self) -> None:
        """A few, and then a pause, in which the others look: who is awake would take all that come at once."""
        self._loop.remove_reader(self._listener)
        pause_s = _PAUSE_S
        try:
            for _ in range(_AT_ONCE):
                self._take()
        except BlockingIOError:
            pass
        except OSError as error:  # no descriptors: later, perhaps
            log.warning("no connection can be accepted: %s", error)
            pause_s = 0.1
        self._loop.call_later(pause_s, self._look)

    def _accept_the_rest(self) -> None:
        with contextlib.suppress(OSError):  # BlockingIOError: there is no more
            while True:
                self._take()

    def _take(self) -> None:
        """Raises OSError."""
        try:
            accepted, _ = self._listener.accept()
        except ConnectionAbortedError:
            return
        accepted.setblocking(False)
        task = self._loop.create_task(self._connect(accepted))
        self.server_state.tasks.add(task)
        task.add_done_callback(self.server_state.tasks.discard)

    def _look(self) -> None:
        if self._accepts:
            self._loop.add_reader(self._listener, self._accept)

    async def _connect(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # its client has gone
            await self._loop.connect_accepted_socket(self._connection, accepted)

    def _connection(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state={}
        )
        return protocol

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self._link.decoder.close()


async def _nothing(*_: Any) -> None:
    """Until the application is made."""
