"""Whether the mean of a stream is still what it should be: a test that may be looked at for ever. Only numbers here.

Theory of operation. Every image gives residuals: what it did less what was to be expected of it, of mean 0 while
nothing has changed. Three things make such a test ring without a cause, and each has its answer:

- Images come in runs: of a video, the next is as hard as the last, and thousands of them say as much as dozens that do
  not know each other. So the variance of a sum is taken from the stream itself, from sums over batches of images in
  succession that are longer than its runs: half the mean square of the difference between one batch and the next. A
  change of level, which is what is looked for, is in only one of the differences. It is never believed to be less than
  that of images that do not know each other. Where few batches stand behind it, t is made a normal z (Wallace, 1959),
  and at the very start runs of three are supposed.
- What is to be expected was itself measured, on so many calibration images, and no traffic corrects that.
- Who looks often sees something some day. When a change began nobody knows; so the newest images are summed up over
  every span from 500 to 10,000, and the span that speaks loudest is heard. For normal sums S of n looks of variance 1

      sum over n of sqrt(g / (n + g)) exp(S^2 / (2 (n + g)))

  is an e-detector (Shin, Ramdas and Rinaldo, 2022: a Shiryaev-Roberts sum over the beginnings of a change, each mixed
  over its sizes): on average it is at least c looks until it exceeds c. With g = 0.08 a z of 5 in any of 20 spans is
  15,000 of it and more: seven million images between two false alarms of one mean. Measured they are rarer, as the
  bound is loose (`benchmarks.drift_alarm`).

Sums of rare events are no normal ones: Bernstein's bound has room for their jumps, each as long as a run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

BATCH = 100  # images
LOOK = 5  # batches between two looks, and in the shortest span
SPAN = 100  # batches, the longest span
MEMORY = 500  # batches that tell the variance
LONGEST = 5  # batches that are joined to one, the most
JOINED = 50  # such are wanted before more are joined
RUN, DOUBT = 3, 12  # while fewer than DOUBT degrees of freedom tell how long runs are, RUN images stand in for the rest


class Change:
    """The last MEMORY batches of residuals."""

    def __init__(self, width: int, samples: int) -> None:
        """`width`: residuals an image. `samples`: calibration images behind what is to be expected."""
        self._samples = samples
        self._batches = np.zeros((MEMORY, 2, width))  # sums of the residuals, and of their squares
        self._count = 0  # batches ever

    def add(self, batch: NDArray[np.float64]) -> None:
        """(2, width) sums over BATCH images in succession: of the residuals, of their squares."""
        self._batches[self._count % MEMORY] = batch
        self._count += 1

    def z(self) -> Vector | None:
        """(width,) how far the means are off 0, in standard errors, each over the span that speaks loudest. None before
        the first span is full."""
        if self._count < LOOK:
            return None
        batches = np.roll(self._batches, -(self._count % MEMORY), axis=0)[-min(self._count, MEMORY) :]
        own, freedom = _run_variance(batches[:, 0])
        newest = batches[: -SPAN - 1 : -1]
        sums, squares = newest.cumsum(axis=0)[LOOK - 1 :: LOOK].swapaxes(0, 1)  # (spans, width)
        images = BATCH * LOOK * np.arange(1, len(sums) + 1)[:, None]
        alone = np.maximum(squares / images, 1 / (images + self._samples))  # variance, if images came one by one
        doubt = max(0.0, 1 - freedom / DOUBT)
        variance = np.maximum((1 - doubt) * own + doubt * RUN * alone, alone)
        jump = variance / alone / 3
        calibration = images**2 * alone / self._samples
        t = sums / np.sqrt(images * variance + np.abs(sums) * jump + calibration)
        z = np.sign(t) * _normal(np.abs(t), max(freedom, DOUBT))
        loudest: Vector = np.take_along_axis(z, np.abs(z).argmax(axis=0)[None], axis=0)[0]
        return loudest


def _run_variance(sums: NDArray[np.float64]) -> tuple[Vector, float]:
    """Of the sums (batches, width) over an image, as long batches tell, and the degrees of freedom of that."""
    joined = max(1, min(LONGEST, len(sums) // JOINED))
    blocks = sums[len(sums) % joined :].reshape(len(sums) // joined, joined, sums.shape[1]).sum(axis=1)
    steps = np.diff(blocks, axis=0)
    variance: Vector = (steps**2).mean(axis=0) / (2 * joined * BATCH)
    return variance, 2 / 3 * len(steps)


def _normal(t: NDArray[np.float64], freedom: float) -> NDArray[np.float64]:
    """The normal deviate that is as rare as t."""
    z: NDArray[np.float64] = np.sqrt(freedom * np.log1p(t**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return z
