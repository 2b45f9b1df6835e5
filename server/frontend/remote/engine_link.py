"""The front end's end of the socket to the engine's process, and the `Front` of a process without an engine.

A request is refused here where it can be: at the door, by what the engine's process last said of it (DOOR), or where no
slot is left. Its pixels go to slots of the shared memory, its terms over the socket; the answer comes back over it.
Other paths are passed on as they are, and answered by the engine's process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.budget.places import Places
from server.bundle.manifest import Manifest
from server.cascade.scheduler import Priority
from server.core import Answer, Pixels
from server.errors import Draining, EngineFailed, HeaderTooLarge, Overloaded, ServeError
from server.frontend.edge import Edge, new_request_id, problem, thin
from server.frontend.front import Front, Phase, queue_full, threads_stalled
from server.frontend.origin import AllowedHosts
from server.frontend.remote import records
from server.frontend.remote.counts import SharedCounts
from server.frontend.remote.memory import FreeSlots, SharedMemory, put
from server.frontend.remote.records import Door, Kind, Record
from server.frontend.routes import classify
from server.settings import Settings

log = logging.getLogger(__name__)

PATH = "/classify"
_NUMBERS = 2**32


class EngineLink(asyncio.Protocol, Front):
    """`heard` is told of OPEN, SHUT and FINISH, and of the end of the engine's process, as FINISH."""

    def __init__(
        self,
        settings: Settings,
        manifest: Manifest,
        places: Places,
        memory: SharedMemory,
        clock: Callable[[], float],
        reader: records.Reader,
        heard: Callable[[Kind], None],
    ) -> None:
        Front.__init__(self, settings, manifest, SharedCounts(memory.cells), places, clock)
        self._memory = memory
        self._slots = FreeSlots(len(memory.pixels))
        self._reader = reader
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._door = Door()
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._asked: dict[int, asyncio.Queue[Record | None]] = {}
        self._idle: asyncio.Task[None] | None = None  # until all is answered that was let in
        self.lost = False  # the engine's process has ended

    # -- the transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a socket's
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for record in self._reader.feed(data):
            self._take(record)

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True
        self.phase = Phase.STOPPED
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineFailed("the engine's process has ended"))
        for queue in self._asked.values():
            queue.put_nowait(None)
        self._heard(Kind.FINISH)

    def _take(self, record: Record) -> None:
        kind, number = record.kind, record.number
        if kind == Kind.ANSWER:
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_result(records.get_answer(record, self.exits))
        elif kind == Kind.FREED:
            self._slots.give_back(records.get_freed(record))
        elif kind == Kind.ERROR:
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_exception(records.as_error(records.get_document(record)))
        elif kind == Kind.DOOR:
            self._door = records.get_door(record)
            self.phase = self._door.phase
            if self.phase is Phase.DRAINING and self._idle is None:
                self._idle = self._loop.create_task(self._tell_idle())
        elif kind == Kind.TELL:
            self.write(records.figures(self.figures()))
        elif kind in (Kind.WANT, Kind.REPLY):
            if (queue := self._asked.get(number)) is not None:
                queue.put_nowait(record)
        else:
            self._heard(Kind(kind))

    async def _tell_idle(self) -> None:
        await self.intake.wait_idle()
        self.write(records.plain(Kind.IDLE))

    def write(self, data: bytes) -> None:
        if not self.lost:
            self._transport.write(data)

    def _next_number(self) -> int:
        self._number = (self._number + 1) % _NUMBERS
        return self._number

    # -- what classify asks (Front)

    def check_door(self) -> None:
        self.phase.check()
        if self._door.stalled:
            raise threads_stalled()
        self.check_decoder()

    def check_queue(self, priority: Priority) -> None:
        if priority in self._door.full:
            raise queue_full()

    def note_arrival(self, images: int, timeout_s: float, priority: Priority) -> None:
        self.write(records.arrived(images, timeout_s, priority))

    async def submit(
        self,
        pixels: Sequence[Pixels],
        *,
        arrived: float,
        deadline: float,
        max_exit: int | None,
        min_confidence: float | None,
        priority: Priority,
        place: float,
    ) -> Answer:
        if self.lost:
            raise Draining("the server is shutting down", retry_after_s=1)
        slots = self._slots.take(len(pixels))
        if slots is None:
            raise queue_full()
        put(self._memory, slots, pixels)
        number = self._next_number()
        terms = records.Terms(deadline, arrived, place, min_confidence, priority, max_exit)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting[number] = future
        self.write(records.submit(number, slots, terms))
        try:
            return await future
        except asyncio.CancelledError:
            self.write(records.plain(Kind.CANCEL, number))
            raise
        finally:
            del self._waiting[number]

    def note_answer(
        self, pixels: Sequence[Pixels], answer: Answer, total_s: float, *, steered: bool, low: bool
    ) -> None:
        """The engine's process has noted it."""

    # -- other paths

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the engine's process answer."""
        number = self._next_number()
        try:
            if len(self._asked) >= records.MAX_ASKED:
                raise Overloaded(f"{records.MAX_ASKED} requests wait for other paths", retry_after_s=1)
            ask = _ask(scope, number)
        except ServeError as error:
            await _refused(error)(scope, receive, send)
            return
        queue: asyncio.Queue[Record | None] = asyncio.Queue()  # bounded: the other side waits for what it asked
        self._asked[number] = queue
        began = False
        bodies: list[asyncio.Task[None]] = []  # at most one that is not done
        try:
            self.write(ask)
            while not self.lost and (record := await queue.get()) is not None:
                if record.kind == Kind.WANT:  # beside the answer: it may come before the body is there, or wanted
                    bodies = [self._loop.create_task(self._fetch(receive, number))]
                    continue
                message = records.get_document(record)
                if message["type"] in ("end", "broken"):
                    return
                began = True
                await send(_as_message(message))
                if message.get("more_body"):
                    self.write(records.plain(Kind.TAKEN, number))
            if not began:
                await _refused(Draining("The engine's process has ended", retry_after_s=1))(scope, receive, send)
        finally:
            del self._asked[number]
            for fetching in bodies:
                fetching.cancel()

    async def _fetch(self, receive: Receive, number: int) -> None:
        self.write(records.document(Kind.BODY, await _next_part(receive), number))


