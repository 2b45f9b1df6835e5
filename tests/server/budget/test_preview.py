"""What a budget would have done to the traffic of late: right where its assumption holds, and silent without images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.budget.controller import solve
from server.budget.loops import CostLoop
from server.budget.preview import post_stratify, preview
from server.bundle.frontier import Frontier, Records, evaluate_thresholds
from server.calibration.sweep import sweep
from server.core import Floats, OperatingPoint

GMACS = (0.5, 1.0, 2.0)
PRESENT = OperatingPoint(1, (0.9, 0.8, 0.0))


def traffic(count: int, seed: int, harder: float = 0.0) -> tuple[Floats, NDArray[np.bool_]]:
    """Confidences (3, N) and correctness (3, N). Harder traffic has other first confidences; what the later exits make
    of an image follows from its first one alone."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=count) - harder
    second = first + 0.5 + rng.normal(size=count) * 0.5
    third = second + 0.5 + rng.normal(size=count) * 0.5
    confidence = (1 / (1 + np.exp(-np.stack([first, second, third])))).astype(np.float32)
    return confidence, rng.random((3, count)) < confidence


@pytest.fixture(scope="module")
def frontier() -> Frontier:
    confidence, correct = traffic(16_000, seed=0)
    return sweep(confidence[:2], correct, GMACS)


@pytest.mark.parametrize("harder", [-1.0, 0.0, 1.0])
def test_it_tells_what_thresholds_would_have_done_to_other_traffic(frontier: Frontier, harder: float) -> None:
    confidence, correct = traffic(10_000, 1, harder)
    found = preview(frontier, solve(frontier, {"gmacs": 1.0}, "quality"), PRESENT, confidence[0])
    assert found.traffic is not None
    assert found.traffic.images == 10_000
    for thresholds, told in ((found.thresholds, found.traffic.target), (PRESENT.thresholds, found.traffic.present)):
        truth = evaluate_thresholds(Records(confidence[:2], correct), thresholds, GMACS)
        assert told.gmacs == pytest.approx(truth.gmacs, abs=0.03)
        assert told.accuracy == pytest.approx(truth.accuracy, abs=0.02)
        assert told.exit_fractions == pytest.approx(truth.exit_fractions, abs=0.03)
    if harder:
        assert abs(found.predicted.gmacs - found.traffic.target.gmacs) > 0.1, "the shift is one that matters"


@pytest.mark.parametrize("target", [{"gmacs": 1.0}, {"accuracy": 0.6}])
@pytest.mark.parametrize("harder", [-1.0, 0.0, 1.0])
def test_where_a_cost_is_held_it_tells_what_holding_it_comes_to(
    frontier: Frontier, harder: float, target: dict[str, float]
) -> None:
    confidence, correct = traffic(20_000, 1, harder)
    solution = solve(frontier, target)
    assert solution.held_gmacs is not None
    loop, exits = CostLoop(frontier.rows, GMACS, solution.held_gmacs), []
    for image in confidence[:2].T.tolist():
        thresholds = frontier.rows[loop.row].thresholds
        exits.append(0 if image[0] >= thresholds[0] else 1 if image[1] >= thresholds[1] else 2)
        loop.observe(exits[-1] + 1)
    held = correct[exits, range(20_000)][10_000:].mean()

    found = preview(frontier, solution, PRESENT, confidence[0][10_000:])
    assert found.traffic is not None
    assert found.thresholds == solution.setting.thresholds, "that it begins with"
    assert found.traffic.thresholds == frontier.rows[found.traffic.row].thresholds
    assert found.traffic.target.gmacs == pytest.approx(solution.held_gmacs, rel=0.02)
    assert found.traffic.target.gmacs <= solution.held_gmacs
    assert found.traffic.target.accuracy == pytest.approx(held, abs=0.02)
    if harder:
        assert abs(found.predicted.accuracy - held) > 0.1, "the shift is one that matters"


