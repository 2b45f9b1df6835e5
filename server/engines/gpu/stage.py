"""What the GPU runtime asks of whatever runs a stage: TensorRT, torch or ONNX Runtime.

The runtime owns all memory that crosses this border: staging buffers, the pool of reuse state, activation arenas. It
hands out addresses, and moves rows between the buffers itself. An implementation loads a stage once and puts its work
on a stream, batch size by batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from server.bundle.manifest import TensorSpec


class Context(Protocol):
    """One stage at one batch size, at fixed addresses, on one stream. Never used by two threads at once."""

    @property
    def capturable(self) -> bool:
        """Whether `enqueue` may be recorded into a graph, after it ran once plainly."""
        ...

    def enqueue(self) -> None:
        """Put the stage's work on the context's stream and return. Synchronises with nothing; from the second call on
        it allocates nothing either. Every row of the batch is computed, also those that the runtime only padded with.
        """
        ...

    def close(self) -> None: ...


class Stage(Protocol):
    """One stage with its weights on the device, shared by all contexts."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Ascending: a batch runs in the smallest that holds it."""
        ...

    def arena_bytes(self, batch_size: int) -> int:
        """Activation memory that a context of this size wants from the runtime. 0: it looks after its own."""
        ...

    def context(self, batch_size: int, addresses: Mapping[str, int], arena: int, stream: int) -> Context:
        """`addresses`: of every input and of the outputs that are wanted, device memory of `batch_size` rows each,
        aligned to 256 bytes. `arena`: device memory of `arena_bytes`, which other contexts of the same stream use, too:
        they run one after the other. `stream`: a cudaStream_t."""
        ...

    def close(self) -> None: ...