def _refused(error: ServeError) -> Response:
    request_id = new_request_id()
    response = problem(error, {"request_id": request_id})
    response.headers["x-request-id"] = request_id
    return response


async def _next_part(receive: Receive) -> dict[str, Any]:
    try:
        message = await receive()
    except ServeError as error:
        return {"error": records.described(error)}
    return {**message, "body": message.get("body", b"").decode("latin-1")}


def _as_message(content: dict[str, Any]) -> Message:
    if "headers" in content:
        pairs = content["headers"]
        content["headers"] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
    if "body" in content:
        content["body"] = content["body"].encode("latin-1")
    return content


def _ask(scope: Scope, number: int) -> bytes:
    """Raises HeaderTooLarge."""
    texts = {name: scope[name].decode("latin-1") for name in ("raw_path", "query_string")}
    same = {name: scope[name] for name in ("http_version", "method", "path", "client", "server")}
    try:
        return records.document(Kind.ASK, {**same, **texts, "headers": records.as_text(scope["headers"])}, number)
    except ValueError:
        raise HeaderTooLarge("The header is larger than what can be passed on") from None


class FrontApp:
    """The application of a front end: /classify here, everything else where the engine is."""

    def __init__(self, link: EngineLink, hosts: AllowedHosts) -> None:
        self.state = SimpleNamespace(service=link)
        self._link = link
        self._route = SimpleNamespace(path=PATH)
        self._classify: ASGIApp = thin(classify)
        self._edge = Edge(self._here, metrics=link.counts, clock=link.clock, closing=lambda: link.closing, hosts=hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == PATH and scope["method"] == "POST":
            scope["app"] = self
            await self._edge(scope, receive, send)
        else:
            await self._link.pass_on(scope, receive, send)

    async def _here(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self._route
        await self._classify(scope, receive, send)
