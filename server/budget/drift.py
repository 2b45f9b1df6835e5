"""Whether the traffic still looks like the images that calibration saw. Plain: it counts, without clock or I/O.

Two comparisons, over the last images:

- the histogram of confidence at the first exit, by the population stability index over the deciles of the calibration
  records. What the first exit says of an image does not depend on thresholds, so this goes on over changes of them;
- where images leave, against what calibration says of the operating points that judged them, each image by its own: the
  cost loop moves on every few hundred images, and no point alone sees enough. By one two-proportion z per exit.

An image costs three array writes; the sums wait until somebody asks, or ENOUGH images have come. Both need images
enough to say something. Neither needs labels, and neither says that accuracy has suffered: traffic of easier images
alarms as well. That is what audits estimate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.bundle.frontier import Records
from server.core import Answer, Floats, OperatingPoint

log = logging.getLogger(__name__)

WINDOW = 10_000  # images that are looked back upon
ENOUGH = 500  # images without which nothing is said, and after which it is judged again
MAX_PSI = 0.2  # the customary mark of a population that has shifted
MAX_Z = 4.0
POINTS = 16  # operating points, the last, whose late answers are counted


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
        self._samples = samples
        self._expected = expected
        self._known: dict[OperatingPoint, Sequence[float] | None] = {}  # of the last POINTS, the oldest first
        self._reference: _Histogram | None = None
        if records is not None and records.correct.size:
            self._reference = _Histogram(records.confidence[0])
        self._confidence = np.zeros(WINDOW, dtype=np.float32)
        self._exits = np.zeros(WINDOW, dtype=np.uint8)
        self._fractions = np.zeros((WINDOW, len(point.thresholds)))  # what was to be expected of each of these exits
        self._images = 0  # ever
        self._judged = 0  # of them those whose exits are counted
        self._alarmed = False
        self.retune(point)

    def retune(self, point: OperatingPoint) -> None:
        """Another operating point is in force: other fractions are to be expected, of the images to come."""
        self._known.pop(point, None)  # it becomes the newest
        self._known[point] = self._expected()
        if len(self._known) > POINTS:
            del self._known[next(iter(self._known))]

    def observe(self, answer: Answer, steered: bool) -> None:
        """Count an answered request. `steered`: it brought its own min_confidence or max_exit.

        Where such images left, or degraded ones, says nothing of the traffic. Answers that an earlier point still gives
        do: they are those of the images that went deep, and without them too many would seem to leave early.
        """
        fractions = None if steered else self._known.get(answer.point)
        for result in answer.results:
            self._confidence[self._images % WINDOW] = result.confidences[0]
            self._images += 1
            if fractions is not None and not result.degraded:
                self._exits[self._judged % WINDOW] = result.exit
                self._fractions[self._judged % WINDOW] = fractions
                self._judged += 1
            if self._images % ENOUGH == 0:
                self._judge()

    def confidences(self) -> Floats:
        """(n,) of the last images at the first exit, n at most WINDOW, in no order. A view: copy it to keep it."""
        return self._confidence[: min(self._images, WINDOW)]

    def state(self) -> DriftState:
        psi, z = self._psi(), self._z()
        reasons = []
        if psi is not None and psi > MAX_PSI:
            reasons.append("psi")
        if z is not None and max(map(abs, z)) > MAX_Z:
            reasons.append("exit_fractions")
        return DriftState(len(self.confidences()), psi, z, bool(reasons), tuple(reasons))

    def _judge(self) -> None:
        """Tell the log where an alarm begins and where it ends."""
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

    def _psi(self) -> float | None:
        window = self.confidences()
        if self._reference is None or len(window) < ENOUGH:
            return None
        return round(self._reference.psi(window), 4)

    def _z(self) -> tuple[float, ...] | None:
        images = min(self._judged, WINDOW)
        if images < ENOUGH or self._expected() is None or not self._samples:
            return None
        fractions = self._fractions[:images]
        seen = np.bincount(self._exits[:images], minlength=fractions.shape[1] + 1)[1:] / images
        shares = zip(seen.tolist(), fractions.mean(axis=0).tolist(), fractions.var(axis=0).tolist(), strict=True)
        return tuple(round(_two_proportion_z(p, images, q, self._samples, apart), 2) for p, q, apart in shares)


class _Histogram:
    """The calibration's confidences at exit 1, in deciles."""

    def __init__(self, confidence: Floats) -> None:
        self._edges = quantile_edges(confidence, 10)
        self._shares = self._shares_of(confidence)

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


def _two_proportion_z(p: float, n: int, q: float, m: int, apart: float) -> float:
    """Of the share p among n against q among m, pooled; q is the mean of n chances q_i, and `apart` their variance.

    The variance of n independent draws by chances q_i is n times the mean of q_i (1 - q_i), and that is q (1 - q) less
    `apart`; the errors of the q_i, all from the same m images, vary by no more. One image's at least is allowed for, as
    nothing varies where every q_i is 0 or 1.
    """
    pooled = (n * p + m * q) / (n + m)
    variance = max(pooled * (1 - pooled) - apart, 1 / (n + m))
    return (p - q) / math.sqrt(variance * (1 / n + 1 / m))
