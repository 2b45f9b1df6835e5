"""The frontier is the best that thresholds can do, and says exactly what its thresholds did on the calibration set."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import cascades
from benchmarks.exact import exact_best
from server.bundle.frontier import (
    MAX_RECORDS,
    NEVER,
    Frontier,
    FrontierRow,
    Mixture,
    budget_area,
    sweep,
    upper_hull,
    wilson_lower,
    with_ms,
)

GMACS = (0.47, 1.1, 2.31)
Arrays = tuple[NDArray[np.float32], NDArray[np.bool_]]


def synthetic(samples: int, seed: int = 0, exits: int = 3) -> Arrays:
    records = cascades.synthetic(samples, seed, exits)
    return records.confidence, records.correct


def exits_taken(confidence: NDArray[np.float32], thresholds: tuple[float, ...]) -> NDArray[np.int64]:
    """The cascade's rule, image by image, as an engine compares: a float32 against the threshold as it is."""
    taken = []
    for image in confidence.T:
        passed = [bool(np.asarray(c) >= np.asarray(t)) for c, t in zip(image, thresholds, strict=False)]
        taken.append(passed.index(True) if True in passed else len(thresholds) - 1)
    return np.array(taken)


def brute_force(confidence: NDArray[np.float32], correct: NDArray[np.bool_], gmacs: tuple[float, ...]) -> list[tuple]:
    """Every pair of thresholds worth trying, one by one; (cost, accuracy) of those that no other beats."""
    candidates = [[*np.unique(c).tolist(), NEVER] for c in confidence]
    points = set()
    for thresholds in itertools.product(*candidates):
        taken = exits_taken(confidence, (*thresholds, 0.0))
        cost = np.asarray(gmacs)[taken].mean()
        points.add((round(float(cost), 9), round(float(correct[taken, np.arange(len(taken))].mean()), 9)))
    best: list[tuple] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


@st.composite
def small_sets(draw: st.DrawFn) -> Arrays:
    exits = draw(st.sampled_from([2, 3]))
    samples = draw(st.integers(1, 12))
    # Few values, so that ties are the rule; some that float32 cannot hold exactly, and both ends.
    levels = draw(st.sampled_from([[0.0, 0.1, 0.7, 1.0], [0.3, 0.30000001192092896, 0.9], [0.5]]))
    confidence = draw(
        st.lists(
            st.lists(st.sampled_from(levels), min_size=samples, max_size=samples),
            min_size=exits - 1,
            max_size=exits - 1,
        )
    )
    correct = draw(
        st.lists(st.lists(st.booleans(), min_size=samples, max_size=samples), min_size=exits, max_size=exits)
    )
    return np.array(confidence, dtype=np.float32), np.array(correct)


@given(small_sets())
@settings(max_examples=150, deadline=None)
def test_with_enough_bins_it_equals_trying_everything_ties_included(data: Arrays) -> None:
    confidence, correct = data
    gmacs = GMACS[: len(correct)]
    rows = sweep(confidence, correct, gmacs).rows
    assert [(row.gmacs, row.accuracy) for row in rows] == brute_force(confidence, correct, gmacs)


@given(small_sets())
@settings(max_examples=100, deadline=None)
def test_a_row_says_what_its_thresholds_do_in_float32_and_in_float64(data: Arrays) -> None:
    confidence, correct = data
    frontier = sweep(confidence, correct, GMACS[: len(correct)])
    for row in frontier.rows:
        taken = exits_taken(confidence, row.thresholds)
        fractions = np.bincount(taken, minlength=len(correct)) / len(taken)
        np.testing.assert_allclose(row.exit_fractions, fractions, atol=1e-9)
        assert frontier.predict(row.thresholds) == row
        assert frontier.predict(row.thresholds[:-1]) == row
        assert all(float(np.float32(t)) == t for t in row.thresholds)


