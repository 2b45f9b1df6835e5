"""The oracle equals trying everything, so that it may judge the others."""

from __future__ import annotations

import itertools

import numpy as np

from benchmarks.exact import exact_best

GMACS = (0.5, 1.5, 3.5)


def brute_force(confidence: np.ndarray, correct: np.ndarray, budget: float) -> float | None:
    best = None
    thresholds = [[*np.unique(row).tolist(), 2.0] for row in confidence]
    for t1, t2 in itertools.product(*thresholds):
        first = confidence[0] >= t1
        second = ~first & (confidence[1] >= t2)
        third = ~first & ~second
        shares = np.array([first.sum(), second.sum(), third.sum()])
        if shares @ GMACS / len(first) <= budget + 1e-9:
            right = sum((correct[k] & leaves).sum() for k, leaves in enumerate((first, second, third)))
            best = max(best or 0, right / len(first))
    return best


def test_it_equals_brute_force_on_six_hundred_cases_with_ties():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(600):
        samples = int(rng.integers(1, 14))
        levels = int(rng.integers(1, 8))  # few levels: most confidences are shared
        confidence = (rng.integers(0, levels, (2, samples)) / 8).astype(np.float32)
        correct = rng.random((3, samples)) < 0.6
        budget = float(rng.uniform(0.3, 3.7))
        expected = brute_force(confidence, correct, budget)
        assert exact_best(confidence, correct, GMACS, budget) == expected
        found += expected is not None
    assert found > 400
