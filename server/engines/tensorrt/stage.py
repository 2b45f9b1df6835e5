"""Stages run by TensorRT, for the GPU runtime: what `server.engines.gpu.stage` asks for.

A stage is deserialised once. A context has the profile of its batch size, which is set once, and gets its activation
memory and all addresses from the runtime; nothing of it changes afterwards, so that a recorded graph stays valid.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.bundle.manifest import TensorSpec
from server.engines.tensorrt.api import ICudaEngine, Runtime, TensorRT
from server.engines.tensorrt.network import dtype_of, logger_of, same_shape, shape_of
from server.errors import BundleError

ALIGNMENT = 256  # of every address, by TensorRT's rules


class TensorRTFailed(Exception):
    """TensorRT refused to make a context or to run one. The message is one line."""


class TensorRTStage:
    """Owns the engine. See `stage.Stage` for the contract. Contexts may be made from several threads.

    Raises BundleError, naming the file, for a plan that TensorRT does not take, or that is not of this stage. The GPU
    must be the current one of the thread, here as in all calls, and the runtime in use.
    """

    def __init__(
        self,
        trt: TensorRT,
        runtime: Runtime,
        file: Path,
        plan: bytes,
        *,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        batch_sizes: Sequence[int],
        largest: int | None = None,
    ) -> None:
        """`batch_sizes`: those that the plan was built for. Of these, ones that are larger than `largest` are left
        aside, but never the smallest."""
        self.inputs, self.outputs = inputs, outputs
        self.batch_sizes = tuple(n for n in batch_sizes if largest is None or n <= max(largest, batch_sizes[0]))
        self.runtime = f"{trt.__name__} {trt.__version__}"
        self._trt = trt
        self._runtime = runtime  # an engine needs it for as long as it lives
        self._making = threading.Lock()
        logger_of(trt).errors.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"{file}: TensorRT does not take it: {last_error(trt)}")
        if why := _misfit(trt, engine, inputs, outputs, batch_sizes):
            raise BundleError(f"{file}: {why}")
        self._engine: ICudaEngine | None = engine

    def arena_bytes(self, batch_size: int) -> int:
        return self._opened().get_device_memory_size_for_profile_v2(self.batch_sizes.index(batch_size))

    def context(self, batch_size: int, addresses: Mapping[str, int], arena: int, stream: int) -> TensorRTContext:
        """`addresses` are those of all inputs and outputs of this stage: it has no output that nobody wants. Raises
        TensorRTFailed, and ValueError for what can be no address."""
        if missing := sorted((self.inputs.keys() | self.outputs.keys()) ^ addresses.keys()):
            raise ValueError(f"addresses are those of all inputs and outputs and of nothing else: {missing}")
        size = self.arena_bytes(batch_size)
        places = {**addresses, **({"arena": arena} if size else {})}
        if wrong := sorted(name for name, address in places.items() if address <= 0 or address % ALIGNMENT):
            raise ValueError(f"not a multiple of {ALIGNMENT}: {wrong}")
        if stream == 0:
            raise ValueError("the default stream would wait for all others")
        trt, engine = self._trt, self._opened()
        with self._making:
            logger_of(trt).errors.clear()
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None:
                raise TensorRTFailed(f"no context for a batch of {batch_size}: {last_error(trt)}")
            done = context.set_optimization_profile_async(self.batch_sizes.index(batch_size), stream)
            for name, spec in self.inputs.items():
                done = done and context.set_input_shape(name, shape_of(spec, batch_size))
            if size:
                context.set_device_memory(arena, size)
            for name, address in addresses.items():
                done = done and context.set_tensor_address(name, address)
            if not done or context.infer_shapes():
                raise TensorRTFailed(f"a context refuses a batch of {batch_size}: {last_error(trt)}")
        return TensorRTContext(trt, context, stream)

    def close(self) -> None:
        """After its contexts."""
        self._engine = None

    def _opened(self) -> ICudaEngine:
        if self._engine is None:
            raise TensorRTFailed("the stage was closed")
        return self._engine


class TensorRTContext:
    """See `stage.Context` for the contract. `enqueue` raises TensorRTFailed."""

    def __init__(self, trt: TensorRT, context: Any, stream: int) -> None:
        self._trt, self._context, self._stream = trt, context, stream

    @property
    def capturable(self) -> bool:
        """RTX compiles kernels while it runs, and says when a stream may be recorded. TensorRT always lets it."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream))

    def enqueue(self) -> None:
        if self._context is None:
            raise TensorRTFailed("the context was closed")
        if not self._context.execute_async_v3(self._stream):
            raise TensorRTFailed(f"not enqueued: {last_error(self._trt)}")

    def close(self) -> None:
        """After its work is done."""
        self._context = None


def last_error(trt: TensorRT, otherwise: object = "no reason given") -> str:
    """What TensorRT said last of what it failed of, in one line."""
    errors = logger_of(trt).errors
    return " ".join((errors[-1] if errors else str(otherwise)).split())[:400]


def _misfit(
    trt: TensorRT,
    engine: ICudaEngine,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    batch_sizes: Sequence[int],
) -> str | None:
    """Why an engine is not that of a stage. The plan's record said so already; this is what the engine says itself."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for what, mode, specs in (
        ("input", trt.TensorIOMode.INPUT, inputs),
        ("output", trt.TensorIOMode.OUTPUT, outputs),
    ):
        if differing := sorted({name for name in names if engine.get_tensor_mode(name) == mode} ^ specs.keys()):
            return f"its {what}s are not those of the stage: {differing}"
        for name, spec in specs.items():
            dtype, shape = engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))
            if dtype != dtype_of(trt, spec) or not same_shape(spec, shape):
                return f"{what} `{name}` is {dtype} {list(shape)}, the manifest says {spec.dtype} {list(spec.shape)}"
    if engine.num_optimization_profiles != len(batch_sizes):
        return f"has {engine.num_optimization_profiles} profiles for {len(batch_sizes)} batch sizes"
    for index, size in enumerate(batch_sizes):
        for name, spec in inputs.items():
            low, _, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            if not low == high == shape_of(spec, size):
                return f"profile {index} is not for batches of {size}"
    return None
