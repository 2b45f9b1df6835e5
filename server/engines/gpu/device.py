"""What the GPU runtime needs of CUDA, and no more. `cuda` does it on a real device; the tests bring a device of their
own that checks every move.

Addresses, streams, events and graphs are the numbers that CUDA gives them. Everything that takes a stream returns at
once; what it asked for happens later, in the stream's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256  # of every address that is handed to a stage

Host = NDArray[np.uint8]
"""Page-locked memory of the host: the device copies from and to it by itself."""


class DeviceError(Exception):
    """CUDA refused something."""


class OutOfDeviceMemory(DeviceError):
    """Less memory is free on the device than was asked for. Nothing else is wrong with it."""


class CaptureFailed(DeviceError):
    """The work cannot be recorded into a graph; nothing of it ran, and its stream can be used as before."""


class Device(Protocol):
    """One GPU. Safe to call from several threads, each with streams of its own."""

    name: str
    version: str  # of the runtime and the driver

    def attach(self) -> None:
        """Make it the calling thread's device. Every thread calls it before anything else."""
        ...

    def free_memory(self) -> int:
        """Bytes."""
        ...

    def allocate(self, size: int) -> int:
        """Raises OutOfDeviceMemory. The address is a multiple of ALIGNMENT."""
        ...

    def free(self, address: int) -> None: ...

    def pin(self, size: int) -> Host: ...

    def unpin(self, host: Host) -> None: ...

    def stream(self) -> int:
        """A new one, which does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        """Wait until it has done all that it was asked for."""
        ...

    def event(self) -> int:
        """A new one, whose waiter sleeps."""
        ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, event: int) -> None:
        """Until the stream has come to where it was recorded. Other threads of Python run meanwhile."""
        ...

    def copy_in(self, address: int, host: Host, size: int, stream: int) -> None:
        """The first `size` bytes."""
        ...

    def copy_out(self, host: Host, address: int, size: int, stream: int) -> None: ...

    def clear(self, address: int, size: int, stream: int) -> None:
        """Zeros."""
        ...

    def gather(self, store: int, rows: int, batch: int, row_bytes: int, size: int, stream: int) -> None:
        """batch[i] = store[rows[i]] for i < size. `rows`: int32, on the device."""
        ...

    def scatter(self, batch: int, rows: int, store: int, row_bytes: int, size: int, stream: int) -> None:
        """store[rows[i]] = batch[i] for i < size where rows[i] >= 0."""
        ...

    def decide(
        self, confidence: int, thresholds: int, reserved: int, rows: int, survives: int, size: int, stream: int
    ) -> None:
        """survives[i] = confidence[i] < thresholds[i], and rows[i] = reserved[i] where it is, else -1, for i < size.

        float32, float64, int32, int32 and uint8. Compared as float64, so a confidence that is no number leaves.
        """
        ...

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """What `work` asks of the stream, as a graph. Raises CaptureFailed, and passes on nothing that `work` raises:
        an implementation of a stage may well refuse to be recorded."""
        ...

    def launch(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...

    def close(self) -> None: ...
