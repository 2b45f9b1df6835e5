"""What front ends and the engine's process say to each other: it comes back as it was, and garbage is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cascade.scheduler import HIGH, LOW, NORMAL
from server.core import Answer, ImageResult, OperatingPoint
from server.errors import BY_CODE, BadImage, Overloaded
from server.frontend.front import Figures, Phase
from server.frontend.remote import records
from server.frontend.remote.records import BadRecord, Kind, Reader, Record

CLASSES, MAX_IMAGES, EXITS = 3, 8, 3
numbers = st.integers(0, 2**32 - 1)
times = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1, exclude_max=True)


def reader(kinds: tuple[Kind, ...]) -> Reader:
    return Reader(kinds, classes=CLASSES, max_items=MAX_IMAGES)


def read(data: bytes) -> list[Record]:
    return list(reader(tuple(Kind)).feed(data))


def get(record: Record) -> Any:
    """As whoever takes it does."""
    kind = record.kind
    if kind == Kind.SUBMIT:
        return records.get_submit(record, EXITS)
    if kind == Kind.ANSWER:
        return records.get_answer(record, EXITS)
    one = {
        Kind.ARRIVED: records.get_arrived,
        Kind.FIGURES: records.get_figures,
        Kind.DOOR: records.get_door,
        Kind.FREED: records.get_freed,
    }
    if kind in one:
        return one[Kind(kind)](record)
    return records.get_document(record) if record.items else None


terms = st.builds(
    records.Terms,
    deadline=times,
    arrived=times,
    place=shares,
    min_confidence=st.none() | st.floats(0, 1),
    priority=st.sampled_from(records.PRIORITIES),
    max_exit=st.none() | st.integers(1, EXITS),
)


@given(numbers, st.lists(numbers, min_size=1, max_size=MAX_IMAGES), terms)
def test_a_request_comes_as_it_was_sent(number: int, slots: list[int], terms: records.Terms) -> None:
    (record,) = read(records.submit(number, slots, terms))
    assert (record.number, get(record)) == (number, (slots, terms))


results = st.builds(
    ImageResult,
    probabilities=st.lists(st.floats(0, 1, width=32), min_size=CLASSES, max_size=CLASSES).map(
        lambda values: np.array(values, np.float32)
    ),
    exit=st.integers(1, EXITS),
    confidence=st.floats(0, 1, width=32),
    degraded=st.booleans(),
    queue_s=times,
    compute_s=times,
    confidences=st.just(()),
)


@given(numbers, st.lists(results, min_size=1, max_size=MAX_IMAGES), times, st.integers(0, 2**63))
def test_an_answer_comes_as_it_was_sent(number: int, results: list[ImageResult], decided: float, version: int) -> None:
    (record,) = read(records.answer(number, Answer(OperatingPoint(version, (0.5, 0.0)), tuple(results), decided)))
    answer = get(record)
    assert (record.number, answer.decided, answer.point.version) == (number, decided, version)
    for came, sent in zip(answer.results, results, strict=True):
        assert came.probabilities.tolist() == sent.probabilities.tolist()
        for name in ("exit", "confidence", "degraded", "queue_s", "compute_s"):
            assert getattr(came, name) == getattr(sent, name)


@given(st.builds(Figures, numbers, numbers, st.integers(0, 2**64 - 1), st.floats(0, 1e9), numbers))
def test_figures_come_as_they_were_sent(figures: Figures) -> None:
    assert [get(record) for record in read(records.figures(figures))] == [figures]


@given(
    st.builds(
        records.Door,
        st.sampled_from(Phase),
        st.booleans(),
        st.sets(st.sampled_from(records.PRIORITIES)).map(lambda full: tuple(sorted(full))),
    )
)
def test_the_door_comes_as_it_was_sent(door: records.Door) -> None:
    assert [get(record) for record in read(records.door(door))] == [door]


def test_an_error_keeps_its_kind_its_cause_and_what_else_a_client_is_told() -> None:
    (record,) = read(records.error(7, Overloaded("full", retry_after_s=3)))
    error = records.as_error(records.get_document(record))
    assert (record.number, type(error), error.detail, error.extra) == (7, Overloaded, "full", {"retry_after_s": 3})


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_that_a_client_can_be_told_has_a_code_of_its_own(code: str) -> None:
    assert type(records.as_error({"code": code, "detail": "x", "extra": {"detail": "no argument"}})) is BY_CODE[code]


MANY = b"".join(
    [
        records.plain(Kind.HELLO),
        records.arrived(3, 0.5, LOW),
        records.submit(1, [4, 5], records.Terms(9.0, 8.0, 0.25, None, NORMAL, 2)),
        records.document(Kind.ASK, {"path": "/budget"}, 2),
        records.submit(3, [6], records.Terms(9.0, 8.0, 0.0, 0.5, HIGH, None)),
        records.plain(Kind.CANCEL, 1),
    ]
)


@given(st.lists(st.integers(0, len(MANY)), max_size=8))
def test_it_makes_no_difference_in_what_pieces_bytes_come(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(MANY)]
    slow = reader(records.TO_ENGINE)
    pieces = [record for start, end in pairwise(at) for record in slow.feed(MANY[start:end])]
    assert pieces == read(MANY)
    assert len(pieces) == 6


def take(data: bytes, kinds: tuple[Kind, ...]) -> None:
    try:
        for record in reader(kinds).feed(data):
            get(record)
    except BadRecord:
        pass  # and nothing else


@given(st.binary(max_size=200))
def test_bytes_that_are_no_records_are_refused_or_waited_for(data: bytes) -> None:
    take(data, tuple(Kind))


@given(st.sampled_from(Kind), st.integers(0, MAX_IMAGES), numbers, st.binary(min_size=600, max_size=600))
def test_records_with_any_content_are_refused_or_taken(kind: Kind, count: int, number: int, content: bytes) -> None:
    header = bytes([records.VERSION, kind, 0, 0]) + count.to_bytes(4, "little") + number.to_bytes(4, "little")
    take(header + content, (kind,))


@given(st.data())
def test_one_wrong_byte_is_refused_or_makes_another_record(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(MANY) - 1))
    take(MANY[:at] + bytes([data.draw(st.integers(0, 255))]) + MANY[at + 1 :], records.TO_ENGINE)


@pytest.mark.parametrize(
    "bad",
    [
        records.submit(1, [1], records.Terms(math.inf, 0.0, 0.0, None, NORMAL, None)),
        records.submit(1, [1], records.Terms(math.nan, 0.0, 0.0, None, NORMAL, None)),
        records.submit(1, [1], records.Terms(1.0, math.nan, 0.0, None, NORMAL, None)),
        records.submit(1, [1], records.Terms(1.0, 0.0, 1.0, None, NORMAL, None)),
        records.submit(1, [1], records.Terms(1.0, 0.0, math.nan, None, NORMAL, None)),
        records.submit(1, [1], records.Terms(1.0, 0.0, 0.0, 1.5, NORMAL, None)),
        records.submit(1, [1], records.Terms(1.0, 0.0, 0.0, None, 3, None)),
        records.submit(1, [1], records.Terms(1.0, 0.0, 0.0, None, NORMAL, 4)),
        records.submit(1, list(range(MAX_IMAGES + 1)), records.Terms(1.0, 0.0, 0.0, None, NORMAL, None)),
        records.arrived(0, 1.0, NORMAL),
        records.arrived(1, -1.0, NORMAL),
        records.arrived(1, math.nan, NORMAL),
        records.figures(Figures(decode_age_s=math.inf)),
        records.plain(Kind.DOOR),  # of the other direction
        b"\x02" + records.plain(Kind.HELLO)[1:],  # of another version
    ],
)
def test_what_no_request_has_is_refused(bad: bytes) -> None:
    with pytest.raises(BadRecord):
        take_all(bad + bytes(64))


def take_all(data: bytes) -> None:
    for record in reader(records.TO_ENGINE).feed(data):
        get(record)


def test_a_bad_image_is_told_with_its_index() -> None:
    error = BadImage("no image", reason="no image", index=2)
    (record,) = read(records.document(Kind.BODY, {"error": records.described(error)}))
    assert records.as_error(records.get_document(record)["error"]).extra == {"reason": "no image", "index": 2}
