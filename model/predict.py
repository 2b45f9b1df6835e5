"""Inference that stops: every batch goes through the first stage, and what is unsure of several batches goes on as one,
as in the server. For trying a model out; nothing here is fast beyond that.

Shapes: B images, E exits, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.reuse import ReuseState
from model.stage import Stage


class Predictions(NamedTuple):
    classes: Tensor  # (B,) the most probable one
    confidence: Tensor  # (B,) its probability
    exits: Tensor  # (B,) where the image left, from 1
    probabilities: Tensor  # (B, K)


class _Waiting(NamedTuple):
    """Images before a stage: their places in the input, and what the stage before left of them."""

    places: Tensor
    state: ReuseState | None

    def rows(self, wanted: slice | Tensor) -> _Waiting:
        state = self.state
        left = None if state is None else ReuseState(state.features[wanted], state.relations[wanted])
        return _Waiting(self.places[wanted], left)

    def joined(self, later: _Waiting) -> _Waiting:
        places = torch.cat((self.places, later.places))
        if self.state is None or later.state is None:
            return _Waiting(places, None)
        return _Waiting(places, ReuseState(*map(torch.cat, zip(self.state, later.state, strict=True))))


@torch.inference_mode()
def predict(stages: Sequence[Stage], images: Tensor, thresholds: Sequence[float], batch_size: int) -> Predictions:
    """See `DVT.predict`. Less than two batches wait before a stage."""
    limits = _checked(thresholds, len(stages), batch_size)
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; normalised ones are taken, as `preprocess` makes them of photos")
    exits = torch.zeros(len(images), dtype=torch.long, device=images.device)
    probabilities = images.new_empty((len(images), stages[0].head.out_features), dtype=torch.float32)
    waiting: list[_Waiting | None] = [None] * len(stages)

    def run(number: int, batch: _Waiting) -> None:
        logits, state = stages[number](images[batch.places], batch.state)
        answers = logits.float().softmax(dim=-1)
        goes_on = answers.amax(dim=-1).double() < limits[number]
        leaving = batch.places[~goes_on]
        exits[leaving], probabilities[leaving] = number + 1, answers[~goes_on]
        if goes_on.any():
            more = _Waiting(batch.places, state).rows(goes_on)
            before = waiting[number + 1]
            waiting[number + 1] = more if before is None else before.joined(more)

    def drain(number: int, least: int) -> None:
        """Run the stage while at least so many wait before it."""
        while (batch := waiting[number]) is not None and len(batch.places) >= least:
            rest = batch.rows(slice(batch_size, None))
            waiting[number] = rest if len(rest.places) else None
            run(number, batch.rows(slice(batch_size)))

    for start in range(0, len(images), batch_size):
        run(0, _Waiting(torch.arange(start, min(start + batch_size, len(images)), device=images.device), None))
        for number in range(1, len(stages)):
            drain(number, batch_size)
    for number in range(1, len(stages)):
        drain(number, 1)
    confidence, classes = probabilities.max(dim=-1)
    return Predictions(classes, confidence, exits, probabilities)


def _checked(thresholds: Sequence[float], exits: int, batch_size: int) -> list[float]:
    """One per exit, the last 0: it takes all."""
    limits = [float(t) for t in thresholds]
    if len(limits) == exits and limits[-1] == 0:  # as frontiers have them
        limits.pop()
    if len(limits) != exits - 1 or any(map(math.isnan, limits)):
        raise ValueError(f"thresholds are {exits - 1} numbers, one for each of {exits} exits but the last: {limits}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return [*limits, -math.inf]
