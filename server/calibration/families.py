"""Other ways to choose thresholds, kept for comparison with the sweep. Only numbers here. A server meets them only in a
frontier that a published checkpoint brought along (`export.imported`).

Legend: N images, E exits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from server.bundle.frontier import NEVER, FrontierRow, Records, evaluate_thresholds
from server.calibration.sweep import as_records

_POPULATION = 50
_GENERATIONS = 60


def geometric_shares(exits: int) -> NDArray[np.float64]:
    """p, p^2, p^3, ... for p = k/20, k = 1..59: what the images at each exit are to be proportional to. (59, E)"""
    p = np.arange(1, 60)[:, None] / 20
    shares: NDArray[np.float64] = p ** np.arange(1, exits + 1)
    return shares


def geometric(confidence: ArrayLike, correct: ArrayLike, stage_gmacs: Sequence[float]) -> tuple[FrontierRow, ...]:
    """MSDNet's family of thresholds, as the authors' code draws it: kept for comparison.

    A share of all images is to leave at each exit (`geometric_shares`); exit by exit the threshold is the confidence of
    the last image that may leave, among those still in.
    """
    costs = np.asarray(stage_gmacs, dtype=np.float64)
    records = as_records(confidence, correct, costs)
    exits, samples = records.correct.shape
    rows = []
    for shares in geometric_shares(exits):
        quota = np.floor(samples * shares / shares.sum()).astype(int)
        inside = np.ones(samples, dtype=bool)
        thresholds = []
        for stage in range(exits - 1):
            ranked = np.sort(records.confidence[stage, inside])[::-1]
            leaving = min(int(quota[stage]), len(ranked))
            thresholds.append(float(ranked[leaving - 1]) if leaving else NEVER)
            inside &= records.confidence[stage] < np.float32(thresholds[-1])
        rows.append(evaluate_thresholds(records, thresholds, costs))
    return tuple(rows)


def genetic(
    confidence: ArrayLike, correct: ArrayLike, stage_gmacs: Sequence[float], gmacs: float, seed: int = 0
) -> FrontierRow:
    """The paper's solver (Eq. 10): a genetic algorithm for one budget. May miss the optimum, and takes its time.

    A gene is the rank, 0 to 1, of an exit's threshold among its confidences. Of two random parents the better one is
    taken, twice; their child takes each gene from either, and one gene in three moves a little, less from generation
    to generation. The two best live on. Of two that cost too much the cheaper one is the better.
    """
    costs = np.asarray(stage_gmacs, dtype=np.float64)
    records = as_records(confidence, correct, costs)
    exits = len(costs)
    ranked = np.sort(records.confidence, axis=1)
    rng = np.random.default_rng(seed)
    genes = rng.random((_POPULATION, exits - 1))
    genes[0] = 0.0  # all leave at once: what any feasible budget can pay
    for generation in range(_GENERATIONS + 1):
        accuracy, cost = _outcomes(records, _thresholds(ranked, genes), costs)
        fitness = np.where(cost <= gmacs, accuracy, gmacs - cost - 1)
        best = np.argsort(-fitness, kind="stable")
        if generation == _GENERATIONS:
            break
        pairs = rng.integers(_POPULATION, size=(2, _POPULATION - 2, 2))
        winners = np.where(fitness[pairs[..., 0]] >= fitness[pairs[..., 1]], pairs[..., 0], pairs[..., 1])
        parents = genes[winners]  # (2, P-2, E-1)
        children = np.where(rng.random((_POPULATION - 2, exits - 1)) < 0.5, parents[0], parents[1])
        step = 0.2 * (1 - generation / _GENERATIONS) + 0.005
        moves = rng.normal(0, step, children.shape) * (rng.random(children.shape) < 1 / 3)
        genes = np.concatenate([genes[best[:2]], np.clip(children + moves, 0, 1)])
    return evaluate_thresholds(records, _thresholds(ranked, genes[best[:1]])[0].tolist(), costs)


def _thresholds(ranked: NDArray[np.float32], genes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(P, E-1) ranks -> confidences, NEVER at rank 1 and 0 at rank 0."""
    at = (genes * ranked.shape[1]).astype(int)
    columns = [np.append(row, np.float32(NEVER))[at[:, stage]] for stage, row in enumerate(ranked)]
    return np.where(genes == 0, 0.0, np.stack(columns, axis=1))


def _outcomes(
    records: Records, thresholds: NDArray[np.float64], costs: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean accuracy and cost of each row of thresholds (P, E-1): (P,), (P,)."""
    samples = records.correct.shape[1]
    accuracy, cost = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    for number, row in enumerate(thresholds):
        inside = np.ones(samples, dtype=bool)
        for stage, mean_cost in enumerate(costs):
            leaves = inside
            if stage < len(row):
                leaves = inside & (records.confidence[stage] >= np.float32(row[stage]))
                inside = inside & ~leaves
            accuracy[number] += np.count_nonzero(records.correct[stage] & leaves)
            cost[number] += np.count_nonzero(leaves) * mean_cost
    return accuracy / samples, cost / samples
