"""The engine's end of the socket to one front end.

Requests go into the batcher as those of this process do; their pixels are read where the front end has put them. A slot
is given back when nothing here holds its pixels any more: not the scheduler, not a batch that is in the engine, not an
audit. An array that is gone tells by itself, so no order of events can make one of them read another image's pixels.

What other paths than /classify ask goes to the application of this process, as ASGI over records: there is one budget,
one page of metrics, one console, whoever was asked.

Nothing that a front end sends is believed. Whatever cannot be ends the link, and with it the front end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message

from server.cascade.scheduler import LOW, Request
from server.core import Answer, Pixels
from server.errors import ServeError
from server.frontend.front import Figures, Phase
from server.frontend.remote import records
from server.frontend.remote.counts import CountsRead
from server.frontend.remote.memory import SharedMemory
from server.frontend.remote.records import BadRecord, Kind, Record

if TYPE_CHECKING:
    from server.service import Service

log = logging.getLogger(__name__)

_SUBMIT, _ARRIVED = int(Kind.SUBMIT), int(Kind.ARRIVED)
_FREED_S = 0.005  # so long slots may wait to be given back together
_PAST_S = 3600.0  # no request has been in a server for longer
_FUTURE_S = 1.0


class _Held(weakref.ref[Pixels]):
    """The pixels of one slot, for as long as anybody has them."""

    __slots__ = ("slot",)
    slot: int


class _Waiter:
    """A request in the batcher, and what is to be told when it ends (`batcher.Waiter`)."""

    __slots__ = ("_link", "number", "pixels", "request", "terms")

    def __init__(self, link: Link, number: int, pixels: list[Pixels], terms: records.Terms) -> None:
        self._link = link
        self.number = number
        self.pixels = pixels
        self.terms = terms
        self.request: Request | None = None

    def done(self) -> bool:
        return self._link.waiting.get(self.number) is not self

    def set_result(self, answer: Answer, /) -> None:
        self._link.answered(self, answer)

    def set_exception(self, error: ServeError, /) -> None:
        self._link.failed(self, error)


class Link(asyncio.Protocol):
    """`changed` is called whenever what there is room for may have changed."""

    def __init__(
        self, service: Service, app: ASGIApp, memory: SharedMemory, welcome: bytes, changed: Callable[[], None]
    ) -> None:
        self._service = service
        self._app = app
        self._memory = memory
        self._welcome = welcome
        self._changed = changed
        self._ended: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._max_images = service.settings.max_images
        self._longest_s = service.settings.max_timeout_ms / 1000 + _FUTURE_S
        self._reader = records.Reader(records.TO_ENGINE, max_items=self._max_images)
        self.waiting: dict[int, _Waiter] = {}
        self._asked: dict[int, _Asked] = {}
        self._held: dict[int, _Held] = {}  # slots whose pixels somebody has
        self._freed: list[int] = []  # to be told
        self._freed_is_due = False
        self._behind: list[tuple[_Waiter, Answer]] = []  # answered in this turn of the loop
        self._counts = CountsRead(memory.cells)
        self._told: asyncio.Future[None] | None = None  # while figures are asked for
        self.silent_since = math.inf  # when they were asked for, until they come
        self._gone = False
        self.figures = Figures()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.idle: asyncio.Future[None] = self._loop.create_future()

    # -- the transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a socket's
        self._transport = transport
        self.write(self._welcome)

    def data_received(self, data: bytes) -> None:
        try:
            for record in self._reader.feed(data):
                self._take(record)
        except BadRecord as error:
            log.error("a front end said what cannot be, and is ended: %s", error)
            self._transport.abort()
        self._changed()

    def connection_lost(self, _: Exception | None) -> None:
        self._gone = True
        self.take_counts()
        waiting, self.waiting = self.waiting, {}
        for waiter in waiting.values():
            if waiter.request is not None:
                self._service.batcher.withdraw(waiter.request)
        for asked in self._asked.values():
            asked.left()
        self.figures = Figures()
        for future in (self._told, self.ready, self.idle):
            if future is not None and not future.done():
                future.set_result(None)
        self.silent_since = math.inf
        self._ended()

    # -- what the fleet asks of it

    def write(self, data: bytes) -> None:
        if not self._gone:
            self._transport.write(data)

    def abort(self) -> None:
        self._transport.abort()

    def at_end(self, then: Callable[[], None]) -> None:
        """Do this when the other side is gone, or was sent away."""
        self._ended = then

    @property
    def is_ready(self) -> bool:
        return self.ready.done() and not self._gone

    async def refresh(self) -> None:
        """Ask for the figures; the counts are there. Where this is cancelled, those of before stand."""
        self.take_counts()
        if not self.is_ready:
            return
        if self._told is None:
            self._told = self._loop.create_future()
            self.silent_since = time.monotonic()
            self.write(records.plain(Kind.TELL))
        await asyncio.shield(self._told)
        self.take_counts()

    def take_counts(self) -> None:
        self._service.metrics.add(self._counts.take())

    # -- records

    def _take(self, record: Record) -> None:
        """Raises BadRecord."""
        if self._gone or self._transport.is_closing():
            return
        kind = record.kind
        if kind == _SUBMIT:
            self._submit(record)
        elif kind == _ARRIVED:
            images, timeout_s, priority = records.get_arrived(record)
            if timeout_s > self._longest_s:
                raise BadRecord(f"a timeout of {timeout_s} s")
            self._service.note_arrival(images, timeout_s, priority)
        elif kind == Kind.CANCEL:
            waiter = self.waiting.pop(record.number, None)  # none: its answer is on the way
            if waiter is not None and waiter.request is not None:
                self._service.batcher.withdraw(waiter.request)
        elif kind == Kind.ASK:
            self._ask(record)
        elif kind in (Kind.BODY, Kind.TAKEN):
            if (asked := self._asked.get(record.number)) is not None:
                asked.heard(record)
        elif kind == Kind.FIGURES:
            self.figures = records.get_figures(record)
            if self._told is not None:
                self._told.set_result(None)
                self._told = None
                self.silent_since = math.inf
        elif kind == Kind.IDLE:
            if not self.idle.done():
                self.idle.set_result(None)
        elif kind == Kind.HELLO and not self.ready.done():
            self.ready.set_result(None)

    def _submit(self, record: Record) -> None:
        slots, terms = records.get_submit(record, self._service.exits)
        if self._service.phase is Phase.STARTING:
            raise BadRecord("a request before the start")
        now = self._service.clock()
        if not (now - _PAST_S < terms.arrived <= now + _FUTURE_S and terms.deadline <= now + self._longest_s):
            raise BadRecord("times that cannot be")
        if record.number in self.waiting:
            raise BadRecord(f"request {record.number} is there already")
        waiter = _Waiter(self, record.number, [self._hold(slot) for slot in slots], terms)
        self.waiting[record.number] = waiter
        try:
            waiter.request = self._service.batcher.enter(
                waiter.pixels,
                waiter,
                deadline=terms.deadline,
                max_exit=terms.max_exit,
                min_confidence=terms.min_confidence,
                priority=terms.priority,
                place=terms.place,
            )
        except ServeError as error:
            waiter.set_exception(error)

    def _hold(self, slot: int) -> Pixels:
        if slot in self._held or slot >= len(self._memory.pixels):
            raise BadRecord(f"slot {slot} is not the front end's to give")
        pixels: Pixels = self._memory.pixels[slot]
        held = _Held(pixels, self._let_go)
        held.slot = slot
        self._held[slot] = held
        return pixels

    def _let_go(self, held: _Held) -> None:
        """Nobody has these pixels any more. Called wherever the last one let go of them, so by any thread."""
        if threading.get_ident() != self._thread and not self._gone:
            self._loop.call_soon_threadsafe(self._free, held.slot)
        else:
            self._free(held.slot)

    def _free(self, slot: int) -> None:
        del self._held[slot]
        self._freed.append(slot)
        if not self._freed_is_due and not self._gone:
            self._freed_is_due = True
            self._loop.call_later(_FREED_S, self._tell_freed)

    def _tell_freed(self) -> None:
        self._freed_is_due = False
        freed, self._freed = self._freed, []
        for at in range(0, len(freed), self._max_images):
            self.write(records.freed(freed[at : at + self._max_images]))

    def failed(self, waiter: _Waiter, error: ServeError) -> None:
        del self.waiting[waiter.number]
        self.write(records.error(waiter.number, error))
        self._changed()

    def answered(self, waiter: _Waiter, answer: Answer) -> None:
        del self.waiting[waiter.number]
        self.write(records.answer(waiter.number, answer))
        self._behind.append((waiter, answer))
        if len(self._behind) == 1:
            self._loop.call_soon(self._note_answers)
            self._changed()

    def _note_answers(self) -> None:
        """When the answers are on their way: what they say may move the budget, and that the batcher."""
        behind, self._behind = self._behind, []
        now = self._service.clock()
        for waiter, answer in behind:
            terms = waiter.terms
            self._service.note_answer(
                waiter.pixels, answer, now - terms.arrived, steered=terms.steered, low=terms.priority == LOW
            )

    # -- other paths

    def _ask(self, record: Record) -> None:
        if record.number in self._asked or len(self._asked) >= 2 * records.MAX_ASKED:
            raise BadRecord(f"request {record.number} cannot be asked")
        asked = _Asked(self, record.number, _scope(records.get_document(record)))
        self._asked[record.number] = asked
        task = self._loop.create_task(asked.run(self._app))
        asked.task = task
        task.add_done_callback(lambda _: self._asked.pop(record.number, None))


class _Asked:
    """One request of another path, as ASGI has it."""

    def __init__(self, link: Link, number: int, scope: dict[str, Any]) -> None:
        self._link = link
        self._number = number
        self._scope = scope
        self._awaited: dict[Kind, asyncio.Future[Record]] = {}  # by `receive` and `send`
        self._left = False
        self.task: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self._receive, self._send)
            end: dict[str, Any] = {"type": "end"}
        except Exception:
            log.debug("a request was not answered", exc_info=True)  # the application has logged what is ours
            end = {"type": "broken"}
        self._link.write(records.document(Kind.REPLY, end, self._number))

    def heard(self, record: Record) -> None:
        future = self._awaited.get(Kind(record.kind))
        if future is not None and not future.done():  # else who asked has been cancelled
            future.set_result(record)

    def left(self) -> None:
        """The front end has gone."""
        self._left = True
        for future in self._awaited.values():
            future.cancel()

    async def _hear(self, kind: Kind) -> Record | None:
        """None where the front end has gone."""
        if self._left:
            return None
        future = self._awaited[kind] = asyncio.get_running_loop().create_future()
        await asyncio.wait([future])
        del self._awaited[kind]
        return None if future.cancelled() else future.result()

    async def _receive(self) -> Message:
        self._link.write(records.plain(Kind.WANT, self._number))
        record = await self._hear(Kind.BODY)
        if record is None:
            return {"type": "http.disconnect"}
        try:
            found = records.get_document(record)
        except BadRecord:
            self._link.abort()
            return {"type": "http.disconnect"}
        if "error" in found:
            raise records.as_error(found["error"] if isinstance(found["error"], dict) else {})
        if found.get("type") != "http.request":
            return {"type": "http.disconnect"}
        body = str(found.get("body", "")).encode("latin-1", "replace")
        return {"type": "http.request", "body": body, "more_body": bool(found.get("more_body"))}

    async def _send(self, message: Message) -> None:
        content: dict[str, Any] = {**message}
        if "headers" in content:
            content["headers"] = [
                (name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]
            ]
        if "body" in content:
            content["body"] = bytes(message["body"]).decode("latin-1")
        self._link.write(records.document(Kind.REPLY, content, self._number))
        if content.get("more_body"):  # not more of it than the client takes
            await self._hear(Kind.TAKEN)


def _scope(of: dict[str, Any]) -> dict[str, Any]:
    """Raises BadRecord."""
    try:
        client = of["client"]
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": str(of["http_version"]),
            "scheme": "http",
            "root_path": "",
            "method": str(of["method"]),
            "path": str(of["path"]),
            "raw_path": str(of["raw_path"]).encode("latin-1"),
            "query_string": str(of["query_string"]).encode("latin-1"),
            "headers": [(str(name).encode("latin-1"), str(value).encode("latin-1")) for name, value in of["headers"]],
            "client": (str(client[0]), int(client[1])) if client else None,
            "server": (str(of["server"][0]), int(of["server"][1])) if of["server"] else None,
            "state": {},
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadRecord(f"no scope: {error}") from None
