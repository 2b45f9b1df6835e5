"""The words of the server as types: what a stage takes and leaves, what an exit says, what a request gets.

Only types live here: no I/O, no clock, no policy. Everything else in `server` may import this module; it imports
nothing of ours.

Conventions: stages and exits count from 1. Times are monotonic seconds. Shapes: B images in a batch, H and W pixels,
K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB, already resized and cropped to the model's input
Floats = NDArray[np.float32]

Slot = NewType("Slot", int)
"""Names the reuse state of one live image inside an engine. Opaque: only the engine that gave it looks inside."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The second, dearer thresholds of a mixed operating point, and the share of all requests that they judge."""

    thresholds: tuple[float, ...]  # one per exit, the last is 0.0
    share: float  # 0 to 1


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Where on the accuracy/cost curve the cascade runs.

    An image leaves at the first exit whose confidence is >= that exit's threshold; the last threshold is 0, so the
    last exit takes all.
    """

    version: int
    thresholds: tuple[float, ...]  # one per exit, the last is 0.0
    mix: Mix | None = None

    def thresholds_for(self, place: float) -> tuple[float, ...]:
        """The thresholds that judge a whole request. `place`, in [0, 1), follows from its id: a retry is judged alike,
        and where a share moves a little, few requests change sides."""
        return self.thresholds if self.mix is None or place >= self.mix.share else self.mix.thresholds


@dataclass(frozen=True, slots=True)
class StageBatch:
    """One batch for one stage.

    `thresholds` has one value per row: a row whose confidence stays below it survives, and the engine keeps its state
    for the next stage. 0.0 means that the row leaves here whatever its confidence.
    """

    stage: int
    pixels: Sequence[Pixels]
    slots: Sequence[Slot]  # one per row; empty for stage 1
    thresholds: Sequence[float]


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What one stage says of one batch, row by row in the order of the batch."""

    probabilities: Floats  # (B, K)
    confidence: Floats  # (B,)
    slots: Sequence[Slot | None]  # per row: the state kept for the next stage, or None where the row leaves


class EngineLost(Exception):
    """What an engine raises when it can run nothing any more, as after an error from which a GPU does not come back
    within a process: whoever started the process should start it anew."""


class Engine(Protocol):
    """Runs single stages. Blocking; `run` is called from `executors` threads at once, the rest from anywhere.

    `run` gives back the slots it was handed and takes new ones for the survivors. Should `run` raise, it has taken
    none and the slots it was handed are still held: the caller frees them. Raises EngineLost where that is so.
    """

    name: str  # as it is asked for: DVT_ENGINE
    executors: int  # batches that pay at once
    own_cores: bool  # whether each of them has some for itself: two half batches then take half the time
    max_slots: int | None  # states that it can hold; None: as many as the host's memory can
    num_stages: int
    num_classes: int
    input_size: tuple[int, int]  # (H, W)
    max_batch_sizes: tuple[int, ...]  # largest batch that pays, per stage
    runtime: str  # what runs the stages, with its version
    device: str  # what it runs on: CPU model or GPU name

    @property
    def slots_in_use(self) -> int:
        """Live states held. Equals the number of survivors that wait for, or run in, a later stage."""
        ...

    def run(self, batch: StageBatch) -> StageOutput: ...

    def free(self, slots: Sequence[Slot]) -> None:
        """Give states back. Raises KeyError for a slot that is not in use."""
        ...

    def warm_up(self) -> None:
        """Run every stage once, so that the first request is not slower than the next. Once warm, it stays so: a
        second call does nothing."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The answer for one image."""

    probabilities: Floats  # (K,)
    exit: int
    confidence: float
    degraded: bool  # a deadline, not a threshold, ended the cascade
    queue_s: float  # time spent waiting, all stages
    compute_s: float  # wall time of the batches it took part in
    confidences: tuple[float, ...]  # at every exit up to its own


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer for one request. All of its images were judged by the one operating point named here."""

    point: OperatingPoint
    results: tuple[ImageResult, ...]
    decided: float  # when the last image was


class Observer(Protocol):
    """What the batcher tells whoever counts. Called on the event loop; must not block."""

    def batch_finished(self, stage: int, size: int, seconds: float, abandoned: int, waited_s: float) -> None:
        """`abandoned`: rows whose client had left, or whose deadline had passed, when the batch came back. `waited_s`:
        how long its rows had waited for this stage, added up, audits left out."""
        ...

    def image_finished(self, result: ImageResult) -> None: ...

    def image_abandoned(self, reason: str) -> None:
        """An image left without an answer: reason is "disconnect", "deadline", "overloaded" (its deadline could not be
        met any more), "engine_failed" or "shutdown"."""
        ...
