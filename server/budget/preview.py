"""What a budget would have done to the traffic of late, without applying it. Plain: a look-up and some sums.

The live window knows of every image only what the first exit said: where it would have left, and whether rightly, under
other thresholds, nobody has seen. Calibration has seen that, but of its own images. So its records are weighted until
their confidences at the first exit are distributed as the window's (post-stratification over quantile bins), and the
thresholds are evaluated on the weighted records. Where the cost loop would hold a cost, those are the ones at which the
weighted records cost that: about there the loop settles on such traffic, whatever thresholds it begins with.

Assumed is that traffic differs from the calibration images only in how many images of which first confidence there are:
of two images that the first exit is equally sure of, one from each, the later exits say the same. Harder or easier
traffic of the same kind is like that; images of another kind, on which the model is wrong and sure, are not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.budget.controller import Hold, Prediction, Setting, Solution
from server.budget.drift import bins_of, quantile_edges
from server.bundle.frontier import Frontier, FrontierRow, Mixture, Records, exits_taken, upper_hull
from server.core import Floats, Mix, OperatingPoint

BINS = 50


@dataclass(frozen=True, slots=True)
class Traffic:
    """Estimates for the traffic in the window."""

    images: int  # in the window
    thresholds: tuple[float, ...]  # that the budget comes to: where a cost is held, those that cost it on this traffic
    mix: Mix | None
    row: int  # the frontier's row of these, or the next below
    target: Prediction  # had these been in force
    present: Prediction  # by the thresholds that are


@dataclass(frozen=True, slots=True)
class Preview:
    """The answer of POST /budget/preview."""

    target: dict[str, Any]
    hold: Hold
    clamped: bool
    thresholds: tuple[float, ...]  # that the budget begins with
    mix: Mix | None
    predicted: Prediction  # for the calibration images
    traffic: Traffic | None  # None without images in the window, or without calibration records


def preview(frontier: Frontier, solution: Solution, present: OperatingPoint, window: Floats) -> Preview:
    """`solution`: of the target that is asked about. `present`: the point in force. `window` (n,): confidences of the
    last images at the first exit."""
    setting = solution.setting
    return Preview(
        target=solution.target,
        hold=solution.hold,
        clamped=solution.clamped,
        thresholds=setting.thresholds,
        mix=setting.mix,
        predicted=setting.predicted,
        traffic=_traffic(frontier, solution, present, window),
    )


def _traffic(frontier: Frontier, solution: Solution, present: OperatingPoint, window: Floats) -> Traffic | None:
    records = frontier.records
    if records is None or not records.correct.size or not len(window):
        return None
    weights = post_stratify(records.confidence[0], window)
    stage_gmacs = np.asarray(frontier.stage_gmacs)

    def cost(row: FrontierRow) -> float:
        return round(float(weights @ stage_gmacs[exits_taken(records, row.thresholds)]), 9)

    wanted = solution.setting
    if solution.held_gmacs is not None:
        wanted = _held(frontier, solution.held_gmacs, solution.mix, cost)
    row = max(0, bisect_right(frontier.rows, wanted.predicted.gmacs, key=lambda row: row.gmacs) - 1)
    target, now = (
        _estimate(records, weights, point.thresholds, point.mix, frontier.stage_gmacs) for point in (wanted, present)
    )
    return Traffic(len(window), wanted.thresholds, wanted.mix, row, target, now)


def _held(frontier: Frontier, gmacs: float, mix: bool, cost: Callable[[FrontierRow], float]) -> Setting:
    """Where the cost loop settles: the row whose `cost` is at most `gmacs` while the next one's is more (it goes to and
    fro between the two), or the mixture of both that costs `gmacs`. An end of the frontier for a cost beyond it.

    A search by halves: some eight evaluations of `cost`. It finds such a row also where costs do not quite rise.
    """
    rows = upper_hull(frontier.rows) if mix else frontier.rows
    at = max(0, bisect_right(rows, gmacs, key=cost) - 1)
    if not mix:
        return Setting.of(rows[at])
    cheaper, dearer = rows[at], rows[min(at + 1, len(rows) - 1)]
    low, high = cost(cheaper), cost(dearer)
    share = (gmacs - low) / (high - low) if low < gmacs < high else 0.0
    return Setting.of_mixture(Mixture(cheaper, dearer, share))


def post_stratify(sample: Floats, population: Floats) -> NDArray[np.float64]:
    """(N,) weights of sample (N,) that sum up to 1 and spread it over its own quantile bins as population (n,) is."""
    edges = quantile_edges(sample, BINS)
    bins = bins_of(sample, edges)
    shares = np.bincount(bins_of(population, edges), minlength=len(edges) + 1) / len(population)
    weights: NDArray[np.float64] = (shares / np.bincount(bins))[bins]  # no bin of the sample is empty
    return weights


def _estimate(
    records: Records,
    weights: NDArray[np.float64],
    thresholds: Sequence[float],
    mix: Mix | None,
    stage_gmacs: Sequence[float],
) -> Prediction:
    sides = [(thresholds, 1.0)] if mix is None else [(thresholds, 1 - mix.share), (mix.thresholds, mix.share)]
    fractions, accuracy = np.zeros(len(stage_gmacs)), 0.0
    for side, share in sides:
        taken = exits_taken(records, side)
        fractions += share * np.bincount(taken, weights, minlength=len(stage_gmacs))
        accuracy += share * float(weights @ np.take_along_axis(records.correct, taken[None], axis=0)[0])
    return Prediction(
        accuracy=round(accuracy, 6),
        gmacs=round(float(fractions @ np.asarray(stage_gmacs)), 9),
        exit_fractions=tuple(round(float(share), 6) for share in fractions),
    )
