"""Figures add up, whatever happened; and they say when not to trust them."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.figures import doubts, figures
from server.bench.orders import IMAGE, Body, Client, Log, Outcome, merge

BODIES = (Body(b"", "image/png", ("cat",)), Body(b"", "image/png", (None,)))

requests = st.lists(
    st.tuples(
        st.floats(0, 2),  # due
        st.floats(0, 0.01),  # late
        st.floats(0.001, 3),  # took
        st.sampled_from(Outcome),
        st.sampled_from(Client),
        st.integers(0, 1),  # body
        st.integers(1, 3),  # exit
        st.booleans(),  # right
    ),
    max_size=60,
)


def log_of(rows: list[tuple]) -> Log:
    rows = sorted(rows)
    due, late, took, outcome, kind, body, exit_, right = (
        np.array(column) for column in (zip(*rows, strict=True) if rows else [[]] * 8)
    )
    outcome, kind, body = (column.astype(np.int64) for column in (outcome, kind, body))
    answered = np.flatnonzero(outcome == Outcome.ANSWERED)
    known = np.where(body == 0, right, -1)
    images = [
        (n, exit_[n], 0, known[n], 0.1, 1.0, 2.0, 3.0)  # as IMAGE
        for n in answered
    ]
    return Log(
        due=due.astype(float),
        late=late.astype(float),
        took=np.where(outcome == Outcome.ANSWERED, took.astype(float), np.nan),
        outcome=outcome,
        kind=kind,
        body=body,
        error=np.where(outcome == Outcome.ANSWERED, -1, 0),
        errors=("broken",),
        images=np.array(images, dtype=float).reshape(-1, len(IMAGE)),
        planned=len(rows) + 3,
        seconds=2.0,
        cpu_s=0.01,
    )


@given(rows=requests, warm_up=st.sampled_from([0.0, 0.5]), timeout_ms=st.sampled_from([None, 500.0]))
def test_counts_are_conserved(rows: list[tuple], warm_up: float, timeout_ms: float | None) -> None:
    log = log_of(rows)
    document = figures(log, BODIES, warm_up=warm_up, seconds=1.5, timeout_ms=timeout_ms)
    counts = document["requests"]
    names = [outcome.name.lower() for outcome in Outcome]
    for of in (counts, *document["odd_clients"].values()):
        assert of["sent"] == sum(of[name] for name in names)
    odd = sum(of["sent"] for of in document["odd_clients"].values())
    assert counts["planned"] == counts["unsent"] + counts["warm_up"] + counts["sent"] + odd
    assert counts["answered"] == counts["in_time"] + counts["late"] == document["latency_ms"]["all"]["count"]
    assert counts["late"] == 0 or timeout_ms is not None
    images = document["images"]
    assert images["answered"] == sum(images["by_exit"].values()) == counts["answered"]
    assert images["sent"] == counts["sent"] >= images["labelled"] >= images["correct"] >= images["correct_in_time"]
    assert sum(of["count"] for of in document["latency_ms"]["by_exit"].values()) == counts["answered"]
    assert sum(document["errors"].values()) == counts["sent"] - counts["answered"]
    orjson.dumps(document)


@given(rows=requests, cut=st.integers(0, 60))
def test_two_senders_say_what_one_would(rows: list[tuple], cut: int) -> None:
    def told(log: Log) -> dict:
        document = figures(log, BODIES, warm_up=0.5, seconds=1.5, timeout_ms=500)
        del document["driver"], document["requests"]["planned"], document["requests"]["unsent"]
        return document

    rows = sorted(rows)
    assert told(merge([log_of(rows[:cut]), log_of(rows[cut:])])) == told(log_of(rows))


def test_percentiles_are_those_of_answers() -> None:
    rows = [
        (0.1 + n / 1000, 0.0, (n + 1) / 1000, Outcome.ANSWERED, Client.PLAIN, 0, 1 + n % 2, True) for n in range(1000)
    ]
    latency = figures(log_of(rows), BODIES, warm_up=0, seconds=2)["latency_ms"]
    assert latency["all"]["p50"] == pytest.approx(500, abs=1)
    assert latency["all"]["p99.9"] == pytest.approx(999, abs=1)
    assert latency["all"]["max"] == pytest.approx(1000)
    assert latency["by_exit"]["1"]["max"] == pytest.approx(999)


@pytest.mark.parametrize(
    ("late", "ceiling", "says"),
    [
        (0.0005, 10_000, None),
        (0.030, 10_000, "the driver was late by p99 30.0 ms (limit 10.0)"),
        (0.0005, 100, None),
        (0.0005, 60, "83% of what the driver can send"),
    ],
)
def test_a_driver_that_limits_is_told(late: float, ceiling: float, says: str | None) -> None:
    rows = [(n / 50, late, 0.1, Outcome.ANSWERED, Client.PLAIN, 0, 1, True) for n in range(100)]
    document = figures(log_of(rows), BODIES, warm_up=0, seconds=2)
    document["driver"]["ceiling_per_s"] = ceiling
    found = doubts(document)
    assert found == [] if says is None else says in found[0]


def test_what_the_driver_lacks_is_not_put_down_to_the_server() -> None:
    document = figures(log_of([]), BODIES, warm_up=0, seconds=1)
    document["errors"] = {"too many open files": 7, "connection refused": 3}
    assert doubts(document) == ["7 requests failed for the driver's own sake: too many open files"]
