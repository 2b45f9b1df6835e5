"""What a batch costs in seconds, by stage and size: the numbers that batches are formed and budgets are solved with.

Only numbers live here: no clock, no engine. A stage's cost is c(n) = a + b*n seconds for n images where that straight
line fits what was measured within 10 %, else the measured points joined, made monotone. Stages count from 1.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

TOLERANCE = 0.10  # a straight line that is off by more than this is not used


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage. Measured at `batches`; what lies between and beyond follows."""

    batches: tuple[int, ...]  # sizes, rising
    p50: tuple[float, ...]  # seconds
    p99: tuple[float, ...]
    fixed: float = field(init=False)  # a, seconds a batch
    per_image: float = field(init=False)  # b, seconds an image
    linear: bool = field(init=False)
    _joints: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for points that are none."""
        sizes, points = self.batches, self.p50
        if not sizes or len(points) != len(sizes) or len(self.p99) != len(sizes):
            raise ValueError("as many seconds as batch sizes are needed, at least one")
        if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"batch sizes {list(sizes)} do not rise from 1 or more")
        if not all(np.isfinite(s) and s >= 0 for s in (*points, *self.p99)):
            raise ValueError("seconds must be finite and not negative")
        a, b = _fit(sizes, points)
        off = max(abs(a + b * n - s) - TOLERANCE * s for n, s in zip(sizes, points, strict=True))
        object.__setattr__(self, "fixed", a)
        object.__setattr__(self, "per_image", b)
        object.__setattr__(self, "linear", off <= 1e-12)
        object.__setattr__(self, "_joints", tuple(accumulate(points, max)))

    @classmethod
    def line(cls, fixed: float, per_image: float, largest: int = 256) -> StageCost:
        """c(n) = fixed + per_image * n, as stated and not measured."""
        points = (fixed + per_image, fixed + per_image * largest)
        return cls((1, largest), points, points)

    def seconds(self, batch: int) -> float:
        """Of a batch of so many images, p50. Beyond the largest measured one its cost per image stays."""
        if self.linear:
            return self.fixed + self.per_image * batch
        sizes, joints = self.batches, self._joints
        if batch <= sizes[0]:
            return joints[0]
        if batch >= sizes[-1]:
            return joints[-1] * batch / sizes[-1]
        at = bisect_right(sizes, batch)
        share = (batch - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return joints[at - 1] + share * (joints[at] - joints[at - 1])


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """All stages of one engine on one machine."""

    stages: tuple[StageCost, ...]

    @classmethod
    def lines(cls, fixed: Sequence[float], per_image: Sequence[float], largest: int = 256) -> LatencyProfile:
        """a_i and b_i, in seconds, as stated and not measured."""
        return cls(tuple(StageCost.line(a, b, largest) for a, b in zip(fixed, per_image, strict=True)))

    def seconds(self, stage: int, batch: int) -> float:
        return self.stages[stage - 1].seconds(batch)


def _fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b), neither negative: least squares of the relative error, so that small batches count as much as large."""
    n, s = np.asarray(sizes, dtype=np.float64), np.maximum(seconds, 1e-12)
    if len(n) == 1:
        return 0.0, float(s[0] / n[0])
    columns = np.stack([1 / s, n / s], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, np.ones(len(n)), rcond=None)
    if b < 0:
        return float((1 / s).sum() / (1 / s**2).sum()), 0.0
    if a < 0:
        return 0.0, float((n / s).sum() / ((n / s) ** 2).sum())
    return float(a), float(b)
