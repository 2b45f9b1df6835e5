"""What a budget would have done to the traffic of late, without applying it. Plain: a look-up and some sums.

The live window knows of every image only what the first exit said: where it would have left, and whether rightly, under
other thresholds, nobody has seen. Calibration has seen that, but of its own images. So its records are weighted until
their confidences at the first exit are distributed as the window's (post-stratification over quantile bins), and the
thresholds are evaluated on the weighted records. Where the cost loop would hold a cost, those are the ones at which the
weighted records cost that: about there the loop settles on such traffic, whatever thresholds it begins with.

Assumed is that traffic differs from the calibration images only in how many images of which first confidence there are:
of two images that the first exit is equally sure of, one from each, the later exits say the same. Harder or easier
traffic of the same kind is like that; images of another kind, on which the model is wrong and sure, are not.

Records of one bin have one weight. So of an operating point a small table is enough, what each bin's records do under
it, and the window is no more than the share of its images in each bin. The tables of the frontier's rows are made once;
any other thresholds take some ten passes over bits. A preview of any kind stays well below a millisecond: it is made on
the event loop, and anybody may ask for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.budget.controller import Hold, Prediction, Setting, Solution
from server.budget.drift import bins_of, quantile_edges
from server.bundle.frontier import NDIGITS, Frontier, FrontierRow, Mixture, Records, who_leaves
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


class Previewer:
    """Previews on one frontier. Nothing in it changes."""

    def __init__(self, frontier: Frontier) -> None:
        """Takes some 50 microseconds a row, and so blocks: make it before the loop is busy."""
        self._frontier = frontier
        records = frontier.records
        self._binned = None if records is None or not records.correct.size else _Binned(records)
        if self._binned is not None:
            self._tables = np.stack([self._binned.table(row.thresholds) for row in frontier.rows])  # (R, M, E + 1)
            self._at = {row.thresholds: at for at, row in enumerate(frontier.rows)}
            self._gmacs = self._tables[:, :, :-1] @ np.asarray(frontier.stage_gmacs)  # (R, M)

    def preview(self, solution: Solution, present: OperatingPoint, window: Floats) -> Preview:
        """`solution`: of the target that is asked about. `present`: the point in force. `window` (n,): confidences of
        the last images at the first exit."""
        setting = solution.setting
        return Preview(
            target=solution.target,
            hold=solution.hold,
            clamped=solution.clamped,
            thresholds=setting.thresholds,
            mix=setting.mix,
            predicted=setting.predicted,
            traffic=None if self._binned is None or not len(window) else self._traffic(solution, present, window),
        )

    def _traffic(self, solution: Solution, present: OperatingPoint, window: Floats) -> Traffic:
        assert self._binned is not None
        shares = self._binned.shares(window)
        wanted = solution.setting
        if solution.held_gmacs is not None:
            wanted = self._held(solution.held_gmacs, solution.mix, shares)
        row = max(0, bisect_right(self._frontier.rows, wanted.predicted.gmacs, key=lambda row: row.gmacs) - 1)
        target, now = (self._estimate(point.thresholds, point.mix, shares) for point in (wanted, present))
        return Traffic(len(window), wanted.thresholds, wanted.mix, row, target, now)

    def _held(self, gmacs: float, mix: bool, shares: NDArray[np.float64]) -> Setting:
        """Where the cost loop settles: the row whose cost on this traffic is at most `gmacs` while the next one's is
        more (it goes to and fro between the two), or the mixture of both that costs `gmacs`. An end of the frontier for
        a cost beyond it.

        Searched by halves: that finds such a row also where costs do not quite rise.
        """
        costs = (self._gmacs @ shares).round(NDIGITS).tolist()

        def cost(row: FrontierRow) -> float:
            return costs[self._at[row.thresholds]]  # type: ignore[no-any-return]

        rows = self._frontier.hull if mix else self._frontier.rows
        at = max(0, bisect_right(rows, gmacs, key=cost) - 1)
        if not mix:
            return Setting.of(rows[at])
        cheaper, dearer = rows[at], rows[min(at + 1, len(rows) - 1)]
        low, high = cost(cheaper), cost(dearer)
        share = (gmacs - low) / (high - low) if low < gmacs < high else 0.0
        return Setting.of_mixture(Mixture(cheaper, dearer, share))

    def _estimate(self, thresholds: Sequence[float], mix: Mix | None, shares: NDArray[np.float64]) -> Prediction:
        means = shares @ self._table(thresholds)
        if mix is not None:
            means = (1 - mix.share) * means + mix.share * (shares @ self._table(mix.thresholds))
        *fractions, accuracy = means.tolist()
        return Prediction(
            accuracy=round(accuracy, 6),
            gmacs=round(float(means[:-1] @ np.asarray(self._frontier.stage_gmacs)), NDIGITS),
            exit_fractions=tuple(round(share, 6) for share in fractions),
        )

    def _table(self, thresholds: Sequence[float]) -> NDArray[np.float64]:
        assert self._binned is not None
        at = self._at.get(tuple(thresholds))
        return self._binned.table(thresholds) if at is None else self._tables[at]


class _Binned:
    """Calibration records, ordered by the bin of their first confidence. M bins."""

    def __init__(self, records: Records) -> None:
        # A single exit has no thresholds, and no confidence is recorded: one bin.
        first = records.confidence[0] if len(records.confidence) else np.zeros(records.correct.shape[1], np.float32)
        self._edges = quantile_edges(first, BINS)
        bins = bins_of(first, self._edges)
        order = bins.argsort(kind="stable")
        self._records = Records(
            np.ascontiguousarray(records.confidence[:, order]), np.ascontiguousarray(records.correct[:, order])
        )
        self._sizes = np.bincount(bins)  # (M,), none of them 0
        self._starts = self._sizes.cumsum() - self._sizes

    def shares(self, window: Floats) -> NDArray[np.float64]:
        """(M,) of the window's images, those in each bin. A record's weight is this over the records of its bin."""
        # As `bins_of` counts, in a third of the time: a processor guesses a search by halves wrongly at every half.
        below = [np.count_nonzero(window < edge) for edge in self._edges]
        shares: NDArray[np.float64] = np.diff(below, prepend=0, append=len(window)) / len(window)
        return shares

    def table(self, thresholds: Sequence[float]) -> NDArray[np.float64]:
        """(M, E + 1) of a bin's records under such thresholds: the share that leaves at each exit, and the accuracy."""
        leaving = who_leaves(self._records, thresholds)
        right = np.logical_or.reduce([here & right for here, right in zip(leaving, self._records.correct, strict=True)])
        counts = [np.add.reduceat(bits.view(np.int8), self._starts, dtype=np.int32) for bits in (*leaving, right)]
        table: NDArray[np.float64] = np.stack(counts, axis=1) / self._sizes[:, None]
        return table
