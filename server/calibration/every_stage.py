"""Every image through every stage, by thresholds that nobody reaches: what calibrating and measuring have in common."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from server.bundle.frontier import NEVER
from server.core import Engine, Pixels, Slot, StageBatch, StageOutput
from server.errors import EngineFailed


def every_stage(engine: Engine, pixels: Sequence[Pixels]) -> Generator[StageOutput, None, None]:
    """What stages 1, 2, … say of the images, as one batch each. A stage runs when its output is asked for.

    Whatever ends it, also a caller who closes it early, no state stays behind. Raises EngineFailed for a confidence
    that is no number, and whatever the engine raises.
    """
    slots: Sequence[Slot] = ()
    try:
        for stage in range(1, engine.num_stages + 1):
            last = stage == engine.num_stages
            output = engine.run(StageBatch(stage, pixels, slots, [0.0 if last else NEVER] * len(pixels)))
            slots = [slot for slot in output.slots if slot is not None]
            if not last and len(slots) != len(pixels):
                raise EngineFailed(f"stage {stage} gives a confidence above {NEVER:g}, or none at all")
            yield output
    finally:
        engine.free(slots)
