"""Where images would leave, were there no deadlines. Only numbers here.

An image that a deadline cut short at exit k was judged at exits 1 to k and left at none of them. To leave such images
out would leave out the dear ones: who has gone deep has waited longest. They are censored observations; as far as they
went they count like all others, and of the rest nothing is concluded from them.

Assumed is that a deadline does not look at the image: of two images that passed the same exits at the same time, the
one that is cut short would not have gone deeper than the other. The scheduler sees no confidences, so that is how it is
but for times when both the load and the images are harder than at others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ExitCounts:
    """Images by the exit they came to, those that left there and those that were cut short."""

    def __init__(self, exits: int) -> None:
        self._counts = np.zeros((2, exits))

    def add(self, exit: int, cut_short: bool) -> None:
        self._counts[int(cut_short), exit - 1] += 1

    def fade(self, share: float) -> None:
        """Keep this share of what was counted."""
        self._counts *= share

    def absorb(self, other: ExitCounts) -> None:
        self._counts += other._counts

    def fractions(self, expected: Sequence[float]) -> NDArray[np.float64]:
        """(E,) that would leave at each exit, by the product-limit estimate (Kaplan and Meier, 1958): the product of
        the shares, of those judged at each exit, that go on.

        Every share has one image more than was counted, which leaves by the fractions `expected` (E,): where nobody was
        judged these are the estimate, where few were they temper it, and elsewhere one image is nothing.
        """
        left, judged = self._counts[0], self._counts.sum(axis=0)[::-1].cumsum()[::-1]
        reach = remaining(expected)
        prior = np.divide(expected, reach, out=np.ones(len(reach)), where=reach > 0)
        goes_on = 1 - (left[:-1] + prior[:-1]) / (judged[:-1] + 1)
        reached = np.concatenate(([1.0], np.cumprod(goes_on), [0.0]))
        return reached[:-1] - reached[1:]


def remaining(fractions: Sequence[float]) -> NDArray[np.float64]:
    """(E,) the share that comes to each exit."""
    found: NDArray[np.float64] = np.asarray(fractions, dtype=np.float64)[::-1].cumsum()[::-1]
    return found


def foretold(fractions: Sequence[float]) -> NDArray[np.float64]:
    """(2, E, E): where an image leaves, as far as is known of it: [0, k] of one that left at exit k + 1, [1, k] of one
    that was cut short there, which leaves further on with the chances that `fractions` (E,) give to those who pass.

    The mean of this over images that leave by `fractions` is `fractions`, whoever is cut short.
    """
    exits = len(fractions)
    table = np.zeros((2, exits, exits))
    table[0] = np.eye(exits)
    table[1, -1, -1] = 1
    beyond = remaining(fractions)
    for at in range(exits - 1):
        if beyond[at + 1] > 0:
            table[1, at, at + 1 :] = np.asarray(fractions)[at + 1 :] / beyond[at + 1]
        else:  # nobody should have passed
            table[1, at, at + 1] = 1
    return table
