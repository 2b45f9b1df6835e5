"""The sweep is the best that thresholds can do, and says exactly what its thresholds did on the calibration set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import cascades
from benchmarks.exact import exact_best
from server.bundle.frontier import MAX_RECORDS, NEVER
from server.calibration.sweep import sweep

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
