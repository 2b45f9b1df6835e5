"""The promise holds as often as it says, and is worth something."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cascades import synthetic
from server.bundle.frontier import Frontier, Records
from server.calibration.guarantee import certify, losses, split, upper_bound
from server.calibration.sweep import sweep

GMACS = (0.5, 1.5, 3.5)
POPULATION = 200_000


def solved(records: Records) -> Frontier:
    return sweep(records.confidence, records.correct, GMACS, bins=128, max_rows=33)


def test_the_promise_is_broken_no_more_often_than_it_says():
    population = synthetic(POPULATION, seed=10**6)
    delta, broken, certified = 0.1, 0, 0
    resamples = 200
    for seed in range(resamples):
        solving, testing = split(synthetic(3000, seed))
        frontier = solved(solving)
        certificate = certify(frontier.rows, testing, 0.02, 1 - delta)
        if certificate is not None:
            certified += 1
            row = frontier.by_gmacs(certificate.gmacs)
            broken += losses(population, row.thresholds).mean() > 0.02
    assert broken / resamples <= delta + 3 * math.sqrt(delta * (1 - delta) / resamples)
    assert certified > 0.9 * resamples  # or it would be an empty promise


def test_a_row_chosen_by_its_observed_loss_breaks_it_far_more_often():
    """What the test is for."""
    population = synthetic(POPULATION, seed=10**6)
    broken = 0
    for seed in range(60):
        _, testing = split(synthetic(3000, seed))
        for row in solved(testing).rows:  # cheapest first
            if losses(testing, row.thresholds).mean() <= 0.02:
                broken += losses(population, row.thresholds).mean() > 0.02
                break
    assert broken > 0.3 * 60


def test_certified_rows_save_work_and_a_looser_promise_saves_more():
    solving, testing = split(synthetic(20_000, seed=1))
    rows = solved(solving).rows
    costs = [certify(rows, testing, loss, 0.95).gmacs for loss in (0.005, 0.01, 0.03)]
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < 0.8 * GMACS[-1]


def test_too_few_images_certify_nothing():
    solving, testing = split(synthetic(120, seed=1))
    assert certify(solved(solving).rows, testing, 0.01, 0.95) is None


@pytest.mark.parametrize(("loss", "confidence"), [(0.0, 0.9), (1.0, 0.9), (0.1, 1.0), (0.1, 0.0), (math.nan, 0.9)])
def test_a_promise_that_cannot_be_is_refused(loss: float, confidence: float):
    with pytest.raises(ValueError, match="between 0 and 1"):
        certify((), synthetic(10, 0), loss, confidence)


def test_an_image_loses_what_the_last_exit_knew_and_its_own_did_not():
    confidence = np.array([[0.9, 0.9, 0.1, 0.1, 0.1], [0.0, 0.0, 0.9, 0.1, 0.9]], dtype=np.float32)
    correct = np.array([[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=bool)
    assert losses(Records(confidence, correct), (0.5, 0.5, 0.0)).tolist() == [-1, 1, 0, 0, 1]


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=200), st.floats(0.9, 0.99))
def test_the_upper_bound_lies_above_the_mean(values: list[int], confidence: float):
    bound = upper_bound(np.array(values, dtype=np.int8), confidence)
    assert (np.mean(values) if values else -1) <= bound <= 1


def test_the_upper_bound_tightens_with_more_images():
    rng = np.random.default_rng(0)
    bounds = [
        upper_bound(rng.choice(3, size=n, p=[0.05, 0.9, 0.05]).astype(np.int8) - 1, 0.95) for n in (100, 1000, 10_000)
    ]
    assert bounds[0] > bounds[1] > bounds[2]
    assert bounds[2] < 0.01


def test_halves_share_no_image():
    records = synthetic(501, seed=3)
    solving, testing = split(records)
    assert solving.correct.shape[1] + testing.correct.shape[1] == 501
    together = np.concatenate([solving.confidence, testing.confidence], axis=1)
    assert sorted(map(tuple, together.T)) == sorted(map(tuple, records.confidence.T))
