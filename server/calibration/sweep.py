"""The sweep: the whole frontier, solved at once from calibration records. Only numbers here.

Legend: N calibration images, E exits, M bins of confidence per exit.

Theory of operation. Mean cost and accuracy of thresholds (see `server.bundle.frontier`) are sums over a corner of the
(c1, c2) plane: one histogram over the ranks of c1 and c2, summed up along both axes, holds the answer for every pair of
thresholds at once. All (M+1)^2 pairs are sorted by cost, and the running best is the frontier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from server.bundle.frontier import (
    MAX_RECORDS,
    NDIGITS,
    NEVER,
    Criterion,
    Frontier,
    FrontierRow,
    Records,
    evaluate_thresholds,
    mean_cost,
    row_of,
)

_MAX_PAIRS = 1 << 21  # thresholds tried at once; three exits at 1024 bins are half of this


def sweep(
    confidence: ArrayLike,
    correct: ArrayLike,
    stage_gmacs: Sequence[float],
    *,
    key: str = "",
    criterion: Criterion = "max_probability",
    bins: int = 1024,
    max_rows: int = 257,
) -> Frontier:
    """Solve the whole frontier by the rank-histogram sweep (see the module's docstring).

    confidence (E-1, N), correct (E, N), stage_gmacs (E,) cumulative. Thresholds are tried at `bins` quantiles of each
    exit's confidences; with no more distinct confidences than bins the result is exact. Where more than `max_rows`
    rows survive they are thinned evenly along the curve, ends kept. For four exits and more, bins are made fewer so
    that the table stays in memory. A single exit leaves nothing to solve: one row. Raises ValueError for shapes that do
    not fit.
    """
    costs = np.asarray(stage_gmacs, dtype=np.float64)
    records = as_records(confidence, correct, costs)
    exits, samples = records.correct.shape
    return Frontier(
        rows=_solve(records, costs, bins, max_rows) if exits > 1 else (evaluate_thresholds(records, (), costs),),
        stage_gmacs=tuple(map(float, costs)),
        samples=samples,
        key=key,
        exit_accuracy=tuple(round(float(a), NDIGITS) for a in records.correct.mean(axis=1)),
        records=_subsample(records),
        criterion=criterion,
    )


def _solve(records: Records, costs: NDArray[np.float64], bins: int, max_rows: int) -> tuple[FrontierRow, ...]:
    """For two exits and more."""
    exits, samples = records.correct.shape
    bins = max(1, min(bins, int(_MAX_PAIRS ** (1 / (exits - 1))) - 1))

    candidates = [_candidates(row, bins) for row in records.confidence]
    # An image of rank r stays in under candidate j exactly where r < j.
    ranks = [np.searchsorted(c, row, side="right") - 1 for c, row in zip(candidates, records.confidence, strict=True)]
    right = records.correct.astype(np.int64)
    sizes = tuple(len(c) for c in candidates)  # NEVER included: nobody has that rank
    # Tables with one axis per threshold, or 1 where it plays no part: images that reach each stage; right answers.
    reached = [np.full((1,) * len(sizes), samples, dtype=np.int64)]
    hits = np.full((1,) * len(sizes), right[0].sum(), dtype=np.int64)
    flat = np.zeros(samples, dtype=np.int64)
    for stage in range(1, exits):
        shape = sizes[:stage]
        flat = flat * shape[-1] + ranks[stage - 1]
        reached.append(_below(flat, None, shape, len(sizes)))
        hits = hits + _below(flat, right[stage] - right[stage - 1], shape, len(sizes))
    stayed = [*reached[1:], np.zeros((1,) * len(sizes), dtype=np.int64)]
    cost = mean_cost([a - b for a, b in zip(reached, stayed, strict=True)], samples, costs).ravel()

    best = _pareto(cost, hits.ravel())
    best = best[_thin(cost[best], hits.ravel()[best], max_rows)]
    picks = np.stack(np.unravel_index(best, sizes), axis=1)
    rows = []
    for pick in picks:
        left = [int(r[tuple(np.minimum(pick, np.array(r.shape) - 1))]) for r in reached] + [0]
        counts = [a - b for a, b in pairwise(left)]
        thresholds = (*(float(c[j]) for c, j in zip(candidates, pick, strict=True)), 0.0)
        rows.append(row_of(thresholds, counts, int(hits[tuple(pick)]), costs))
    return tuple(rows)


def as_records(confidence: ArrayLike, correct: ArrayLike, costs: NDArray[np.float64]) -> Records:
    """Checked. confidence (E-1, N), correct (E, N), costs (E,). Raises ValueError for what does not fit."""
    c = np.asarray(confidence, dtype=np.float32)
    r = np.asarray(correct, dtype=bool)
    if costs.ndim != 1 or not len(costs) or not np.all(np.isfinite(costs)) or np.any(np.diff(costs) <= 0):
        raise ValueError("stage_gmacs must hold cumulative costs that rise")
    if r.ndim != 2 or r.shape[0] != len(costs) or c.shape != (len(costs) - 1, r.shape[1]) or r.shape[1] == 0:
        raise ValueError(f"{len(costs)} stages, but confidence {c.shape} and correct {r.shape}")
    if not np.all((c >= 0) & (c < NEVER)):  # also refuses NaN
        raise ValueError("a confidence is not between 0 and 1")
    return Records(c, r)


def _candidates(confidence: NDArray[np.float32], bins: int) -> NDArray[np.float32]:
    """Thresholds to try, ascending: 0 (all leave), at most `bins` - 1 of the confidences at even ranks, and NEVER."""
    distinct = np.unique(confidence)
    if len(distinct) > bins:
        ordered = np.sort(confidence)
        distinct = np.unique(ordered[np.arange(bins) * len(ordered) // bins])
    # The smallest confidence and 0 do the same here; only 0 also does it to images that are yet to come.
    distinct[0] = 0
    return np.append(distinct, np.float32(NEVER))


def _below(
    flat: NDArray[np.int64], weights: NDArray[np.int64] | None, shape: tuple[int, ...], axes: int
) -> NDArray[np.int64]:
    """For every j: the sum of weights (1 where None) of the images whose ranks are all below j. Axes padded with 1s."""
    # Whole numbers far below 2**53: exact in the float64 that bincount adds weights in.
    table: NDArray[np.int64] = np.bincount(flat, weights, minlength=math.prod(shape)).reshape(shape).astype(np.int64)
    for axis in range(len(shape)):
        # Nobody has the last rank, so a roll by one turns "up to and including" into "below".
        np.cumsum(table, axis=axis, out=table)
        table = np.roll(table, 1, axis=axis)
        table[(slice(None),) * axis + (0,)] = 0
    return table.reshape(shape + (1,) * (axes - len(shape)))


def _pareto(cost: NDArray[np.float64], hits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the pairs that no other pair beats in cost and accuracy, from cheapest to most accurate."""
    order = np.argsort(cost, kind="stable")
    cost, hits = cost[order], hits[order]
    peak = np.maximum.accumulate(hits)
    rises = np.flatnonzero(np.concatenate([[True], hits[1:] > peak[:-1]]))
    # Of several rises at one cost only the last, the highest, stands.
    last = np.concatenate([cost[rises][1:] > cost[rises][:-1], [True]])
    best: NDArray[np.int64] = order[rises[last]]
    return best


def _thin(cost: NDArray[np.float64], hits: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Positions of at most `limit` rows, ends kept, with even steps along the curve.

    A step is the larger of its shares of the range of cost and of accuracy, so that neither the steep cheap end nor
    the flat dear end is left with wide gaps.
    """
    if len(cost) <= limit:
        return np.arange(len(cost))
    steps = np.maximum(np.diff(cost) / np.ptp(cost), np.diff(hits) / np.ptp(hits))
    along = np.concatenate([[0.0], np.cumsum(steps)])
    # searchsorted from the right: the best row at or below each mark
    picked = np.searchsorted(along, np.linspace(0, along[-1], limit), side="right") - 1
    picked[-1] = len(cost) - 1
    return np.unique(picked)


def _subsample(records: Records) -> Records:
    samples = records.correct.shape[1]
    if samples <= MAX_RECORDS:
        return records
    kept = np.arange(MAX_RECORDS) * samples // MAX_RECORDS
    return Records(records.confidence[:, kept], records.correct[:, kept])
