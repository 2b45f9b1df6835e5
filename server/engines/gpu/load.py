"""The engines on a GPU, by the names that they are asked for. Each needs libraries of its own, imported where it is
chosen; what is missing is said in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.bundle.manifest import Bundle
from server.engines.gpu.device import Device, DeviceError, OutOfDeviceMemory
from server.engines.gpu.engine import LANES, LARGEST_BATCH, GpuEngine, batch_sizes
from server.engines.gpu.probe import visible_gpus
from server.engines.gpu.stage import Stage
from server.engines.tensorrt.stage import TensorRTFailed
from server.errors import BundleError, EngineUnavailable

FOR_CPUS = "int8"  # a precision that no GPU would gain by: its scales and what stays float are chosen for CPUs

Stages = tuple[Sequence[Stage], str]
"""And what runs them, with its version."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    sizes: Sequence[Sequence[int]]  # of batches, per stage, ascending
    engine_dir: Path | None  # of what is built; None: in the bundle, or nowhere
    build_engines: bool  # what is missing of it


def load(
    name: str,
    bundle: Bundle,
    *,
    max_batch_sizes: Sequence[int] | None,
    executors: int | None,
    max_slots: int,
    engine_dir: Path | None,
    build_engines: bool,
) -> GpuEngine:
    """A warm engine: what its graphs ask of the device, and whether there is memory for all of it, shows only then.

    Raises EngineUnavailable where it cannot run here, BundleError for a bundle that it cannot run."""
    if bundle.manifest.precision == FOR_CPUS:
        raise BundleError(
            f"{bundle.path}: is in {FOR_CPUS}, which is for CPUs, and {name} does not run it; ask for --engine onnx, "
            "or export it with --precision fp16"
        )
    if not visible_gpus():
        raise EngineUnavailable(f"the engine {name} needs an NVIDIA GPU, and none is here; ask for --engine onnx")
    largest = tuple(max_batch_sizes or [LARGEST_BATCH] * len(bundle.manifest.stages))
    if len(largest) != len(bundle.manifest.stages):
        raise ValueError(f"{len(largest)} batch sizes for {len(bundle.manifest.stages)} stages")
    with ExitStack() as opened, _saying_why(name):
        device = _device(name)
        opened.callback(device.close)
        wanted = _Wanted([batch_sizes(size) for size in largest], engine_dir, build_engines)
        stages, runtime = _LOADERS[name](bundle, wanted)
        runtime = f"{runtime}, {device.version}"
        engine = GpuEngine(
            bundle, device, stages, name=name, runtime=runtime, executors=executors or LANES, max_slots=max_slots
        )
        opened.pop_all()  # the engine closes it
        opened.callback(engine.close)
        engine.warm_up()
        opened.pop_all()
    return engine


@contextmanager
def _saying_why(name: str) -> Iterator[None]:
    """What the device or its libraries refuse, as one line."""
    try:
        yield
    except (EngineUnavailable, BundleError):
        raise
    except Exception as error:
        if isinstance(error, OutOfDeviceMemory) or "out of memory" in str(error).lower():  # each library says so
            raise EngineUnavailable(
                f"the engine {name} has too little memory on the GPU ({_first_line(error)}); lower "
                "DVT_MAX_BATCH_SIZES, DVT_MAX_SLOTS or DVT_EXECUTORS"
            ) from None
        if isinstance(error, DeviceError | TensorRTFailed):
            raise EngineUnavailable(f"the engine {name} cannot use the GPU: {_first_line(error)}") from None
        raise


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _device(name: str) -> Device:
    try:
        from server.engines.gpu.cuda import CudaDevice
    except ImportError as error:
        raise EngineUnavailable(
            f"the engine {name} needs NVIDIA's bindings ({error}): pip install 'dvt-serve[{_EXTRAS[name]}]'"
        ) from None
    return CudaDevice()


def _torch_cuda(bundle: Bundle, wanted: _Wanted) -> Stages:
    try:
        from server.engines.gpu import torch_stage
    except ImportError as error:
        raise EngineUnavailable(
            f"the engine torch-cuda needs torch for CUDA and onnx ({error}): see pytorch.org for the first, and "
            "pip install 'dvt-serve[gpu-torch]'"
        ) from None
    try:
        place = torch_stage.CudaPlace(tf32=bundle.manifest.precision != "fp32")
    except RuntimeError as error:
        raise EngineUnavailable(f"the engine torch-cuda needs torch for CUDA: {error}; see pytorch.org") from None
    if not wanted.build_engines:
        return torch_stage.load(bundle, place, wanted.sizes), torch_stage.RUNTIME
    from server.engines.gpu.torch_compile import compiler  # takes seconds to import

    stages = torch_stage.load(bundle, place, wanted.sizes, compiler(wanted.engine_dir))
    return stages, f"{torch_stage.RUNTIME}, compiled"


def _onnx_cuda(bundle: Bundle, wanted: _Wanted) -> Stages:
    try:
        from server.engines.gpu import onnx_stage
    except ImportError as error:
        raise EngineUnavailable(
            f"the engine onnx-cuda needs ONNX Runtime for CUDA ({error}): pip install 'dvt-serve[gpu-ort]'"
        ) from None
    return onnx_stage.load(bundle, wanted.sizes), onnx_stage.RUNTIME


def _tensorrt(bundle: Bundle, wanted: _Wanted) -> Stages:
    from server.engines.tensorrt.bundles import open_tensorrt_stages

    largest = [sizes[-1] for sizes in wanted.sizes]
    try:
        stages = open_tensorrt_stages(
            bundle, max_batch_sizes=largest, cache=wanted.engine_dir, build=wanted.build_engines
        )
    except ModuleNotFoundError as error:
        raise EngineUnavailable(
            f"the engine tensorrt needs TensorRT ({error}): pip install 'dvt-serve[gpu-trt]'"
        ) from None
    except BundleError as error:  # no plans, or another GPU's: another engine may well run the bundle
        raise EngineUnavailable(f"the engine tensorrt: {error}") from None
    return stages, stages[0].runtime


_LOADERS: dict[str, Callable[[Bundle, _Wanted], Stages]] = {
    "tensorrt": _tensorrt,
    "torch-cuda": _torch_cuda,
    "onnx-cuda": _onnx_cuda,
}
NAMES = tuple(_LOADERS)
"""The best first. onnx-cuda is the last: what it runs cannot be recorded into a graph."""
_EXTRAS = {"tensorrt": "gpu-trt", "torch-cuda": "gpu-torch", "onnx-cuda": "gpu-ort"}
