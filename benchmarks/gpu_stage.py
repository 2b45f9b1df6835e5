"""One stage on the device with nothing around it: no staging, no state moved, no survivors. What the engine's own time
is held against.

Legend: B rows of a batch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from server.bundle.manifest import TensorSpec
from server.engines.gpu.device import CaptureFailed, Device
from server.engines.gpu.engine import row_bytes
from server.engines.gpu.stage import Stage

SAMPLE_S = 0.03  # a sample is so many launches that it takes about this long
MOST_LAUNCHES = 2000
ROWS = 8  # of random numbers, repeated over the batch


class LoneStage:
    """A stage at one batch size, on random inputs, as a graph where it can be recorded."""

    def __init__(self, device: Device, stage: Stage, size: int) -> None:
        self._device = device
        self._held: list[int] = []
        device.attach()
        self._stream = device.stream()
        tensors = {**stage.inputs, **stage.outputs}
        addresses = {name: self._allocate(size * row_bytes(spec)) for name, spec in tensors.items() if name != "logits"}
        for name, spec in stage.inputs.items():
            fill(device, addresses[name], spec, size, self._stream)
        arena = stage.arena_bytes(size)
        self._context = stage.context(size, addresses, self._allocate(arena) if arena else 0, self._stream)
        self._context.enqueue()
        device.synchronize(self._stream)
        self.graph: int | None = None
        if self._context.capturable:
            try:
                self.graph = device.capture(self._stream, self._context.enqueue)
            except CaptureFailed:
                self.graph = None

    def ms(self, seconds: float, rounds: int = 3, plain: bool = False) -> float:
        """Milliseconds a batch: the median of the rounds. `plain`: call by call, without the graph."""
        graph, device, stream = self.graph, self._device, self._stream
        if graph is None or plain:
            return milliseconds(device, stream, self._context.enqueue, seconds, rounds)
        return milliseconds(device, stream, lambda: device.launch(graph, stream), seconds, rounds)

    def _allocate(self, size: int) -> int:
        self._held.append(self._device.allocate(size))
        return self._held[-1]

    def __enter__(self) -> LoneStage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._device.synchronize(self._stream)
        if self.graph is not None:
            self._device.destroy_graph(self.graph)
        self._context.close()
        for address in self._held:
            self._device.free(address)
        self._device.destroy_stream(self._stream)


def milliseconds(device: Device, stream: int, work: Callable[[], object], seconds: float, rounds: int = 3) -> float:
    """Of work that is put on the stream, many in a row, by the clock, waited for at the end: the median of the
    rounds."""

    def sample(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        device.synchronize(stream)
        return (time.perf_counter() - began) / calls

    sample(1)
    one = max(sample(2), 1e-6)
    calls = max(1, min(MOST_LAUNCHES, round(min(SAMPLE_S, seconds / rounds) / one)))
    return 1e3 * statistics.median(sample(calls) for _ in range(rounds))


def fill(device: Device, address: int, spec: TensorSpec, size: int, stream: int) -> None:
    """Random rows, finite in any precision: bytes, or normal numbers."""
    row = row_bytes(spec)
    rows = random_rows(spec, min(ROWS, size))
    host = device.pin(len(rows))
    host[:] = rows
    for first in range(0, size, ROWS):
        device.copy_in(address + first * row, host, min(ROWS, size - first) * row, stream)
    device.synchronize(stream)
    device.unpin(host)


def random_rows(spec: TensorSpec, count: int) -> NDArray[np.uint8]:
    """The bytes of so many rows."""
    elements = count * math.prod(int(side) for side in spec.shape[1:])
    generator = torch.Generator().manual_seed(0)
    if spec.dtype == "uint8":
        return torch.randint(0, 256, (elements,), dtype=torch.uint8, generator=generator).numpy()
    return torch.randn(elements, generator=generator).to(getattr(torch, spec.dtype)).view(torch.uint8).numpy()
