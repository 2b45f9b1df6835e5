"""What a bundle is worth on labelled images: its exits, and its frontier's operating points, through the engine.

The thresholds come from calibration, the figures from other images: that difference is the point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.bundle.frontier import NEVER, Frontier, FrontierRow, Records, evaluate_thresholds
from server.calibration.families import geometric

SHARES = (0.25, 0.5, 0.75)  # of the last exit's cost: the budgets that tables show


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Per exit, all images leaving there: `exit_accuracy`, and cumulative `stage_gmacs`. `points`: rows of the
    calibrated frontier as they turn out here, by share of the last exit's cost. `area`: mean accuracy over budgets
    from the first exit's cost to the last's, of the frontier and of the geometric family, both calibrated alike; the
    latter is left out, {} and None, where there is nothing to choose, with a single exit, and where the frontier was
    imported and has no records to fit it to."""

    images: int
    exit_accuracy: tuple[float, ...]
    stage_gmacs: tuple[float, ...]
    points: dict[str, FrontierRow]
    geometric_points: dict[str, FrontierRow]
    area: float
    geometric_area: float | None


def evaluate(frontier: Frontier, records: Records) -> Evaluation:
    """Judge a calibrated frontier by records of other images."""
    costs = frontier.stage_gmacs
    swept = frontier.rows
    logged = frontier.records
    chooses = len(costs) > 1
    family = geometric(logged.confidence, logged.correct, costs) if logged is not None and chooses else ()
    return Evaluation(
        images=records.correct.shape[1],
        exit_accuracy=tuple(map(float, records.correct.mean(axis=1))),
        stage_gmacs=costs,
        points=_points(swept, records, costs),
        geometric_points=_points(family, records, costs) if family else {},
        area=_area(swept, records, costs),
        geometric_area=_area(family, records, costs) if family else None,
    )


def budget_area(rows: Sequence[FrontierRow], low: float, high: float) -> float:
    """Mean accuracy over budgets from `low` to `high` GMAC: the area under the budget curve, divided by its width.

    Between two rows the curve is a straight line (what mixing the two gives), beyond the last it is flat. `low` must
    not be cheaper than the cheapest row.
    """
    ordered = sorted(rows, key=lambda row: (row.gmacs, row.accuracy))
    costs = np.array([row.gmacs for row in ordered])
    if not costs[0] <= low < high:
        raise ValueError(f"budgets {low} to {high}: the cheapest row costs {costs[0]}")
    best = np.maximum.accumulate([row.accuracy for row in ordered])
    corners = np.unique(np.concatenate([[low, high], costs[(costs > low) & (costs < high)]]))
    return float(np.trapezoid(np.interp(corners, costs, best), corners) / (high - low))


def _points(rows: Sequence[FrontierRow], records: Records, costs: Sequence[float]) -> dict[str, FrontierRow]:
    """The most accurate row that calibration says a budget affords, as it turns out on the records."""
    points = {}
    for share in SHARES:
        affordable = [row for row in rows if row.gmacs <= share * costs[-1]]
        if affordable:
            chosen = max(affordable, key=lambda row: row.accuracy)
            points[f"{share:.0%}"] = evaluate_thresholds(records, chosen.thresholds, costs)
    knee = max(rows, key=lambda row: row.accuracy)
    points["knee"] = evaluate_thresholds(records, knee.thresholds, costs)
    return points


def _area(rows: Sequence[FrontierRow], records: Records, costs: Sequence[float]) -> float:
    """Calibrated rows as they turn out, with both ends: everybody leaves at the first exit, or at the last."""
    if len(costs) == 1:  # one cost, one accuracy
        return float(records.correct.mean())
    never = [NEVER] * (len(costs) - 1)
    ends = [evaluate_thresholds(records, thresholds, costs) for thresholds in ([0.0] * len(never), never)]
    turned_out = [evaluate_thresholds(records, row.thresholds, costs) for row in rows]
    return budget_area([*turned_out, *ends], costs[0], costs[-1])
