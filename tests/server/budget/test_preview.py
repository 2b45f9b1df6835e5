"""What a budget would have done to the traffic of late: right where its assumption holds, and silent without images."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.budget.controller import Prediction, Setting, Solution, solve
from server.budget.drift import bins_of, quantile_edges
from server.budget.loops import CostLoop
from server.budget.preview import BINS, Preview, Previewer
from server.bundle.frontier import NEVER, Frontier, FrontierRow, Mixture, Records, evaluate_thresholds, upper_hull
from server.calibration.sweep import sweep
from server.core import Floats, Mix, OperatingPoint
from server.errors import BudgetInfeasible

GMACS = (0.5, 1.0, 2.0)
PRESENT = OperatingPoint(1, (0.9, 0.8, 0.0))
PRESENT_OF_TWO = OperatingPoint(1, (0.9, 0.0))


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


def preview(frontier: Frontier, solution: Solution, present: OperatingPoint, window: Floats) -> Preview:
    return Previewer(frontier).preview(solution, present, window)


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


# --- against the direct computation: every record has its weight ------------------------------------------------------


def weights_of(sample: Floats, population: Floats) -> NDArray[np.float64]:
    """(N,) weights that spread a sample (N,) over its own quantile bins as a population (n,) is."""
    edges = quantile_edges(sample, BINS)
    bins = bins_of(sample, edges)
    shares = np.bincount(bins_of(population, edges), minlength=len(edges) + 1) / len(population)
    weights: NDArray[np.float64] = (shares / np.bincount(bins))[bins]
    return weights


def directly(records: Records, weights: NDArray[np.float64], thresholds: Sequence[float]) -> Prediction:
    """Image by image, each compared as it is."""
    sure = records.confidence.astype(np.float64) >= np.array(thresholds[:-1])[:, None]
    taken = np.where(sure.any(axis=0), sure.argmax(axis=0), len(sure))
    fractions = np.bincount(taken, weights, minlength=len(sure) + 1)
    accuracy = float(weights @ records.correct[taken, range(len(taken))])
    return Prediction(accuracy, float(fractions @ np.array(GMACS)), tuple(fractions.tolist()))


def held_directly(frontier: Frontier, gmacs: float, mix: bool, weights: NDArray[np.float64]) -> Setting:
    def cost(row: FrontierRow) -> float:
        predicted = directly(frontier.records, weights, row.thresholds)
        assert predicted.gmacs is not None
        return round(predicted.gmacs, 9)

    rows = upper_hull(frontier.rows) if mix else frontier.rows
    at = max(0, bisect_right(rows, gmacs, key=cost) - 1)
    if not mix:
        return Setting.of(rows[at])
    cheaper, dearer = rows[at], rows[min(at + 1, len(rows) - 1)]
    low, high = cost(cheaper), cost(dearer)
    return Setting.of_mixture(Mixture(cheaper, dearer, (gmacs - low) / (high - low) if low < gmacs < high else 0.0))


THRESHOLD = st.one_of(st.sampled_from([0.0, 0.5, 1.0, NEVER, 1e-300, 0.1, 1 / 3]), st.floats(0, 1))
THRESHOLDS = st.tuples(THRESHOLD, THRESHOLD).map(list)
TARGETS = st.one_of(
    st.floats(0.5, 2.5).map(lambda gmacs: ({"gmacs": gmacs}, "cost", False)),
    st.floats(0.5, 2.5).map(lambda gmacs: ({"gmacs": gmacs}, "cost", True)),
    st.floats(0.5, 2.5).map(lambda gmacs: ({"gmacs": gmacs}, "quality", True)),
    st.floats(0, 0.5).map(lambda accuracy: ({"accuracy": accuracy}, "cost", False)),
    THRESHOLDS.map(lambda thresholds: ({"thresholds": thresholds}, "quality", False)),
)
POINTS = st.builds(
    lambda cheaper, dearer, share: OperatingPoint(3, (*cheaper, 0.0), dearer and Mix((*dearer, 0.0), share)),
    THRESHOLDS,
    st.none() | THRESHOLDS,
    st.floats(0, 1),
)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 49, 50, 51, 700]),
    st.sampled_from([3, 20, 2**24]),
    TARGETS,
    POINTS,
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
)
def test_tables_say_what_the_weighted_records_say(
    seed: int,
    count: int,
    values: int,
    asked: tuple[dict[str, Any], str, bool],
    present: OperatingPoint,
    window: list[float],
) -> None:
    """For any records (also few, and with many ties), window, target and point in force."""
    rng = np.random.default_rng(seed)
    confidence = (rng.integers(0, values, (3, count)) / values).astype(np.float32)
    frontier = sweep(confidence[:2], rng.random((3, count)) < confidence, GMACS)
    target, hold, mix = asked
    try:
        solution = solve(frontier, target, hold, mix)
    except BudgetInfeasible:
        return
    population = np.array(window, np.float32)
    traffic = preview(frontier, solution, present, population).traffic
    assert traffic is not None
    weights = weights_of(frontier.records.confidence[0], population)
    wanted: Setting | OperatingPoint = solution.setting
    if solution.held_gmacs is not None:
        wanted = held_directly(frontier, solution.held_gmacs, mix, weights)
        if wanted.mix is None or traffic.mix is None:
            assert (traffic.thresholds, traffic.mix) == (wanted.thresholds, wanted.mix)
        else:
            assert (traffic.thresholds, traffic.mix.thresholds) == (wanted.thresholds, wanted.mix.thresholds)
            assert traffic.mix.share == pytest.approx(wanted.mix.share, abs=1e-6)
    for told, point in ((traffic.target, wanted), (traffic.present, present)):
        assert told.exit_fractions is not None
        sides = [(1.0, point.thresholds)]
        if point.mix is not None:
            sides = [(1 - point.mix.share, point.thresholds), (point.mix.share, point.mix.thresholds)]
        means = np.zeros(5)
        for share, thresholds in sides:
            one = directly(frontier.records, weights, thresholds)
            assert one.exit_fractions is not None
            means += share * np.array([one.accuracy, one.gmacs, *one.exit_fractions])
        assert [told.accuracy, told.gmacs, *told.exit_fractions] == pytest.approx(means, abs=1.1e-6)


CONFIDENCES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200)


@given(CONFIDENCES, CONFIDENCES)
def test_all_weights_together_are_one_whatever_records_and_window_look_like(
    sample: list[float], window: list[float]
) -> None:
    confidence = np.array(sample, np.float32)
    everywhere = np.ones((2, len(sample)), np.bool_)
    frontier = sweep(confidence[None], everywhere, GMACS[:2])
    found = preview(frontier, solve(frontier, {"thresholds": [0.5]}), PRESENT_OF_TWO, np.array(window, np.float32))
    assert found.traffic is not None
    assert found.traffic.target.accuracy == 1.0
    assert sum(found.traffic.target.exit_fractions or ()) == pytest.approx(1, abs=2e-6)
