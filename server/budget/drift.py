"""Whether the traffic still looks like the images that calibration saw. Plain: it counts, without clock or I/O.

Two comparisons, over the last images:

- the histogram of confidence at the first exit, by the population stability index over the deciles of the calibration
  records. What the first exit says of an image does not depend on thresholds, so this goes on over changes of them. Of
  few images, or of images in runs, chance alone makes any index: it alarms where also the share of images below some
  decile is off by more than chance allows;
- where images leave, against what calibration says of the operating points that judged them, each image by its own: the
  cost loop moves on every few hundred images, and no point alone sees enough. An image that a deadline cut short counts
  as far as it went (`survival.foretold`).

What chance allows, by images in runs and for one who looks for ever, is the business of `change`.

An image costs two array writes; the sums wait until ENOUGH images have come. Neither needs labels, and neither says
that accuracy has suffered: traffic of easier images alarms as well. That is what audits estimate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.budget.change import BATCH, LOOK, SPAN, Change
from server.budget.survival import foretold
from server.bundle.frontier import Records
from server.core import Answer, Floats, OperatingPoint

log = logging.getLogger(__name__)

WINDOW = SPAN * BATCH  # images that are looked back upon
ENOUGH = LOOK * BATCH  # images without which nothing is said, and after which it is judged again
MAX_PSI = 0.2  # the customary mark of a population that has shifted
MAX_Z = 5.0
POINTS = 64  # operating points, the last, whose late answers are counted: under overload twenty come in a second


@dataclass(frozen=True, slots=True)
class DriftState:
    """`drift` in the body of GET and PUT /budget."""

    images: int  # in the window
    psi: float | None  # None with too few images, or without calibration records
    z: tuple[float, ...] | None  # per exit; None with too few images, or with a point in force that is unknown
    alarm: bool
    reasons: tuple[str, ...]  # what alarms: "psi", "exit_fractions"


class Drift:
    """Owns the window of the last images, at most WINDOW."""

    def __init__(
        self,
        records: Records | None,
        samples: int,
        expected: Callable[[], Sequence[float] | None],
        point: OperatingPoint,
    ) -> None:
        """`samples`: images behind `expected`, which gives the exit fractions that calibration predicts for the point
        in force, or None where it cannot. `records`: None where there are none."""
        self._expected = expected
        self._known: dict[OperatingPoint, NDArray[np.float64] | None] = {}  # of the last POINTS, the oldest first
        self._histogram: _Histogram | None = None
        if records is not None and records.confidence.size:  # a single exit has none
            self._histogram = _Histogram(records.confidence[0])
        self._confidence = np.zeros(WINDOW, dtype=np.float32)
        self._images = 0  # ever
        self._exits = _Exits(len(point.thresholds), samples) if samples else None
        self._judged_at = 0  # how many images there were when the last came whose exit counts
        self._psi: float | None = None
        self._alarmed = False
        self.retune(point)

    def retune(self, point: OperatingPoint) -> None:
        """Another operating point is in force: other fractions are to be expected, of the images to come."""
        fractions = self._expected()
        self._known.pop(point, None)  # it becomes the newest
        self._known[point] = None if fractions is None else _residuals(fractions)
        if len(self._known) > POINTS:
            del self._known[next(iter(self._known))]

    def observe(self, answer: Answer, steered: bool) -> None:
        """Count an answered request. `steered`: it brought its own min_confidence or max_exit.

        Where such images left says nothing of the traffic. Answers that an earlier point still gives do: they are those
        of the images that went deep, and without them too many would seem to leave early.
        """
        residuals = None if steered or self._exits is None else self._known.get(answer.point)
        for result in answer.results:
            self._confidence[self._images % WINDOW] = result.confidences[0]
            self._images += 1
            if residuals is not None and self._exits is not None:
                self._exits.add(residuals[int(result.degraded), result.exit - 1])
                self._judged_at = self._images
            if self._images % ENOUGH == 0:
                self._judge()

    def confidences(self) -> Floats:
        """(n,) of the last images at the first exit, n at most WINDOW, in no order. A view: copy it to keep it."""
        return self._confidence[: min(self._images, WINDOW)]

    def state(self) -> DriftState:
        """As it was judged last: to look more often is no other test."""
        z = None if self._exits is None or self._expected() is None else self._exits.z
        reasons = []
        if self._psi is not None and self._psi > MAX_PSI and self._histogram is not None and self._histogram.z > MAX_Z:
            reasons.append("psi")
        if z is not None and max(map(abs, z)) > MAX_Z:
            reasons.append("exit_fractions")
        return DriftState(len(self.confidences()), self._psi, z, bool(reasons), tuple(reasons))

    def _judge(self) -> None:
        """Look at the sums; tell the log where an alarm begins and where it ends."""
        if self._histogram is not None:
            at = (self._images - ENOUGH) % WINDOW
            self._histogram.add(self._confidence[at : at + ENOUGH])
            self._psi = round(self._histogram.psi(self.confidences()), 4)
        if self._exits is not None:
            if self._images - self._judged_at >= WINDOW:
                self._exits.forget()
            self._exits.judge()
        state = self.state()
        if state.alarm and not self._alarmed:
            log.warning(
                "the traffic has drifted from the calibration images (%s): PSI %s, z by exit %s",
                ", ".join(state.reasons),
                state.psi,
                state.z,
            )
        elif self._alarmed and not state.alarm:
            log.info("the traffic looks like the calibration images again")
        self._alarmed = state.alarm


class _Exits:
    """Where images leave, less where they should."""

    def __init__(self, exits: int, samples: int) -> None:
        self._width, self._samples = exits, samples
        self.z: tuple[float, ...] | None = None  # as judged last
        self.forget()

    def forget(self) -> None:
        self._change = Change(self._width, self._samples)
        self._batch = np.zeros((2, self._width))
        self._images = 0  # in the batch

    def add(self, residual: NDArray[np.float64]) -> None:
        """(2, E) of an image: residuals and their squares."""
        self._batch += residual
        self._images += 1
        if self._images == BATCH:
            self._change.add(self._batch)
            self._batch[:] = 0
            self._images = 0

    def judge(self) -> None:
        found = self._change.z()
        self.z = None if found is None else tuple(round(z, 2) for z in found.tolist())


def _residuals(fractions: Sequence[float]) -> NDArray[np.float64]:
    """(2, E, 2, E): of an image that left, or was cut short, at each exit, the residuals and their squares."""
    residuals = foretold(fractions) - np.asarray(fractions)
    return np.stack([residuals, residuals**2], axis=2)


class _Histogram:
    """The calibration's confidences at exit 1, in deciles, and how the traffic's lie in them."""

    def __init__(self, confidence: Floats) -> None:
        self._edges = quantile_edges(confidence, 10)
        self._shares = self._shares_of(confidence)
        self._below = np.searchsorted(np.sort(confidence), self._edges, side="left") / len(confidence)
        self._change = Change(len(self._edges), len(confidence))
        self.z = 0.0  # of the share that lies below some decile, the largest

    def add(self, newest: Floats) -> None:
        """(ENOUGH,) in the order in which they came."""
        residuals = (newest[:, None] < self._edges) - self._below
        batches = np.stack([residuals, residuals**2], axis=1).reshape(LOOK, BATCH, 2, -1).sum(axis=1)
        for batch in batches:
            self._change.add(batch)
        z = self._change.z()
        self.z = 0.0 if z is None else float(np.abs(z).max(initial=0.0))

    def psi(self, confidence: Floats) -> float:
        """The population stability index: 0 for equal shares, symmetric."""
        p, q = self._shares_of(confidence), self._shares
        return float(((p - q) * np.log(p / q)).sum())

    def _shares_of(self, confidence: Floats) -> NDArray[np.float64]:
        # Half an image more in every bin: an empty one has no logarithm.
        counts = np.bincount(bins_of(confidence, self._edges), minlength=len(self._edges) + 1) + 0.5
        shares: NDArray[np.float64] = counts / counts.sum()
        return shares


def quantile_edges(values: Floats, bins: int) -> Floats:
    """The inner edges, rising, that part values (N,) into at most so many bins of about equal size, none of them empty:
    fewer where values repeat."""
    ordered = np.sort(values)
    edges = np.unique(ordered[np.arange(1, bins) * len(ordered) // bins])
    inner: Floats = edges[edges > ordered[0]]
    return inner


def bins_of(values: Floats, edges: Floats) -> NDArray[np.intp]:
    """(N,) the bin of each value, from 0; an edge belongs to the bin above it."""
    return np.searchsorted(edges, values, side="right")
