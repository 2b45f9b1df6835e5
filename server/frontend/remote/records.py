"""What a front end and the engine's process say to each other: records over a stream socket, all of known size.

A record is a header, the fixed fields of its kind, and `count` items of that kind's size: slots, answers of images, or
the bytes of a JSON document. Numbers are little-endian. Both ends are of one release, and the version in the header
says so: it is there against mistakes, not for old peers.

The engine's process believes nothing of it. `Reader` raises BadRecord for what is no record, the getters for fields
that cannot be; neither raises anything else, whatever the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import orjson

from server.cascade.scheduler import HIGH, LOW, NORMAL, Priority
from server.core import Answer, ImageResult, OperatingPoint
from server.errors import BY_CODE, InternalError, ServeError
from server.frontend.front import Figures, Phase

VERSION = 1
MAX_DOCUMENT = 8 * 2**20  # bytes: labels of many classes, a body that the application asked for

_HEADER = Struct("<BBxxII")  # version, kind, count, number of the request
MAX_ASKED = 256  # requests of other paths at once, of a front end


class Kind(IntEnum):
    # From a front end
    HELLO = 1  # it is ready
    ARRIVED = 2  # so many images were asked for, whatever becomes of them
    SUBMIT = 3  # a request: its terms, and the slots of its images
    CANCEL = 4  # its client has left
    FIGURES = 5  # the answer to TELL
    IDLE = 6  # no request is left in it, and none will come: it knows that the server drains
    ASK = 7  # another path than /classify: an ASGI scope
    BODY = 8  # what its client sent, as it was asked for by WANT
    TAKEN = 9  # it has sent what REPLY brought
    # From the engine's process
    WELCOME = 32  # what a front end needs to know
    DOOR = 33  # the phase, and what there is no room for
    OPEN = 34  # accept connections
    SHUT = 35  # no more
    FINISH = 36  # end what is open, and the process
    TELL = 37  # how many, how much?
    ANSWER = 38
    ERROR = 39
    FREED = 40  # slots
    WANT = 41  # the next part of a body
    REPLY = 42  # a part of an answer


_ARRIVED = Struct("<dB7x")  # timeout, priority; the count is that of the images
_SUBMIT = Struct("<ddddBB6x")  # deadline, arrived, place, min_confidence or NaN, priority, max_exit or 0
_SLOT = Struct("<I")
_FIGURES = Struct("<IIQdI4x")
_DOOR = Struct("<BBB5x")  # phase, whether the executors have stalled, a bit for each priority that has no room
_ANSWER = Struct("<dQ")  # decided, budget version
_IMAGE = Struct("<ddfBB2x")  # queue, compute, confidence, exit, degraded; the probabilities follow, float32
_DOCUMENTS = (Kind.ASK, Kind.BODY, Kind.WELCOME, Kind.ERROR, Kind.REPLY)

_FIXED = {
    Kind.ARRIVED: _ARRIVED.size,
    Kind.SUBMIT: _SUBMIT.size,
    Kind.FIGURES: _FIGURES.size,
    Kind.DOOR: _DOOR.size,
    Kind.ANSWER: _ANSWER.size,
}
TO_ENGINE = tuple(kind for kind in Kind if kind < Kind.WELCOME)
TO_FRONT_END = tuple(kind for kind in Kind if kind >= Kind.WELCOME)
_PHASES = tuple(Phase)
_FLOAT = np.dtype("<f4")
_IS_ANSWER = int(Kind.ANSWER)  # the enumeration is slow to look things up in
PRIORITIES: tuple[Priority, ...] = (HIGH, NORMAL, LOW)


class BadRecord(Exception):
    """What no peer of ours sends."""


class Record(NamedTuple):
    kind: int
    items: int  # how many
    number: int  # of the request
    data: bytes  # behind the header


class Reader:
    """Bytes to records, as they come."""

    def __init__(self, kinds: Sequence[Kind], *, classes: int = 0, max_items: int) -> None:
        """`kinds`: those that the peer sends; `max_items`: at most so many slots, or answers, in a record."""
        items = {Kind.SUBMIT: _SLOT.size, Kind.FREED: _SLOT.size, Kind.ANSWER: _IMAGE.size + 4 * classes}
        items |= dict.fromkeys(_DOCUMENTS, 1)
        # By kind: bytes of the fixed fields and of an item, and the most items.
        self._sizes = {
            int(kind): (_FIXED.get(kind, 0), items.get(kind, 0), MAX_DOCUMENT if kind in _DOCUMENTS else max_items)
            for kind in kinds
        }
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Record]:
        """The records that are there whole. Raises BadRecord, and is of no use then."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while at + 12 <= end:
            version, kind, count, number = _HEADER.unpack_from(data, at)
            sizes = self._sizes.get(kind)
            if version != VERSION or sizes is None:
                raise BadRecord(f"version {version}, kind {kind}")
            fixed, item, most = sizes
            if count > most:
                raise BadRecord(f"{count} items of kind {kind}")
            until = at + 12 + fixed + item * count
            if until > end:
                break
            yield Record(kind, count, number, data[at + 12 : until])
            at = until
        self._rest = data[at:]