@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 20))
@settings(max_examples=50, deadline=None)
def test_rows_rise_and_look_ups_find_the_best_row_in_reach(seed: int, bins: int, max_rows: int) -> None:
    confidence, correct = synthetic(300, seed)
    frontier = sweep(confidence, correct, GMACS, bins=bins, max_rows=max_rows)
    rows = frontier.rows
    assert len(rows) <= max_rows
    assert all(a.gmacs < b.gmacs and a.accuracy < b.accuracy for a, b in itertools.pairwise(rows))
    for budget in (0.1, *(row.gmacs for row in rows), *(row.gmacs + 1e-6 for row in rows), 99.0):
        within = [row for row in rows if row.gmacs <= budget]
        assert frontier.by_gmacs(budget) == (within[-1] if within else None)
    for wanted in (0.0, *(row.accuracy for row in rows), *(row.accuracy + 1e-7 for row in rows), 1.1):
        enough = [row for row in rows if row.accuracy >= wanted]
        assert frontier.by_accuracy(wanted) == (enough[0] if enough else None)


def test_the_cheapest_row_lets_all_images_leave_at_once_also_those_to_come() -> None:
    frontier = sweep(*synthetic(500), GMACS)
    assert frontier.rows[0].thresholds == (0.0, 0.0, 0.0)
    assert frontier.rows[0].gmacs == GMACS[0]
    assert frontier.rows[0].exit_fractions == (1, 0, 0)


def test_nothing_is_left_past_the_knee() -> None:
    confidence, correct = synthetic(2000)
    correct[2] = correct[1]  # the last exit is no better: what it costs buys nothing
    frontier = sweep(confidence, correct, GMACS)
    assert all(row.exit_fractions[2] == 0 for row in frontier.rows)
    assert frontier.by_gmacs(GMACS[2]) == frontier.knee


def test_never_means_that_nobody_leaves_even_at_full_confidence() -> None:
    frontier = sweep([[1.0, 1.0]], [[False, False], [True, True]], GMACS[:2])
    assert frontier.knee.thresholds == (NEVER, 0.0)
    assert frontier.knee.exit_fractions == (0, 1)
    assert frontier.predict([1.0]).exit_fractions == (1, 0)


def test_bins_lose_next_to_nothing_against_the_exact_optimum() -> None:
    confidence, correct = synthetic(4000, seed=3)
    frontier = sweep(confidence, correct, GMACS, bins=1024)
    picked = frontier.rows[:: len(frontier.rows) // 8]
    best = [exact_best(confidence, correct, GMACS, row.gmacs) for row in picked]
    gaps = [exact - row.accuracy for exact, row in zip(best, picked, strict=True)]
    assert min(gaps) >= -1e-9, "better than the exact optimum"
    # 0.02 points at 50,000 images; a bin of 4 images weighs more among 4,000, and noise has more to be fitted to.
    assert max(gaps) <= 0.001
    assert float(np.mean(gaps)) <= 0.0005


def test_four_exits_fit_in_memory() -> None:
    confidence, correct = synthetic(3000, exits=4)
    frontier = sweep(confidence, correct, (0.2, *GMACS))
    assert frontier.knee.accuracy > max(frontier.exit_accuracy) - 0.01
    assert frontier.predict(frontier.rows[100].thresholds) == frontier.rows[100]


def test_a_large_set_is_kept_as_an_even_part_that_predicts_nearly_the_same() -> None:
    confidence, correct = synthetic(30_000)
    frontier = sweep(confidence, correct, GMACS)
    assert frontier.samples == 30_000
    assert frontier.records.correct.shape == (3, MAX_RECORDS)
    row = frontier.rows[len(frontier.rows) // 2]
    predicted = frontier.predict(row.thresholds)
    assert predicted.gmacs == pytest.approx(row.gmacs, rel=0.02)
    assert predicted.accuracy == pytest.approx(row.accuracy, abs=0.01)


def test_json_gives_the_same_frontier_back_and_stays_small() -> None:
    frontier = sweep(*synthetic(30_000), GMACS, key="v/fp32/resize72")
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
        ("source", "hearsay", "source 'hearsay' is none of calibration, imported"),
        ("records", {"count": 3, "confidence": "AAAA", "correct": "AA=="}, "."),
    ],
)
def test_a_file_that_is_no_frontier_is_refused_with_its_cause(name: str, value: object, cause: str) -> None:
    document = json.loads(sweep(*synthetic(50), GMACS).to_json())
    with pytest.raises(ValueError, match=cause):
        Frontier.from_json(json.dumps({**document, name: value}))


