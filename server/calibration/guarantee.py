"""A promise about a frontier: from which row on, leaving early costs no more accuracy than stated. Only numbers here.

An image's loss is what the last exit would have had right, less what the image's own exit has right: -1, 0 or 1. Rows
are tested from the most accurate to cheaper ones, and the first that fails ends it (fixed-sequence testing): then all
rows passed hold together with the stated confidence, however many there are (Angelopoulos et al., "Learn then Test",
2021). The test is the betting bound of Waudby-Smith and Ramdas ("Estimating means of bounded random variables by
betting", 2020): valid at every sample size, and tight where losses are rare, as they are here.

The images must not have been used to choose the thresholds. To choose a row by its observed loss, without a test,
breaks the promise about every second time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.bundle.frontier import Certificate, FrontierRow, Records, exits_taken

_SEED = 0


def split(records: Records) -> tuple[Records, Records]:
    """Two halves, drawn at random with a fixed seed: one to solve on, one to certify on."""
    order = np.random.default_rng(_SEED).permutation(records.correct.shape[1])
    first, second = np.sort(order[::2]), order[1::2]  # the second stays shuffled: a test reads it in order
    return tuple(Records(records.confidence[:, part], records.correct[:, part]) for part in (first, second))  # type: ignore[return-value]


def certify(
    rows: Sequence[FrontierRow], records: Records, max_accuracy_loss: float, confidence: float
) -> Certificate | None:
    """Test `rows`, cheapest first as in a frontier, on records that they were not solved on, in random order.

    None where not even the most accurate row passes: too few images, or it does lose more. Raises ValueError for a
    loss or a confidence outside of (0, 1).
    """
    if not (0 < max_accuracy_loss < 1 and 0 < confidence < 1):
        raise ValueError("max_accuracy_loss and confidence lie between 0 and 1, both excluded")
    passed = None
    for row in reversed(rows):
        if not _is_below(losses(records, row.thresholds), max_accuracy_loss, 1 - confidence):
            break
        passed = row
    if passed is None:
        return None
    return Certificate(max_accuracy_loss, confidence, records.correct.shape[1], passed.gmacs)


def losses(records: Records, thresholds: Sequence[float]) -> NDArray[np.int8]:
    """Per image, what leaving early loses against the last exit: -1, 0 or 1."""
    correct = records.correct.astype(np.int8)
    taken = np.take_along_axis(correct, exits_taken(records, thresholds)[None], axis=0)[0]
    difference: NDArray[np.int8] = correct[-1] - taken
    return difference


def upper_bound(loss: NDArray[np.int8], confidence: float) -> float:
    """The mean of losses in [-1, 1] that is not exceeded with this confidence, to 1e-4; 1 where nothing is known."""
    low, high = -1.0, 1.0
    while high - low > 1e-4:  # what is below a limit is below every larger one
        middle = (low + high) / 2
        if _is_below(loss, middle, 1 - confidence):
            high = middle
        else:
            low = middle
    return high


def _is_below(loss: NDArray[np.int8], limit: float, delta: float) -> bool:
    """Whether a bettor against "the mean is `limit` or more" multiplies his stake by 1/delta at any time.

    Were it so, each bet would be fair or worse, and that would happen with probability delta at most (Ville).
    """
    if not len(loss):
        return False
    x = (loss.astype(np.float64) + 1) / 2  # into [0, 1]
    m = (limit + 1) / 2
    seen = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (seen + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (seen + 1)
    before = np.concatenate([[0.25], variance[:-1]])  # a bet may know only what came before it
    stake = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (len(x) * before)))
    with np.errstate(divide="ignore"):  # all is lost: log 0
        wealth = np.cumsum(np.log1p(-stake * (x - m)))
    return bool(wealth.max() >= math.log(1 / delta))
