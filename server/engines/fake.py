"""An engine without a model, for tests: a stated rule, a record of what it ran, and ways to hold it and to break it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from server.core import Pixels, Slot, StageBatch, StageOutput
from server.engines.slots import SlotTable


class FakeEngine:
    """The answer is written in the image.

    The rule: pixel (0, 0) of an image holds its confidences in units of 1/255, channel s - 1 for stage s (the last
    channel also for deeper stages); pixel (0, 1), channel 0, modulo the number of classes, is its class. The class has
    the confidence as its probability, the other classes share the rest.

    `batches` records every batch, in the order in which runs began. While a stage's gate is cleared, its runs wait
    there, after they were recorded. `fail_next` makes that many runs raise, once past the gate. A row's state is the
    pixels it began with: a slot that belongs to another image or stage is an AssertionError.
    """

    name = "fake"
    executors = 1
    own_cores = False
    max_slots: int | None = None

    def __init__(
        self,
        *,
        num_stages: int = 3,
        num_classes: int = 10,
        input_size: tuple[int, int] = (8, 8),
        max_batch_sizes: Sequence[int] = (8, 4, 4),
    ) -> None:
        self.num_stages = num_stages
        self.num_classes = num_classes
        self.input_size = input_size
        self.max_batch_sizes = tuple(max_batch_sizes)
        self.runtime = "fake"
        self.device = "none"
        self.batches: list[StageBatch] = []
        self.gates = {stage: threading.Event() for stage in range(1, num_stages + 1)}
        self.open_gates()
        self.began = threading.Semaphore(0)  # released once per run: a test waits for a run without polling
        self.fail_next = 0
        self.closed = False
        self._table: SlotTable[tuple[int, Pixels]] = SlotTable()  # the stage it waits for, and its image
        self._lock = threading.Lock()

    def image(self, *confidences: int, klass: int = 0) -> Pixels:
        """An image with these confidences at stages 1, 2, 3, in units of 1/255."""
        pixels = np.zeros((*self.input_size, 3), np.uint8)
        pixels[0, 0, : len(confidences)] = confidences
        pixels[0, 1, 0] = klass
        return pixels

    def open_gates(self) -> None:
        for gate in self.gates.values():
            gate.set()

    @property
    def slots_in_use(self) -> int:
        return len(self._table)

    def run(self, batch: StageBatch) -> StageOutput:
        with self._lock:
            self.batches.append(batch)
        self.began.release()
        self.gates[batch.stage].wait()
        with self._lock:
            failing = self.fail_next > 0
            self.fail_next -= failing
        if failing:
            raise RuntimeError("told to fail")
        self._check(batch)
        confidence = np.array([self._confidence(pixels, batch.stage) for pixels in batch.pixels], np.float32)
        probabilities = np.repeat((1 - confidence[:, None]) / (self.num_classes - 1), self.num_classes, axis=1)
        for row, pixels in enumerate(batch.pixels):
            probabilities[row, pixels[0, 1, 0] % self.num_classes] = confidence[row]
        survives = confidence < np.asarray(batch.thresholds)
        states = [
            (batch.stage + 1, pixels) if goes_on else None
            for pixels, goes_on in zip(batch.pixels, survives, strict=True)
        ]
        return StageOutput(probabilities.astype(np.float32), confidence, self._table.swap(batch.slots, states))

    def free(self, slots: Sequence[Slot]) -> None:
        self._table.free(slots)

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def close(self) -> None:
        self._table.clear()
        self.closed = True

    def _check(self, batch: StageBatch) -> None:
        assert len(batch.pixels) == len(batch.thresholds), "one threshold per row"
        assert len(batch.slots) == (len(batch.pixels) if batch.stage > 1 else 0), "one slot per row after stage 1"
        for pixels, (stage, began_with) in zip(batch.pixels, self._table.read(batch.slots), strict=False):
            assert stage == batch.stage, f"state for stage {stage} in a batch of stage {batch.stage}"
            assert began_with is pixels, "the state of another image"

    def _confidence(self, pixels: Pixels, stage: int) -> float:
        return float(pixels[0, 0, min(stage, 3) - 1]) / 255
