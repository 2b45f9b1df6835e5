"""A weighted mean with an interval that may be looked at whenever one likes. Only numbers here.

An ordinary 95 % interval holds at one sample size fixed in advance; who watches it and acts when it looks convincing is
wrong far more often. A confidence sequence holds at all times at once.

The empirical-Bernstein sequence of Waudby-Smith and Ramdas ("Estimating means of bounded random variables by betting",
2020, theorem 2): no assumption but the range, and narrow where the observations vary little. Their stake on each
observation is tuned as observations come, so that what is enclosed is an average by stakes. Here observations have
weights of their own, and what is to be enclosed is the average by those. So every stake is a fixed rate times the
weight, for several rates at once, each with its share of the error; the one that is narrowest at the moment speaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# 1/2, 1/4 ...: a rate is best at some amount of evidence, and as good as useless where its stakes would pass 1.
_RATES = tuple(2.0**-step for step in range(1, 41))


@dataclass(frozen=True, slots=True)
class Interval:
    """None before the first observation."""

    mean: float | None
    low: float | None
    high: float | None


class ConfidenceSequence:
    """Observations in [0, 1], with weights above 0 that are known before the observation is. O(1) in time and memory.

    What is enclosed is the average, by weights, of what each observation was expected to be given those before it. It
    may change on the way; therefore the intervals of earlier times are not intersected, although a constant mean would
    allow it. The sum of the weights may jump: one observation of a weight that dwarfs all others leaves little known.
    """

    def __init__(self, confidence: float = 0.95) -> None:
        """Raises ValueError for a confidence outside of (0, 1)."""
        if not 0 < confidence < 1:
            raise ValueError(f"confidence lies between 0 and 1, both excluded, not {confidence!r}")
        # The shares of the error, 1 / (step (step + 1)), add up to less than 1.
        self._logs = [math.log(2 * step * (step + 1) / (1 - confidence)) for step in range(1, len(_RATES) + 1)]
        self._penalties = [0.0] * len(_RATES)
        self.count = 0
        self._sum = 0.0
        self._weights = 0.0
        self._weighted = 0.0  # sum of weight * x

    def observe(self, x: float, weight: float = 1.0) -> None:
        """Raises ValueError for an x outside of [0, 1] and for a weight that is not above 0 and finite."""
        if not 0 <= x <= 1:
            raise ValueError(f"{x!r} is not between 0 and 1")
        if not 0 < weight < math.inf:
            raise ValueError(f"a weight is above 0 and finite, not {weight!r}")
        before = (0.5 + self._sum) / (self.count + 1)  # may not know x; with one observation's worth of prior
        surprise = (x - before) ** 2
        for step, rate in enumerate(_RATES):
            stake = rate * weight
            self._penalties[step] += surprise * (-math.log1p(-stake) - stake) if stake < 1 else math.inf
        self.count += 1
        self._sum += x
        self._weights += weight
        self._weighted += weight * x

    def interval(self) -> Interval:
        if not self.count:
            return Interval(None, None, None)
        radius = min(
            (log + penalty) / rate for log, penalty, rate in zip(self._logs, self._penalties, _RATES, strict=True)
        )
        mean, radius = self._weighted / self._weights, radius / self._weights
        return Interval(round(mean, 6), round(max(0.0, mean - radius), 6), round(min(1.0, mean + radius), 6))
