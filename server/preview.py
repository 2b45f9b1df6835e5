"""What a budget would have done to the traffic of late, without applying it. Plain: a look-up and some sums.

The live window knows of every image only what the first exit said: where it would have left, and whether rightly, under
other thresholds, nobody has seen. Calibration has seen that, but of its own images. So its records are weighted until
their confidences at the first exit are distributed as the window's (post-stratification over quantile bins), and the
thresholds are evaluated on the weighted records.

Assumed is that traffic differs from the calibration images only in how many images of which first confidence there are:
of two images that the first exit is equally sure of, one from each, the later exits say the same. Harder or easier
traffic of the same kind is like that; images of another kind, on which the model is wrong and sure, are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.budget import Hold, Prediction, Setting, Solution
from server.core import Floats, Mix, OperatingPoint
from server.drift import bins_of, quantile_edges
from server.frontier import Frontier, Records, exits_taken

BINS = 50


@dataclass(frozen=True, slots=True)
class Traffic:
    """Estimates for the traffic in the window."""

    images: int  # in the window
    target: Prediction  # had the budget been in force
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
        traffic=_traffic(frontier, setting, present, window),
    )


def _traffic(frontier: Frontier, wanted: Setting, present: OperatingPoint, window: Floats) -> Traffic | None:
    records = frontier.records
    if records is None or not records.correct.size or not len(window):
        return None
    weights = post_stratify(records.confidence[0], window)
    target, now = (
        _estimate(records, weights, point.thresholds, point.mix, frontier.stage_gmacs) for point in (wanted, present)
    )
    return Traffic(len(window), target, now)


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
