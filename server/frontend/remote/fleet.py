"""The front ends of one server: started, watched, replaced, ended. Lives on the event loop of the engine's process.

A front end that dies takes its own connections with it, and nothing else: its requests leave the queues, and another
one takes its place, on the same listening socket. Where they die one after the other the server ends: whatever it is,
it will not go away by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from server.frontend.front import Figures
from server.frontend.remote import records
from server.frontend.remote.counts import CELLS
from server.frontend.remote.link import Link
from server.frontend.remote.memory import SharedMemory, create_memory
from server.frontend.remote.records import PRIORITIES, Door, Kind
from server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from server.service import Service

log = logging.getLogger(__name__)

START_S = 60.0  # for a front end to be ready
END_S = 4.0  # for one to end: clients that do not read have 3 seconds
ANSWER_S = 0.5  # for figures that are asked for
BACK_OFF_S = 0.1  # before the first replacement; twice as long before each further one
MAX_DEATHS = 5  # in a row, of front ends that were no older than
YOUNG_S = 5.0

# With the modules of this process, wherever they come from.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from server.frontend.apart import main; main(*{descriptors})"


@dataclass(eq=False, slots=True)
class _FrontEnd:
    """One process."""

    link: Link
    process: subprocess.Popen[bytes]
    ended: asyncio.Future[None]


class Fleet:
    """Implements `service.Apart`. `failed` resolves, with the reason, where front ends cannot be kept running."""

    def __init__(self, service: Service, app: ASGIApp) -> None:
        """Raises SettingsError where there can be none."""
        if sys.platform != "linux":
            raise SettingsError("bad setting DVT_FRONTENDS: front ends of their own need Linux")
        settings = service.settings
        self._service = service
        self._app = app
        # As many as the scheduler can hold, and what comes beside it to be refused.
        self._slots = settings.max_queued_images + settings.max_slots + 2 * settings.max_images
        self._welcome = records.document(
            Kind.WELCOME,
            {
                "settings": share_of(settings).model_dump(mode="json"),
                "manifest": service.manifest.model_dump(mode="json"),
                "places": service.places.key.hex(),
                "slots": self._slots,
            },
        )
        self._running: set[_FrontEnd] = set()
        self._processes: set[subprocess.Popen[bytes]] = set()  # also those that have ended but not been waited for
        self._keepers: list[asyncio.Task[None]] = []
        self._deaths = 0  # in a row
        self._door = Door()
        self._door_is_due = False
        self._accepting = False
        service.apart = self

    # -- start and end

    async def start(self, listener: socket.socket) -> None:
        """Returns when all are ready, or have failed. They do not accept yet."""
        loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[str] = loop.create_future()
        self._listener = listener
        ready = [asyncio.Event() for _ in range(self._service.settings.frontends)]
        self._keepers = [loop.create_task(self._keep(one)) for one in ready]
        waiting = loop.create_task(_all(ready))
        self.failed.add_done_callback(lambda _: waiting.cancel())
        await asyncio.wait([waiting])

    def open(self) -> None:
        """Let them accept: the socket listens."""
        self._accepting = True
        self._tell(records.plain(Kind.OPEN))

    def shut(self) -> None:
        """No more connections."""
        self._accepting = False
        self._tell(records.plain(Kind.SHUT))

    async def finish(self) -> None:
        """End them, behind what they have to answer."""
        for keeper in self._keepers:
            keeper.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)
        ready = [one for one in self._running if one.link.is_ready]
        for one in ready:
            one.link.write(records.plain(Kind.FINISH))
        for process in self._processes - {one.process for one in ready}:
            process.kill()
        await asyncio.gather(*[self._reap(process) for process in list(self._processes)])

    # -- a place of one front end

    async def _keep(self, ready: asyncio.Event) -> None:
        """See that there is one."""
        loop = asyncio.get_running_loop()
        try:
            while not self.failed.done():
                one = await self._spawn()
                late = loop.call_later(START_S, self._kill, one, f"it was not ready within {START_S:g} s")
                await asyncio.shield(one.link.ready)
                late.cancel()
                began = loop.time()
                if one.link.is_ready:
                    ready.set()
                    one.link.write(records.door(self._door))
                    if self._accepting:
                        one.link.write(records.plain(Kind.OPEN))
                await asyncio.shield(one.ended)
                one.process.kill()  # whatever made it close its socket
                status = await self._reap(one.process)
                log.error("the front end of process %d has ended, %s", one.process.pid, _told(status))
                self._deaths = self._deaths + 1 if loop.time() - began < YOUNG_S else 1
                if self._deaths < MAX_DEATHS:
                    await asyncio.sleep(BACK_OFF_S * 2 ** (self._deaths - 1))
                    self._service.metrics.frontend_restarted()
                elif not self.failed.done():
                    self.failed.set_result(f"{self._deaths} front ends have died, one soon after the other")
        except Exception as error:  # no memory, no descriptors
            if not self.failed.done():
                self.failed.set_result(f"a front end could not be started: {error}")

    async def _spawn(self) -> _FrontEnd:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        input_size = self._service.manifest.preprocessing.crop
        descriptor = create_memory(cells=CELLS, slots=self._slots, input_size=input_size)
        try:
            with theirs:
                memory = SharedMemory(descriptor, cells=CELLS, slots=self._slots, input_size=input_size)
                given = (theirs.fileno(), descriptor, self._listener.fileno())
                process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM.format(path=sys.path, descriptors=given)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=given,
                )
                self._processes.add(process)
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(descriptor)
        ended = loop.create_future()
        one = _FrontEnd(Link(self._service, self._app, memory, self._welcome, self.tell_door), process, ended)
        self._running.add(one)
        one.link.at_end(lambda: self._ended(one))
        ours.setblocking(False)
        await loop.create_unix_connection(lambda: one.link, sock=ours)
        return one

    async def _reap(self, process: subprocess.Popen[bytes]) -> int:
        status = await asyncio.to_thread(_wait, process)
        self._processes.discard(process)
        return status

    def _ended(self, one: _FrontEnd) -> None:
        """Its end of the socket is closed."""
        self._running.discard(one)
        one.ended.set_result(None)

    def _kill(self, one: _FrontEnd, why: str) -> None:
        if one in self._running:
            log.error("the front end of process %d is killed: %s", one.process.pid, why)
            one.process.kill()

    def _tell(self, record: bytes) -> None:
        for one in self._running:
            if one.link.is_ready:
                one.link.write(record)

    # -- what the service asks (service.Apart)

    @property
    def count(self) -> int:
        return sum(one.link.is_ready for one in self._running)

    @property
    def figures(self) -> Figures:
        found = [one.link.figures for one in list(self._running)]  # at the end another thread asks
        return Figures(
            connections=sum(of.connections for of in found),
            requests=sum(of.requests for of in found),
            held_bytes=sum(of.held_bytes for of in found),
            decode_age_s=max((of.decode_age_s for of in found), default=0.0),
            decodes_stalled=sum(of.decodes_stalled for of in found),
        )

    def tell_door(self) -> None:
        if not self._door_is_due:
            self._door_is_due = True
            asyncio.get_running_loop().call_soon(self._tell_door)

    def _tell_door(self) -> None:
        self._door_is_due = False
        service = self._service
        full = tuple(one for one in PRIORITIES if service.batcher.is_full(one))
        door = Door(service.phase, service.has_stalled(), full)
        if door != self._door:
            self._door = door
            self._tell(records.door(door))

    async def wait_idle(self) -> None:
        if idle := [one.link.idle for one in self._running if one.link.is_ready]:
            await asyncio.wait(idle)

    async def refresh(self) -> None:
        """One that has let us wait for too long is killed: its loop hangs, and so do its clients."""
        now, allowed = time.monotonic(), self._service.settings.stall_timeout_s
        for one in list(self._running):
            if one.link.silent_since < now - allowed:
                self._kill(one, f"it has not said a word for {allowed:g} s")
        if told := [asyncio.ensure_future(one.link.refresh()) for one in self._running]:
            await asyncio.wait(told, timeout=ANSWER_S)
            for task in told:
                task.cancel()


def share_of(settings: Settings) -> Settings:
    """One front end's share of what a server may hold; of what one request may have, all."""
    count = settings.frontends
    return settings.model_copy(
        update={
            "max_connections": -(-settings.max_connections // count),
            "max_requests": -(-settings.max_requests // count),
            "max_held_bytes": max(settings.max_held_bytes // count, settings.max_body_bytes),
            "max_queued_decodes": max(settings.max_queued_decodes // count, settings.max_images),
            "decode_threads": -(-settings.decode_threads // count),
        }
    )


async def _all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _told(status: int) -> str:
    return f"by signal {-status}" if status < 0 else f"with status {status}"
