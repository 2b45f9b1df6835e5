"""The operating points that a published checkpoint brings along, as a frontier: it serves before it has seen an image.

The file has 59 rows of thresholds, solved by its authors on their validation images, and the accuracy of each. They are
MSDNet's geometric family, so a row's number alone says what share of the images leaves at each exit; the cost follows
from those shares and our own count of MACs. How many images there were the file does not say: there are no bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.bundle.frontier import NDIGITS, NEVER, Frontier, FrontierRow
from server.bundle.manifest import Manifest
from server.calibration.families import geometric_shares

MAX_COST_DIFFERENCE = 0.05  # of the file's mean costs against ours: more is told


def imported_frontier(
    imported: Mapping[str, Any], manifest: Manifest, notice: Callable[[str], None]
) -> Frontier | None:
    """What `imported`, the entry of that name in a checkpoint's header, says of the bundle's operating points.

    None where it says nothing, and where what it says is malformed: then `notice` is told in one line what is wrong,
    as it is where the costs differ from ours, and where the bundle is in half precision.
    """
    if "dynamic_threshold" not in imported:
        return None
    try:
        return _frontier(imported, manifest, notice)
    except ValueError as error:
        notice(f"the checkpoint's thresholds are left out: {error}")
        return None


def _frontier(imported: Mapping[str, Any], manifest: Manifest, notice: Callable[[str], None]) -> Frontier:
    if manifest.criterion != "max_probability":
        raise ValueError(f"they are for the largest probability, not for {manifest.criterion}")
    if manifest.precision != "fp32":
        notice(f"the checkpoint's thresholds were not solved in {manifest.precision}; calibrate before relying on them")
    macs = np.array(manifest.stage_gmacs)
    shares = geometric_shares(len(macs))  # (59, E)
    points, exits = shares.shape
    given = _numbers(imported, "dynamic_threshold", (points, exits))
    stated_cost, accuracy = _numbers(imported, "budgeted_batch_classification", (2, points))
    exit_accuracy = _numbers(imported, "anytime_classification", (exits,))
    for percent in (accuracy, exit_accuracy):
        if not ((percent >= 0) & (percent <= 100)).all():
            raise ValueError("an accuracy is not a percentage")

    thresholds = np.where(given > 1, NEVER, np.maximum(given, 0))
    thresholds[:, -1] = 0
    fractions = shares / shares.sum(axis=1, keepdims=True)
    cost = fractions @ macs
    if (difference := float(np.abs(stated_cost / cost - 1).max())) > MAX_COST_DIFFERENCE:
        notice(f"the checkpoint's mean costs differ by up to {difference:.0%} from those counted here, which are used")

    rows: list[FrontierRow] = []
    for at in np.argsort(cost):
        row = FrontierRow(
            thresholds=tuple(thresholds[at].tolist()),
            accuracy=round(float(accuracy[at]) / 100, NDIGITS),
            accuracy_lower=None,
            gmacs=round(float(cost[at]), NDIGITS),
            exit_fractions=tuple(round(f, NDIGITS) for f in fractions[at].tolist()),
        )
        if not rows or (row.accuracy > rows[-1].accuracy and row.gmacs > rows[-1].gmacs):
            rows.append(row)
    return Frontier(
        rows=tuple(rows),
        stage_gmacs=manifest.stage_gmacs,
        samples=0,
        key=manifest.frontier_key,
        exit_accuracy=tuple(round(a / 100, NDIGITS) for a in exit_accuracy.tolist()),
        records=None,
        criterion=manifest.criterion,
        source="imported",
    )


def _numbers(imported: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Raises ValueError for an entry that is missing, of another shape, or not finite."""
    if name not in imported:
        raise ValueError(f"{name} is missing")
    try:
        values = np.asarray(imported[name], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # a list in a list may be longer than the next, a number than any
        raise ValueError(f"{name} is no array of numbers") from None
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}, expected {shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite")
    return values
