"""From one stage's ONNX graph to a plan, with TensorRT's builder. Nothing here knows where plans lie.

Precision lives in the graph: the network is strongly typed (the only kind from TensorRT 11 on), so no layer runs in
another type than was exported and compared. Each batch size has an optimisation profile of its own that holds just that
size, as the runtime pads to it: kernels are chosen for the sizes that run, and each size's activation memory is known.
An engine has no auxiliary streams: all work goes to the stream that it is given, and graphs record all of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from server.bundle.manifest import TensorSpec
from server.engines.tensorrt.api import (
    IBuilderConfig,
    IHostMemory,
    INetworkDefinition,
    ITensor,
    OnnxParser,
    TensorRT,
    is_rtx,
)
from server.engines.tensorrt.gpus import Gpu

log = logging.getLogger(__name__)

DTYPES = {"uint8": "UINT8", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # of a manifest, as trt.DataType
FLAGS = ("strongly_typed", "profile_per_size", "max_aux_streams=0")
"""What all plans are built with: part of their keys, so that another way to build makes other plans."""

Progress = Callable[[float], None]
"""Told how much is done, from 0 to 1, in another thread than the one that waits."""


class BuildFailed(Exception):
    """TensorRT refused to build. The message is one line."""


@dataclass(frozen=True, slots=True)
class Built:
    plan: bytes
    timing_cache: bytes  # b"" where there is none
    seconds: float


def build_plan(
    trt: TensorRT,
    graph: bytes,
    *,
    gpu: Gpu,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    batch_sizes: Sequence[int],
    optimization_level: int,
    workspace_bytes: int | None,
    timing_cache: bytes = b"",
    progress: Progress = lambda _: None,
) -> Built:
    """Only `outputs` come out of the engine, whatever else the graph has. Raises BuildFailed.

    It builds in a thread, for Ctrl-C: TensorRT calls back while it builds, and no exception survives the way through
    its code. The thread is told that nobody wants the plan any more, at TensorRT's next step, and is not waited for:
    that may be ten seconds away.
    """
    began = time.monotonic()
    monitor = _monitor(trt, progress)

    def build() -> tuple[bytes, bytes]:
        logger = logger_of(trt)
        logger.errors.clear()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        if network is None:
            raise BuildFailed(_why(logger.errors, "no network"))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(graph):
            raise BuildFailed(_refusal(parser))
        _keep(network, outputs)
        _compare(trt, "input", inputs, {t.name: t for t in map(network.get_input, range(network.num_inputs))})
        _compare(trt, "output", outputs, {t.name: t for t in map(network.get_output, range(network.num_outputs))})
        config = builder.create_builder_config()
        config.builder_optimization_level = optimization_level
        config.max_aux_streams = 0
        config.progress_monitor = monitor
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        for size in batch_sizes:
            profile = builder.create_optimization_profile()
            for name, spec in inputs.items():
                shape = shape_of(spec, size)
                profile.set_shape(name, shape, shape, shape)
            if config.add_optimization_profile(profile) < 0:
                raise BuildFailed(_why(logger.errors, f"no profile for batches of {size}"))
        if is_rtx(trt):
            _target(trt, config, gpu)
        else:
            _use_timing_cache(config, timing_cache)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildFailed(_why(logger.errors, "no reason given"))
        timings = None if is_rtx(trt) else config.get_timing_cache()
        return _bytes(plan), b"" if timings is None else _bytes(timings.serialize())

    building: Future[tuple[bytes, bytes]] = Future()

    def work() -> None:
        try:
            building.set_result(build())
        except BaseException as error:
            building.set_exception(error)

    try:
        threading.Thread(target=work, name="tensorrt-builder").start()
        plan, timings = building.result()
    except KeyboardInterrupt:
        monitor.cancelled = True
        raise
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:  # of its bindings
        raise BuildFailed(_why(logger_of(trt).errors, f"{type(error).__name__}: {error}")) from error
    return Built(plan, timings, time.monotonic() - began)


def shape_of(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """The shape of a batch of so many rows."""
    return tuple(rows if isinstance(size, str) else size for size in spec.shape)


def dtype_of(trt: TensorRT, spec: TensorSpec) -> Any:
    """As TensorRT calls it; None for a type that no stage of ours has."""
    return getattr(trt.DataType, DTYPES.get(spec.dtype, ""), None)


def same_shape(spec: TensorSpec, shape: Iterable[int]) -> bool:
    """-1 there where the manifest has a name."""
    return tuple(shape) == shape_of(spec, -1)


@cache
def logger_of(trt: TensorRT) -> Any:
    """The one logger of a module: TensorRT keeps the first that it was given, for the whole process. Its `errors` are
    the last ones; everything goes to the log at debug, as much of it is no news to whoever runs a server."""
    serious = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=16)

        def log(self, severity: Any, msg: str) -> None:  # called from TensorRT's code: must not raise
            if severity in serious:
                self.errors.append(msg)
            log.debug("%s", msg)

    return Logger()


def _monitor(trt: TensorRT, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Phases lie within phases; the steps of the outermost are whole, those within are their parts."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._open: dict[str, list[float]] = {}  # steps done, steps; from the outermost to the innermost

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            self._open[phase_name] = [0, max(1, num_steps)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._open:
                self._open[phase_name][0] = step + 1
            self._tell()
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._open.pop(phase_name, None)

        def _tell(self) -> None:
            done = 0.0
            for steps, of in reversed(self._open.values()):
                done = min(1.0, (steps + done) / of)
            with suppress(Exception):  # must not raise either
                progress(done)

    return Monitor()


def _bytes(memory: IHostMemory) -> bytes:
    return bytes(memoryview(memory))  # type: ignore[arg-type]


def _keep(network: INetworkDefinition, outputs: Mapping[str, TensorSpec]) -> None:
    for tensor in [network.get_output(index) for index in range(network.num_outputs)]:
        if tensor.name not in outputs:
            network.unmark_output(tensor)


def _compare(trt: TensorRT, what: str, specs: Mapping[str, TensorSpec], tensors: Mapping[str, ITensor]) -> None:
    if differing := sorted(specs.keys() ^ tensors.keys()):
        there, here = ("graph", "manifest") if differing[0] in tensors else ("manifest", "graph")
        raise BuildFailed(f"{what} `{differing[0]}` is in the {there} and not in the {here}")
    for name, spec in specs.items():
        tensor = tensors[name]
        if tensor.dtype != dtype_of(trt, spec) or not same_shape(spec, tensor.shape):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise BuildFailed(f"{what} `{name}` is {found}, the manifest says {spec.dtype} {list(spec.shape)}")


def _target(trt: TensorRT, config: IBuilderConfig, gpu: Gpu) -> None:
    capability = getattr(trt.ComputeCapability, gpu.sm.upper(), None)
    if capability is None:
        raise BuildFailed("it knows no such compute capability")
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)


def _use_timing_cache(config: IBuilderConfig, content: bytes) -> None:
    """One that does not fit is left aside: then all is timed anew."""
    for serialized in dict.fromkeys((content, b"")):  # an empty one is where it begins
        timings = config.create_timing_cache(serialized)
        if timings is not None and config.set_timing_cache(timings, False):
            return


def _refusal(parser: OnnxParser) -> str:
    if not parser.num_errors:
        return "cannot be parsed"
    error = parser.get_error(0)
    node = f" (node {error.node_name()} [{error.node_operator()}])" if error.node_name() else ""
    return f"cannot be parsed: {_line(error.desc())}{node}"


def _why(errors: Iterable[str], otherwise: str) -> str:
    """What came last is what it failed of; before it may stand what it got over."""
    return _line(([*errors] or [otherwise])[-1])


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 400 else f"{line[:400]}…"
