"""The interval holds at all times at once, and closes in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.budget.confidence_sequence import ConfidenceSequence, Interval


def bounds(xs: list[float], confidence: float = 0.95) -> list[tuple[float, float]]:
    """After every observation."""
    sequence, found = ConfidenceSequence(confidence), []
    for x in xs:
        sequence.observe(x)
        interval = sequence.interval()
        assert interval.low is not None
        assert interval.high is not None
        found.append((interval.low, interval.high))
    return found


@pytest.mark.parametrize("mean", [0.003, 0.1, 0.5, 0.98])
@pytest.mark.parametrize("spread", ["coins", "beta"])
def test_the_mean_is_enclosed_at_every_time_of_almost_every_stream(mean: float, spread: str) -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(60):
        xs = (rng.random(300) < mean).astype(float) if spread == "coins" else rng.beta(5 * mean, 5 * (1 - mean), 300)
        missed += any(not low <= mean <= high for low, high in bounds(xs.tolist(), confidence=0.8))
    assert missed <= 12, "at 80 % confidence one stream in five may leave its interval, at any time"


def test_who_looks_at_an_ordinary_interval_after_every_observation_is_misled() -> None:
    """Why the sequence is worth its width: the same streams, the normal interval of the same confidence."""
    rng = np.random.default_rng(0)
    seen = np.arange(1, 401)
    missed = 0
    for _ in range(100):
        means = np.cumsum(rng.random(400) < 0.5) / seen
        missed += bool(np.any(np.abs(means - 0.5)[20:] > (1.2816 * 0.5 / np.sqrt(seen))[20:]))
    assert missed > 40


@pytest.mark.parametrize(("mean", "widest"), [(0.0, 0.01), (0.02, 0.02), (0.5, 0.06)])
def test_it_closes_in_and_is_narrow_where_observations_vary_little(mean: float, widest: float) -> None:
    rng = np.random.default_rng(1)
    found = bounds((rng.random(10_000) < mean).astype(float).tolist())
    widths = [found[n - 1][1] - found[n - 1][0] for n in (1, 100, 1000, 10_000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 1
    assert widths[-1] < widest


def test_of_a_mean_that_changes_it_encloses_the_weighted_average() -> None:
    low, high = bounds([0.0] * 500 + [1.0] * 500)[-1]
    assert 0 < low < high < 1


@given(st.lists(st.floats(0, 1), max_size=60))
def test_the_estimate_lies_in_its_interval_and_the_interval_in_the_range(xs: list[float]) -> None:
    sequence = ConfidenceSequence()
    assert sequence.interval() == Interval(None, None, None)
    for n, x in enumerate(xs, start=1):
        sequence.observe(x)
        found = sequence.interval()
        assert found.low is not None
        assert found.mean is not None
        assert found.high is not None
        assert 0 <= found.low <= found.mean <= found.high <= 1
        assert min(xs[:n]) - 1e-6 <= found.mean <= max(xs[:n]) + 1e-6
        assert sequence.count == n


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 30.0), (1.0, 1000.0)])
def test_the_average_by_weights_is_enclosed_at_every_time_where_the_mean_goes_with_the_weight(
    weights: tuple[float, float],
) -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(60):
        sequence, total, of_means, right = ConfidenceSequence(0.8), 0.0, 0.0, True
        for n in range(300):
            heavy = n // 20 % 2
            mean, weight = (0.9, 0.6)[heavy], weights[heavy]
            sequence.observe(float(rng.random() < mean), weight)
            total, of_means = total + weight, of_means + weight * mean
            found = sequence.interval()
            assert found.low is not None
            assert found.high is not None
            right &= found.low <= of_means / total <= found.high
        missed += not right
    assert missed <= 12


def test_one_observation_that_outweighs_all_others_leaves_little_known() -> None:
    sequence = ConfidenceSequence()
    for _ in range(1000):
        sequence.observe(1.0)
    low = sequence.interval().low
    assert low is not None
    assert low > 0.99
    sequence.observe(1.0, weight=1e6)
    assert sequence.interval() == Interval(1.0, 0.0, 1.0)
    sequence.observe(1.0, weight=1e300)
    assert sequence.interval() == Interval(1.0, 0.0, 1.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 1e15)), min_size=1, max_size=60))
def test_whatever_the_weights_the_interval_is_one(observations: list[tuple[float, float]]) -> None:
    sequence = ConfidenceSequence()
    for x, weight in observations:
        sequence.observe(x, weight)
        found = sequence.interval()
        assert found.low is not None
        assert found.mean is not None
        assert found.high is not None
        assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_is_above_0_and_finite(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        ConfidenceSequence().observe(0.5, weight)


@pytest.mark.parametrize("x", [-0.1, 1.1, float("nan")])
def test_what_is_out_of_range_is_refused(x: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ConfidenceSequence().observe(x)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        ConfidenceSequence(confidence)
