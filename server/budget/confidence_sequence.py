"""A mean with an interval that may be looked at whenever one likes. Only numbers here.

An ordinary 95 % interval holds at one sample size fixed in advance; who watches it and acts when it looks convincing is
wrong far more often. A confidence sequence holds at all times at once.

The predictable plug-in empirical-Bernstein sequence of Waudby-Smith and Ramdas ("Estimating means of bounded random
variables by betting", 2020, theorem 2): no assumption but the range, and narrow where the observations vary little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_MAX_WEIGHT = 0.5  # c of the theorem; below 1


@dataclass(frozen=True, slots=True)
class Interval:
    """None before the first observation."""

    mean: float | None
    low: float | None
    high: float | None


class ConfidenceSequence:
    """Observations in [0, 1], each of the same mean given those before it. O(1) per observation and in memory.

    Where the mean changes on the way, what is enclosed is its average over the observations, weighted as `mean` is;
    therefore the intervals of earlier times are not intersected, although a constant mean would allow it.
    """

    def __init__(self, confidence: float = 0.95) -> None:
        """Raises ValueError for a confidence outside of (0, 1)."""
        if not 0 < confidence < 1:
            raise ValueError(f"confidence lies between 0 and 1, both excluded, not {confidence!r}")
        self._log = math.log(2 / (1 - confidence))
        self.count = 0
        self._sum = 0.0
        self._squares = 0.0  # sum of (x - mean so far)^2
        self._weights = 0.0
        self._weighted = 0.0  # sum of weight * x
        self._penalty = 0.0

    def observe(self, x: float) -> None:
        """Raises ValueError for what is not in [0, 1]."""
        if not 0 <= x <= 1:
            raise ValueError(f"{x!r} is not between 0 and 1")
        # Mean and variance of what came before, with half an observation's worth of prior: a weight may not know x.
        before = (0.5 + self._sum) / (self.count + 1)
        variance = (0.25 + self._squares) / (self.count + 1)
        self.count += 1
        weight = min(_MAX_WEIGHT, math.sqrt(2 * self._log / (variance * self.count * math.log1p(self.count))))
        self._weights += weight
        self._weighted += weight * x
        self._penalty += (x - before) ** 2 * (-math.log1p(-weight) - weight)
        self._sum += x
        self._squares += (x - (0.5 + self._sum) / (self.count + 1)) ** 2

    def interval(self) -> Interval:
        if not self.count:
            return Interval(None, None, None)
        mean, radius = self._weighted / self._weights, (self._log + self._penalty) / self._weights
        return Interval(round(mean, 6), round(max(0.0, mean - radius), 6), round(min(1.0, mean + radius), 6))
