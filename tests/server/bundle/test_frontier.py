"""A frontier finds the best row in reach, survives its file, and mixes its rows."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cascades import synthetic
from server.bundle.frontier import Frontier, FrontierRow, Mixture, _digest, upper_hull, wilson_lower, with_ms
from server.calibration.sweep import sweep

GMACS = (0.47, 1.1, 2.31)


def solved(samples: int, seed: int = 0, **how: Any) -> Frontier:
    records = synthetic(samples, seed)
    return sweep(records.confidence, records.correct, GMACS, **how)


def test_json_gives_the_same_frontier_back_and_stays_small() -> None:
    frontier = solved(30_000, key="v/fp32/resize72")
    text = frontier.to_json()
    assert len(text) < 300_000
    again = Frontier.from_json(text)
    assert again == frontier
    assert again.to_json() == text
    thresholds = (0.8123, 0.6)
    assert again.predict(thresholds) == frontier.predict(thresholds)


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("format_version", 2, "format version 2"),
        ("rows", [], "no rows"),
        ("rows", None, "not a frontier"),
        ("stage_gmacs", [0.1, 0.2], "records: sizes do not fit|does not have 2 thresholds"),
        ("exit_accuracy", [0.5], "exit_accuracy"),
        ("stage_gmacs", [0.1, 0.2, 0.2], "do not rise from above 0"),
        ("stage_gmacs", [0.0, 0.2, 0.3], "do not rise from above 0"),
        ("source", "hearsay", "source 'hearsay' is none of calibration, imported"),
        ("records", {"count": 3, "confidence": "AAAA", "correct": "AA=="}, "."),
    ],
)
def test_a_file_that_is_no_frontier_is_refused_with_its_cause(name: str, value: object, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Frontier.from_json(changed(solved(50), **{name: value}))


def changed(frontier: Frontier, **values: object) -> str:
    """Its document with other values, and the hash of those."""
    document = json.loads(frontier.to_json()) | values
    document["sha256"] = _digest({name: value for name, value in document.items() if name != "sha256"})
    return json.dumps(document)


def test_what_was_changed_since_the_calibration_is_refused() -> None:
    text = solved(50).to_json()
    for digit in re.finditer(r"[0-9]", text):
        flipped = text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]
        if json.loads(flipped) != json.loads(text):  # beyond a double's digits
            with pytest.raises(ValueError, match=r"sha256|JSON|format version"):
                Frontier.from_json(flipped)
    document = json.loads(text)
    assert Frontier.from_json(json.dumps(document, indent=3)) == solved(50), "how it is laid out says nothing"
    del document["sha256"]
    with pytest.raises(ValueError, match="dvt calibrate"):
        Frontier.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "value",
    [10**400, "1e400", float("nan"), [[]], {}, None, "x", [10**400], [None], -1, True],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize(
    "name", ["rows", "samples", "stage_gmacs", "exit_accuracy", "records", "certificate", "format_version"]
)
def test_whatever_stands_in_a_field_is_a_frontier_or_refused_in_one_line(name: str, value: object) -> None:
    document = json.loads(solved(50).to_json()) | {name: value}
    del document["sha256"]
    try:
        document["sha256"] = _digest(document)
    except TypeError:  # not even a document that could have been written
        document["sha256"] = ""
    if (name, value) in (("certificate", None), ("records", None)):
        Frontier.from_json(json.dumps(document))
        return
    with pytest.raises(ValueError, match=r"^.{5,300}$"):
        Frontier.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, "", "\ufeff{}", "{" * 1000, '"' + "x" * 10_000 + '"', "null"]
)
def test_what_is_no_document_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|not a frontier") as refused:
        Frontier.from_json(text)
    assert len(str(refused.value)) < 300


def test_a_frontier_without_records_says_nothing_of_thresholds_that_are_not_its_rows() -> None:
    calibrated = solved(50)
    assert calibrated.source == "calibration"
    rows = tuple(replace(row, accuracy_lower=None) for row in calibrated.rows)
    frontier = replace(calibrated, rows=rows, samples=0, records=None, source="imported")
    again = Frontier.from_json(frontier.to_json())
    assert again == frontier
    assert again.predict([0.5, 0.5]) is None
    assert again.by_gmacs(1.0) == frontier.by_gmacs(1.0)


def test_rows_out_of_order_or_not_finite_are_refused() -> None:
    rows = json.loads(solved(50).to_json())["rows"]
    with pytest.raises(ValueError, match="do not rise"):
        Frontier.from_json(changed(solved(50), rows=rows[::-1]))
    with pytest.raises(ValueError, match="row 0 costs nothing"):
        Frontier.from_json(changed(solved(50), rows=[{**rows[0], "gmacs": 0.0}, *rows[1:]]))
    with pytest.raises(ValueError, match="JSON"):
        Frontier.from_json(changed(solved(50), rows=[{**rows[0], "accuracy": float("nan")}, *rows[1:]]))
    with pytest.raises(ValueError, match="not readable as JSON"):
        Frontier.from_json("{")


def test_a_prediction_wants_one_threshold_per_exit() -> None:
    frontier = solved(50)
    with pytest.raises(ValueError, match="1 thresholds for 3 exits"):
        frontier.predict([0.5])


def test_milliseconds_are_those_of_the_stages_that_images_reach() -> None:
    row = FrontierRow((0.9, 0.7, 0.0), 0.8, 0.79, 0.5, (0.5, 0.3, 0.2))
    assert with_ms([row], (2.0, 4.0, 10.0))[0].ms == pytest.approx(2 + 0.5 * 4 + 0.2 * 10)


@given(st.integers(0, 2**31), st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_the_hull_is_concave_and_above_every_row(seed: int, max_rows: int) -> None:
    rows = solved(300, seed, bins=40, max_rows=max_rows).rows
    hull = upper_hull(rows)
    assert (hull[0], hull[-1]) == (rows[0], rows[-1])
    assert set(hull) <= set(rows)
    slopes = [(b.accuracy - a.accuracy) / (b.gmacs - a.gmacs) for a, b in itertools.pairwise(hull)]
    assert all(steep > flat for steep, flat in itertools.pairwise(slopes))
    above = np.interp([row.gmacs for row in rows], [row.gmacs for row in hull], [row.accuracy for row in hull])
    assert np.all(above >= np.array([row.accuracy for row in rows]) - 1e-12)


@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_mixture_costs_exactly_what_was_asked_and_no_pair_of_rows_does_better(seed: int, position: float) -> None:
    frontier = solved(300, seed, bins=40, max_rows=20)
    rows = frontier.rows
    gmacs = rows[0].gmacs + position * (rows[-1].gmacs - rows[0].gmacs)
    mixture = frontier.mixture(gmacs)
    assert mixture is not None
    assert 0 <= mixture.share <= 1
    cost = (1 - mixture.share) * mixture.cheaper.gmacs + mixture.share * mixture.dearer.gmacs
    assert cost == pytest.approx(gmacs, abs=1e-12)
    assert mixture.gmacs == pytest.approx(gmacs, abs=1e-9)
    assert sum(mixture.exit_fractions) == pytest.approx(1)
    assert np.dot(mixture.exit_fractions, GMACS) == pytest.approx(gmacs, abs=1e-7)
    for low, high in itertools.combinations(rows, 2):
        if low.gmacs <= gmacs <= high.gmacs:
            share = (gmacs - low.gmacs) / (high.gmacs - low.gmacs)
            assert (1 - share) * low.accuracy + share * high.accuracy <= mixture.accuracy + 2e-9


def test_a_mixture_ends_where_the_frontier_does() -> None:
    frontier = solved(500)
    assert frontier.mixture(GMACS[0] - 1e-6) is None
    cheapest = frontier.mixture(GMACS[0])
    assert cheapest is not None
    assert (cheapest.cheaper, cheapest.share) == (frontier.rows[0], 0.0)
    assert frontier.mixture(99.0) == frontier.mixture(frontier.knee.gmacs) == Mixture(frontier.knee, frontier.knee, 0.0)


@pytest.mark.parametrize(("hits", "samples"), [(80, 100), (1, 7), (999, 1000)])
def test_the_lower_bound_is_wilsons(hits: int, samples: int) -> None:
    # Its definition: the rate below the observed one at which the observed one is 1.645 sigma away.
    lower, rate = wilson_lower(hits, samples), hits / samples
    assert 0 < lower < rate
    assert (rate - lower) / np.sqrt(lower * (1 - lower) / samples) == pytest.approx(1.6448536)


def test_the_lower_bound_is_sound_at_both_ends() -> None:
    assert wilson_lower(0, 100) == 0.0
    assert 0.97 < wilson_lower(100, 100) < 1.0
