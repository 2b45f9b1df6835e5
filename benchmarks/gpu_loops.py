"""An engine in closed loop, where images leave at exits that are drawn by lot: what a mix of exits is worth.

All images are there from the start, as many as wanted; what an image is, and what the model says of it, does not
matter: its exit is drawn beforehand, and thresholds of 0.0 and NEVER make it so. Whether the engine obeyed is counted.

Legend: E exits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.bundle.frontier import NEVER
from server.core import Engine, Pixels, Slot, StageBatch

Waiting = tuple[int, int, Slot]  # image, the exit where it leaves, its state

DRAWN = 65536  # exits drawn; then again from the first


@dataclass(frozen=True)
class LoopRun:
    """What a loop did within its window. `batches` and `rows` per stage; `cpu_s` of the whole process."""

    images: int
    seconds: float
    cpu_s: float
    batches: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def rate(self) -> float:
        return self.images / max(1e-9, self.seconds)

    @property
    def host_us(self) -> float:
        """CPU time of all threads, an image."""
        return 1e6 * self.cpu_s / max(1, self.images)

    @property
    def fill(self) -> list[float]:
        """Mean images in a batch, by stage; 0 where none ran."""
        return [rows / max(1, batches) for rows, batches in zip(self.rows, self.batches, strict=True)]


class ClosedLoop:
    """Threads, `lanes` of them, that each keep one batch in the engine.

    `mix`: the shares of the images at the E exits. `sizes`: the batch size by stage. With `rebatch` survivors wait
    until they fill a batch, and the deepest full batch runs first. Without, they go on alone, as what is left of the
    batch they came in.
    """

    def __init__(
        self,
        engine: Engine,
        pixels: Sequence[Pixels],
        mix: Sequence[float],
        sizes: Sequence[int],
        lanes: int = 1,
        rebatch: bool = True,
    ) -> None:
        if len(mix) > engine.num_stages or len(sizes) < len(mix):
            raise ValueError(f"{len(mix)} exits, {len(sizes)} batch sizes, {engine.num_stages} stages")
        self._engine = engine
        self._pixels = pixels
        self._sizes = tuple(sizes[: len(mix)])
        self._lanes = lanes
        self._rebatch = rebatch
        self._exits: list[int] = (np.random.default_rng(0).choice(len(mix), DRAWN, p=mix) + 1).tolist()
        self._lock = threading.Lock()

    def run(self, seconds: float, warm: float = 0.25) -> LoopRun:
        """So many seconds, after a share `warm` of them that is not counted. No state stays in the engine.

        Raises RuntimeError for an image that did not leave where it should, and whatever the engine raises.
        """
        self._waiting: list[list[Waiting]] = [[] for _ in self._sizes]
        self._next = 0
        self._failure: BaseException | None = None
        self._warm_at = time.monotonic() + warm * seconds
        self._until = self._warm_at + seconds
        self._count_from_now()
        threads = [threading.Thread(target=self._lane, name=f"lane-{lane}") for lane in range(self._lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done = LoopRun(
            self._images,
            self._last_s - self._first_s,
            self._last_cpu - self._first_cpu,
            tuple(self._batches),
            tuple(self._rows),
        )
        self._engine.free([slot for waiting in self._waiting for _, _, slot in waiting])
        if self._failure is not None:
            raise self._failure
        return done

    def _lane(self) -> None:
        mine: list[Waiting] = []  # without re-batching: what is left of the batch, and the stage it goes to
        stage = 1
        try:
            while self._failure is None and time.monotonic() < self._until:
                with self._lock:
                    if self._rebatch:
                        stage, mine = self._fullest()
                    if not mine:
                        stage, mine = 1, self._fresh()
                survivors = self._step(stage, mine)
                stage, mine = stage + 1, [] if self._rebatch else survivors
            self._keep(stage, mine)
        except BaseException as error:
            self._failure = error

    def _fullest(self) -> tuple[int, list[Waiting]]:
        """The deepest full batch of survivors, or none."""
        for stage in range(len(self._sizes), 1, -1):
            size, waiting = self._sizes[stage - 1], self._waiting[stage - 1]
            if len(waiting) >= size:
                self._waiting[stage - 1] = waiting[size:]
                return stage, waiting[:size]
        return 1, []

    def _fresh(self) -> list[Waiting]:
        first, size = self._next, self._sizes[0]
        self._next += size
        return [(n % len(self._pixels), self._exits[n % DRAWN], Slot(-1)) for n in range(first, first + size)]

    def _step(self, stage: int, batch: list[Waiting]) -> list[Waiting]:
        """Run one batch; its survivors, which wait for the next stage where they are re-batched."""
        pixels = [self._pixels[image] for image, _, _ in batch]
        slots = [slot for _, _, slot in batch] if stage > 1 else []
        thresholds = [0.0 if leaves == stage else NEVER for _, leaves, _ in batch]
        try:
            output = self._engine.run(StageBatch(stage, pixels, slots, thresholds))
        except BaseException:
            self._engine.free(slots)  # a run that failed has taken nothing
            raise
        survivors = [
            (image, leaves, slot)
            for (image, leaves, _), slot in zip(batch, output.slots, strict=True)
            if slot is not None
        ]
        left = sum(leaves == stage for _, leaves, _ in batch)
        with self._lock:
            self._count(stage, len(batch), left)
            if self._rebatch and survivors:
                self._waiting[stage] += survivors
        if left + len(survivors) != len(batch):
            if not self._rebatch:
                self._keep(stage + 1, survivors)
            raise RuntimeError(f"stage {stage}: {left} of {len(batch)} images should leave, {len(survivors)} went on")
        return survivors

    def _count(self, stage: int, rows: int, left: int) -> None:
        """From the end of a batch to the end of another: a window of fixed length would be off by up to a batch."""
        if self._first_s < self._warm_at <= time.monotonic():
            self._count_from_now()
            return
        self._last_s, self._last_cpu = time.monotonic(), time.process_time()
        self._batches[stage - 1] += 1
        self._rows[stage - 1] += rows
        self._images += left

    def _count_from_now(self) -> None:
        self._first_s = self._last_s = time.monotonic()
        self._first_cpu = self._last_cpu = time.process_time()
        self._images, self._batches, self._rows = 0, [0] * len(self._sizes), [0] * len(self._sizes)

    def _keep(self, stage: int, survivors: list[Waiting]) -> None:
        """What nobody takes further, to be freed at the end."""
        if stage > 1 and survivors:
            with self._lock:
                self._waiting[stage - 1] += survivors
