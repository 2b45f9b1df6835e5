"""What the exits say of images, without a model: records as calibration logs them, synthetic ones, and draws of them.

A record is one image: its confidence at every exit but the last, and whether each exit is right (`frontier.Records`).
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from server.bundle.frontier import Records


def synthetic(samples: int, seed: int = 0, exits: int = 3) -> Records:
    """Images of normal difficulty; deeper exits are better, and surer.

    `offline.thresholds_for` gives the thresholds at which chosen fractions of them leave.
    """
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=samples)
    depth = np.arange(exits)[:, None]
    certainty = ease * (1.2 + 0.2 * depth) + 1 + 0.6 * depth + rng.normal(size=(exits, samples)) * 0.6
    confidence = 1 / (1 + np.exp(-certainty))
    return Records(confidence[:-1].astype(np.float32), rng.random((exits, samples)) < confidence)


def draw(
    records: Records, count: int, seed: int, *, correlation: float = 0.0, shift: ArrayLike = 0.0
) -> NDArray[np.int64]:
    """Which record comes when, (count,): independent draws, or hard ones in runs.

    The latent difficulty of the images is an AR(1) process of unit variance, and `correlation` that of two images in
    succession. `shift`, a number or (count,), moves it: 0.5 is input that is harder by half a standard deviation. The
    record drawn is the one whose rank in difficulty (how unsure the exits are, all together) is as high.

    Raises ValueError for a correlation outside [0, 1).
    """
    if not 0 <= correlation < 1:
        raise ValueError(f"correlation must be in [0, 1), not {correlation}")
    latent = np.random.default_rng(seed).normal(size=count)
    if correlation:
        fresh = np.sqrt(1 - correlation**2)
        for at in range(1, count):
            latent[at] = correlation * latent[at - 1] + fresh * latent[at]
    ranks = records.confidence.argsort(axis=1).argsort(axis=1)
    from_easy_to_hard = np.argsort(-ranks.sum(axis=0), kind="stable")
    samples = len(from_easy_to_hard)
    below = np.vectorize(NormalDist().cdf, otypes=[float])(latent + shift) if count else latent
    return from_easy_to_hard[np.minimum((below * samples).astype(np.int64), samples - 1)]
