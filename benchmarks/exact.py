"""The best thresholds of a three-exit cascade within a budget, exactly: what other solvers are compared with.

As the first threshold rises, images enter stage 2 one by one. A tree over the ranks of their second confidence keeps,
for each span of ranks, how many images it holds, what they gain if they go on to stage 3, and the best that a beginning
of the span gains. So the best second threshold for a first one is found in O(log N), and all of it in O(N log N).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class PrefixTree:
    """A list of (count, gain), all zeros at first; answers for its beginnings of at most so many counts."""

    def __init__(self, length: int) -> None:
        self._leaves = 1 << max(length - 1, 0).bit_length()
        self._count = [0] * (2 * self._leaves)
        self._gain = [0] * (2 * self._leaves)
        self._best = [0] * (2 * self._leaves)  # the empty beginning gains 0

    def add(self, at: int, count: int, gain: int) -> None:
        node = at + self._leaves
        self._count[node] += count
        self._gain[node] += gain
        self._best[node] = max(0, self._gain[node])
        while node > 1:
            node //= 2
            left, right = 2 * node, 2 * node + 1
            self._count[node] = self._count[left] + self._count[right]
            self._gain[node] = self._gain[left] + self._gain[right]
            self._best[node] = max(self._best[left], self._gain[left] + self._best[right])

    def best(self, most: int) -> int | None:
        """The largest gain of a beginning whose counts add up to at most `most`; None below zero."""
        if most < 0:
            return None
        if self._count[1] <= most:
            return self._best[1]
        node, gain, best = 1, 0, 0
        while node < self._leaves:
            left = 2 * node
            if self._count[left] <= most:
                most -= self._count[left]
                best = max(best, gain + self._best[left])
                gain += self._gain[left]
                node = left + 1
            else:
                node = left
        return best


def exact_best(
    confidence: NDArray[np.float32], correct: NDArray[np.bool_], stage_gmacs: Sequence[float], budget: float
) -> float | None:
    """The best accuracy at a mean cost of at most `budget`; None where even the first exit costs more.

    confidence (2, N), correct (3, N), stage_gmacs (3,) cumulative. Images of equal confidence leave together.
    """
    first, second, third = stage_gmacs
    samples = confidence.shape[1]
    gain12 = (correct[1].astype(int) - correct[0]).tolist()
    gain23 = (correct[2].astype(int) - correct[1]).tolist()
    values, ranks = np.unique(confidence[1], return_inverse=True)
    rank2 = ranks.tolist()
    tree = PrefixTree(len(values))
    order = np.argsort(confidence[0], kind="stable").tolist()
    values1 = confidence[0].tolist()
    hits = int(correct[0].sum())
    best: int | None = None
    at = 0
    while True:  # the images before `at` have entered stage 2
        left = (budget - first) * samples - (second - first) * at
        gained = tree.best(int(np.floor(left / (third - second) + 1e-6)))
        if gained is not None and (best is None or hits + gained > best):
            best = hits + gained
        if at == samples:
            return None if best is None else best / samples
        value = values1[order[at]]
        while at < samples and values1[order[at]] == value:
            image = order[at]
            hits += gain12[image]
            tree.add(rank2[image], 1, gain23[image])
            at += 1