def plain(kind: Kind, number: int = 0) -> bytes:
    return _HEADER.pack(VERSION, kind, 0, number)


# --- from a front end -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request asks for, besides its images."""

    deadline: float
    arrived: float  # when its body was there
    place: float
    min_confidence: float | None
    priority: Priority
    max_exit: int | None

    @property
    def steered(self) -> bool:
        return self.max_exit is not None or self.min_confidence is not None


def arrived(images: int, timeout_s: float, priority: Priority) -> bytes:
    return _HEADER.pack(VERSION, Kind.ARRIVED, images, 0) + _ARRIVED.pack(timeout_s, priority)


def get_arrived(record: Record) -> tuple[int, float, Priority]:
    timeout_s, priority = _ARRIVED.unpack(record.data)
    if not (0 < timeout_s < math.inf and record.items):
        raise BadRecord("images that cannot have arrived")
    return record.items, timeout_s, _priority(priority)


def submit(number: int, slots: Sequence[int], terms: Terms) -> bytes:
    confidence = math.nan if terms.min_confidence is None else terms.min_confidence
    return b"".join(
        (
            _HEADER.pack(VERSION, Kind.SUBMIT, len(slots), number),
            _SUBMIT.pack(terms.deadline, terms.arrived, terms.place, confidence, terms.priority, terms.max_exit or 0),
            np.array(slots, "<u4").tobytes() if len(slots) > 1 else _SLOT.pack(slots[0]),
        )
    )


def get_submit(record: Record, exits: int) -> tuple[list[int], Terms]:
    """Whether the slots may be used is for their owner to say."""
    deadline, arrived, place, confidence, priority, max_exit = _SUBMIT.unpack_from(record.data)
    if not (math.isfinite(deadline) and math.isfinite(arrived) and 0 <= place < 1 and max_exit <= exits):
        raise BadRecord("terms that no request has")
    if not (confidence != confidence or 0 <= confidence <= 1):
        raise BadRecord("a confidence that is none")
    terms = Terms(
        deadline,
        arrived,
        place,
        None if confidence != confidence else confidence,
        _priority(priority),
        max_exit or None,
    )
    return _slots(record, _SUBMIT.size), terms


def _priority(number: int) -> Priority:
    if number not in PRIORITIES:
        raise BadRecord(f"priority {number}")
    return PRIORITIES[number]


def _slots(record: Record, at: int) -> list[int]:
    if record.items == 1:  # as a rule
        return [int.from_bytes(record.data[at : at + 4], "little")]
    slots: list[int] = np.frombuffer(record.data, "<u4", record.items, at).tolist()
    if not slots:
        raise BadRecord("no slots")
    return slots


