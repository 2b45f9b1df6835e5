"""Images, and their way through all stages of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.bundle.manifest import Bundle
from server.core import Engine, Pixels, Slot, StageBatch, StageOutput

STAY = 2.0  # a threshold that no confidence reaches
LEAVE = 0.0


def images(bundle: Bundle, count: int, seed: int = 0) -> list[Pixels]:
    shape = (count, *bundle.manifest.preprocessing.size, 3)
    return list(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@dataclass
class Traces:
    """What the stages say, each (stages, B, ...)."""

    probabilities: np.ndarray
    confidence: np.ndarray


def run(
    engine: Engine, stage: int, pixels: Sequence[Pixels], slots: Sequence[Slot | None] = (), threshold: float = STAY
) -> StageOutput:
    held = [slot for slot in slots if slot is not None]
    return engine.run(StageBatch(stage, pixels, held, [threshold] * len(pixels)))


def all_stages(engine: Engine, pixels: Sequence[Pixels]) -> Traces:
    said: list[StageOutput] = []
    for stage in range(1, engine.num_stages + 1):
        slots = said[-1].slots if said else ()
        said.append(run(engine, stage, pixels, slots, LEAVE if stage == engine.num_stages else STAY))
    return Traces(np.stack([one.probabilities for one in said]), np.stack([one.confidence for one in said]))
