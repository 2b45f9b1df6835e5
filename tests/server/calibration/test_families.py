"""The solvers that the frontier is compared with do what their papers say, and never beat it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cascades import synthetic
from benchmarks.exact import exact_best
from server.bundle.frontier import FrontierRow
from server.calibration.evaluate import budget_area
from server.calibration.families import genetic, geometric
from server.calibration.sweep import sweep

GMACS = (0.47, 1.1, 2.31)


def test_the_geometric_family_moves_from_the_first_exit_to_the_last_and_never_beats_the_frontier() -> None:
    records = synthetic(5000)
    family = geometric(records.confidence, records.correct, GMACS)
    frontier = sweep(records.confidence, records.correct, GMACS, bins=5000)
    assert len(family) == 59
    first, last = family[0].exit_fractions, family[-1].exit_fractions
    assert first[0] > 0.9
    assert last[2] > 0.5
    p = np.array([1.0, 1.0, 1.0]) / 3  # k = 20
    np.testing.assert_allclose(family[19].exit_fractions, p, atol=0.002)
    low = family[0].gmacs
    assert budget_area(family, low, GMACS[2]) <= budget_area(frontier.rows, low, GMACS[2])


@pytest.mark.parametrize("budget", [0.8, 1.2, 2.0])
def test_the_genetic_algorithm_comes_near_the_optimum_within_its_budget(budget: float) -> None:
    records = synthetic(2000)
    row = genetic(records.confidence, records.correct, GMACS, budget)
    best = exact_best(records.confidence, records.correct, GMACS, budget)
    assert best is not None
    assert row.gmacs <= budget
    assert best - 0.015 <= row.accuracy <= best
    assert genetic(records.confidence, records.correct, GMACS, budget) == row, "the same seed, the same row"


def test_the_genetic_algorithm_lets_all_leave_at_once_where_nothing_else_can_be_paid() -> None:
    records = synthetic(300)
    assert genetic(records.confidence, records.correct, GMACS, GMACS[0]).exit_fractions == (1.0, 0.0, 0.0)


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