def test_a_frontier_without_records_says_nothing_of_thresholds_that_are_not_its_rows() -> None:
    solved = sweep(*synthetic(50), GMACS)
    assert solved.source == "calibration"
    rows = tuple(replace(row, accuracy_lower=None) for row in solved.rows)
    frontier = replace(solved, rows=rows, samples=0, records=None, source="imported")
    again = Frontier.from_json(frontier.to_json())
    assert again == frontier
    assert again.predict([0.5, 0.5]) is None
    assert again.by_gmacs(1.0) == frontier.by_gmacs(1.0)
    document = json.loads(solved.to_json())
    del document["source"]
    assert Frontier.from_json(json.dumps(document)).source == "calibration"


def test_rows_out_of_order_or_not_finite_are_refused() -> None:
    document = json.loads(sweep(*synthetic(50), GMACS).to_json())
    with pytest.raises(ValueError, match="do not rise"):
        Frontier.from_json(json.dumps({**document, "rows": document["rows"][::-1]}))
    document["rows"][0]["accuracy"] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Frontier.from_json(json.dumps(document))
    with pytest.raises(ValueError, match="not readable as JSON"):
        Frontier.from_json("{")


@pytest.mark.parametrize(
    ("confidence", "correct", "gmacs"),
    [
        ([[0.5]], [[True]], GMACS[:2]),
        ([[0.5, 0.5]], [[True], [True]], GMACS[:2]),
        ([[]], [[], []], GMACS[:2]),
        ([[float("nan")]], [[True], [True]], GMACS[:2]),
        ([[2.5]], [[True], [True]], GMACS[:2]),
        ([[0.5]], [[True], [True]], (2.0, 1.0)),
        ([[0.5]], [[True], [True]], (1.0, float("inf"))),
    ],
)
def test_records_that_do_not_fit_are_refused(confidence: list, correct: list, gmacs: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"stage|confidence"):
        sweep(confidence, correct, gmacs)


def test_a_prediction_wants_one_threshold_per_exit() -> None:
    frontier = sweep(*synthetic(50), GMACS)
    with pytest.raises(ValueError, match="1 thresholds for 3 exits"):
        frontier.predict([0.5])


def test_the_area_under_the_budget_curve_is_a_mean_accuracy() -> None:
    def row(gmacs: float, accuracy: float) -> FrontierRow:
        return FrontierRow((0.0, 0.0), accuracy, 0.0, gmacs, (1.0, 0.0))

    rows = [row(1.0, 0.5), row(2.0, 0.7)]
    assert budget_area(rows, 1.0, 2.0) == pytest.approx(0.6)
    assert budget_area(rows, 1.0, 3.0) == pytest.approx(0.65)
    assert budget_area([*rows, row(3.0, 0.6)], 1.0, 3.0) == pytest.approx(0.65), "a worse row takes nothing away"
    assert budget_area(rows, 1.5, 2.0) == pytest.approx(0.65)
    with pytest.raises(ValueError, match="cheapest row costs"):
        budget_area(rows, 0.5, 2.0)


def test_milliseconds_are_those_of_the_stages_that_images_reach() -> None:
    row = FrontierRow((0.9, 0.7, 0.0), 0.8, 0.79, 0.5, (0.5, 0.3, 0.2))
    assert with_ms([row], (2.0, 4.0, 10.0))[0].ms == pytest.approx(2 + 0.5 * 4 + 0.2 * 10)


@given(st.integers(0, 2**31), st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_the_hull_is_concave_and_above_every_row(seed: int, max_rows: int) -> None:
    rows = sweep(*synthetic(300, seed), GMACS, bins=40, max_rows=max_rows).rows
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
    frontier = sweep(*synthetic(300, seed), GMACS, bins=40, max_rows=20)
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
    frontier = sweep(*synthetic(500), GMACS)
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