def figures(of: Figures) -> bytes:
    return _HEADER.pack(VERSION, Kind.FIGURES, 0, 0) + _FIGURES.pack(
        of.connections, of.requests, of.held_bytes, of.decode_age_s, of.decodes_stalled
    )


def get_figures(record: Record) -> Figures:
    found = Figures(*_FIGURES.unpack(record.data))
    if not 0 <= found.decode_age_s < math.inf:
        raise BadRecord("an age that is none")
    return found


# --- from the engine's process ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Door:
    """What a front end must know to refuse at once."""

    phase: Phase = Phase.STARTING
    stalled: bool = False
    full: tuple[Priority, ...] = ()  # the queue has no room for these


def door(of: Door) -> bytes:
    bits = sum(1 << priority for priority in of.full)
    return _HEADER.pack(VERSION, Kind.DOOR, 0, 0) + _DOOR.pack(_PHASES.index(of.phase), of.stalled, bits)


def get_door(record: Record) -> Door:
    phase, stalled, bits = _DOOR.unpack(record.data)
    if phase >= len(_PHASES):
        raise BadRecord(f"phase {phase}")
    return Door(_PHASES[phase], bool(stalled), tuple(one for one in PRIORITIES if bits >> one & 1))


def answer(number: int, of: Answer) -> bytes:
    parts = [_HEADER.pack(VERSION, _IS_ANSWER, len(of.results), number) + _ANSWER.pack(of.decided, of.point.version)]
    for one in of.results:
        parts.append(_IMAGE.pack(one.queue_s, one.compute_s, one.confidence, one.exit, one.degraded))
        probabilities = one.probabilities
        if probabilities.dtype != _FLOAT:
            probabilities = probabilities.astype(_FLOAT)
        parts.append(probabilities.tobytes())
    return b"".join(parts)


def get_answer(record: Record, exits: int) -> Answer:
    """What an answer is shaped from; of its operating point only the version, and no earlier confidences."""
    data = record.data
    decided, version = _ANSWER.unpack_from(data)
    at, size = _ANSWER.size, (len(data) - _ANSWER.size) // max(1, record.items)
    results = []
    for _ in range(record.items):
        queue_s, compute_s, confidence, exit_, degraded = _IMAGE.unpack_from(data, at)
        if not 1 <= exit_ <= exits:
            raise BadRecord(f"exit {exit_}")
        probabilities = np.frombuffer(data, "<f4", (size - _IMAGE.size) // 4, at + _IMAGE.size)
        results.append(ImageResult(probabilities, exit_, confidence, bool(degraded), queue_s, compute_s, ()))
        at += size
    return Answer(OperatingPoint(version, ()), tuple(results), decided)


def freed(slots: Sequence[int]) -> bytes:
    return _HEADER.pack(VERSION, Kind.FREED, len(slots), 0) + np.array(slots, "<u4").tobytes()


def get_freed(record: Record) -> list[int]:
    return _slots(record, 0)


# --- documents --------------------------------------------------------------------------------------------------------


def document(kind: Kind, content: Mapping[str, Any], number: int = 0) -> bytes:
    """Raises ValueError for one that is too large."""
    data = orjson.dumps(content)
    if len(data) > MAX_DOCUMENT:
        raise ValueError(f"a document of {len(data)} bytes")
    return _HEADER.pack(VERSION, kind, len(data), number) + data


def get_document(record: Record) -> dict[str, Any]:
    try:
        found = orjson.loads(record.data)
    except ValueError as error:
        raise BadRecord(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRecord("no JSON object")
    return found


def as_text(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def error(number: int, of: ServeError) -> bytes:
    return document(Kind.ERROR, described(of), number)


def described(error: ServeError) -> dict[str, Any]:
    return {"code": error.code, "detail": error.detail, "extra": error.extra}


def as_error(description: Mapping[str, Any]) -> ServeError:
    error = BY_CODE.get(str(description.get("code")), InternalError)(str(description.get("detail")))
    if isinstance(extra := description.get("extra"), dict):
        error.extra = extra
    return error