def test_a_cost_beyond_the_frontier_is_told_of_its_end(frontier: Frontier) -> None:
    confidence, _ = traffic(1000, 1, harder=-1.0)
    for mix in (False, True):
        found = preview(frontier, solve(frontier, {"gmacs": 2.0}, mix=mix), PRESENT, confidence[0])
        assert found.traffic is not None
        assert (found.traffic.thresholds, found.traffic.row) == (frontier.knee.thresholds, len(frontier.rows) - 1)
        assert found.traffic.target.gmacs < frontier.knee.gmacs


def test_thresholds_that_are_not_to_follow_the_traffic_stay(frontier: Frontier) -> None:
    confidence, _ = traffic(1000, 1, harder=1.0)
    for solution in (solve(frontier, {"gmacs": 1.0}, "quality"), solve(frontier, {"thresholds": [0.9, 0.8]})):
        found = preview(frontier, solution, PRESENT, confidence[0])
        assert found.traffic is not None
        assert found.traffic.thresholds == found.thresholds
        row, dearer = frontier.rows[found.traffic.row :][:2]
        assert row.gmacs <= found.predicted.gmacs < dearer.gmacs


def test_of_traffic_just_like_the_records_it_says_what_calibration_says(frontier: Frontier) -> None:
    found = preview(frontier, solve(frontier, {"accuracy": 0.6}), PRESENT, frontier.records.confidence[0])
    assert found.traffic is not None
    assert found.traffic.thresholds == found.thresholds
    again = frontier.predict(found.thresholds)
    assert found.traffic.target.accuracy == pytest.approx(again.accuracy)
    assert found.traffic.target.gmacs == pytest.approx(again.gmacs)
    assert found.traffic.target.exit_fractions == pytest.approx(again.exit_fractions, abs=1e-6)


def test_without_images_or_records_there_is_no_traffic_to_tell_of(frontier: Frontier) -> None:
    nothing = np.zeros(0, np.float32)
    assert preview(frontier, solve(frontier, {"gmacs": 1.0}), PRESENT, nothing).traffic is None
    empty = Records(np.zeros((2, 0), np.float32), np.zeros((3, 0), np.bool_))
    for records in (None, empty):  # as where thresholds were published, and images were not
        bare = dataclasses.replace(frontier, records=records)  # type: ignore[arg-type]
        assert preview(bare, solve(bare, {"gmacs": 1.0}), PRESENT, np.ones(3, np.float32)).traffic is None


@pytest.mark.parametrize("harder", [-1.0, 1.0])
def test_a_mixture_costs_just_what_is_held(frontier: Frontier, harder: float) -> None:
    confidence, _ = traffic(10_000, 1, harder)
    found = preview(frontier, solve(frontier, {"gmacs": 1.0}, mix=True), PRESENT, confidence[0])
    assert found.traffic is not None
    assert found.traffic.mix is not None
    assert found.traffic.mix != found.mix
    assert found.traffic.target.gmacs == pytest.approx(1.0, abs=1e-6)


def test_a_mixture_is_told_as_the_mean_of_its_two_sides(frontier: Frontier) -> None:
    window = frontier.records.confidence[0]
    solution = solve(frontier, {"gmacs": 1.0}, mix=True)
    found = preview(frontier, solution, PRESENT, window)
    assert found.traffic is not None
    assert found.mix == solution.setting.mix
    assert found.traffic.target.gmacs == pytest.approx(1.0, abs=1e-6)
    assert found.traffic.target.accuracy == pytest.approx(solution.setting.predicted.accuracy, abs=1e-6)


CONFIDENCES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200)


@given(CONFIDENCES, CONFIDENCES)
def test_weights_are_a_distribution_whatever_the_two_look_like(sample: list[float], population: list[float]) -> None:
    weights = post_stratify(np.array(sample, np.float32), np.array(population, np.float32))
    assert np.all(weights >= 0)
    assert weights.sum() == pytest.approx(1)


@given(CONFIDENCES)
def test_a_sample_that_is_the_population_keeps_equal_weights(sample: list[float]) -> None:
    array = np.array(sample, np.float32)
    assert post_stratify(array, array) == pytest.approx(np.full(len(array), 1 / len(array)))
