"""The GPU engine as a benchmark opens it: lanes, batch sizes and pool are told, graphs can be forbidden, and the time
for which the host waits for the device is counted."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.harness import ROOT
from server.bundle.manifest import Bundle
from server.engines.gpu.device import Device
from server.engines.gpu.engine import GpuEngine
from server.engines.gpu.stage import Context, Stage

SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)  # finer than powers of two: a batch that shrank finds its own
LANES = 3
WAITING = 2048  # states that may wait
FAKE = ROOT / "tests" / "server" / "engines" / "gpu" / "fake_cuda.py"


@dataclass(frozen=True)
class Opened:
    """An engine with what it was built from. `seconds`: what opening and warming up took."""

    bundle: Bundle
    engine: GpuEngine
    device: Timed
    stages: Sequence[Stage]
    seconds: float

    def sizes(self, wanted: Sequence[int]) -> list[int]:
        """Those that the first stage has a program for."""
        return [size for size in wanted if size in self.stages[0].batch_sizes]


class Timed:
    """A device, and the seconds for which threads have waited for it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.waited = 0.0  # right where one thread runs batches

    def wait(self, event: int) -> None:
        began = time.perf_counter()
        self._device.wait(event)
        self.waited += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class Unrecorded:
    """A stage whose work is put on the stream call by call, not recorded into a graph."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.inputs, self.outputs, self.batch_sizes = stage.inputs, stage.outputs, stage.batch_sizes

    def arena_bytes(self, batch_size: int) -> int:
        return self._stage.arena_bytes(batch_size)

    def context(self, batch_size: int, addresses: Mapping[str, int], arena: int, stream: int) -> Context:
        return _Unrecorded(self._stage.context(batch_size, addresses, arena, stream))

    def close(self) -> None:
        self._stage.close()


class _Unrecorded:
    capturable = False

    def __init__(self, context: Context) -> None:
        self._context = context

    def enqueue(self) -> None:
        self._context.enqueue()

    def close(self) -> None:
        self._context.close()


def open_engine(
    kind: str,
    bundle: Bundle,
    *,
    sizes: Sequence[int] = SIZES,
    stages: int = 0,
    lanes: int = LANES,
    max_slots: int = WAITING,
    graphs: bool = True,
) -> Opened:
    """A warm engine. `stages`: only the first so many will be run in batches, the others one by one; 0: all will."""
    began = time.perf_counter()
    count = len(bundle.manifest.stages)
    by_stage = [tuple(sizes) if not stages or number < stages else (1,) for number in range(count)]
    device, loaded, runtime = _load(kind, bundle, by_stage)
    timed = Timed(device)
    built = loaded if graphs else [Unrecorded(stage) for stage in loaded]
    engine = GpuEngine(bundle, timed, built, name=kind, runtime=runtime, executors=lanes, max_slots=max_slots)
    try:
        engine.warm_up()
    except BaseException:
        engine.close()
        raise
    return Opened(bundle, engine, timed, loaded, time.perf_counter() - began)


def _load(kind: str, bundle: Bundle, sizes: Sequence[Sequence[int]]) -> tuple[Device, Sequence[Stage], str]:
    """The device, the bundle's stages on it, and what runs them."""
    # Each needs an installation of its own: imported where it is chosen.
    if kind in ("torch-cuda", "torch-cuda-compiled"):
        import torch

        from server.engines.gpu import torch_stage
        from server.engines.gpu.cuda import CudaDevice

        place, compile_ = torch_stage.CudaPlace(tf32=bundle.manifest.precision != "fp32"), None
        if kind == "torch-cuda-compiled":
            from server.engines.gpu.torch_compile import compiler

            compile_ = compiler(Path(tempfile.gettempdir()) / f"dvt-compiled-{os.geteuid()}")
        stages = torch_stage.load(bundle, place, sizes, compile_)
        return CudaDevice(), stages, f"torch {torch.__version__}"
    if kind == "fake":
        from server.engines.gpu import torch_stage

        fake = _fake_cuda()
        cuda = fake.FakeCuda(memory=2**30)
        return cuda, torch_stage.load(bundle, fake.HostPlace(cuda), sizes), "torch on a fake device"
    if kind == "onnx-cuda":
        import onnxruntime

        from server.engines.gpu import onnx_stage
        from server.engines.gpu.cuda import CudaDevice

        return CudaDevice(), onnx_stage.load(bundle, sizes), f"onnxruntime {onnxruntime.__version__}"
    if kind == "tensorrt":
        from server.engines.gpu.cuda import CudaDevice
        from server.engines.tensorrt.bundles import open_tensorrt_stages

        device = CudaDevice()
        stages = open_tensorrt_stages(bundle, max_batch_sizes=[taken[-1] for taken in sizes], build=True)
        return device, stages, stages[0].runtime
    raise RuntimeError(f"no engine {kind} in this version")


def _fake_cuda() -> ModuleType:
    """The tests' device, which finds fault with what a real one would not forgive."""
    spec = importlib.util.spec_from_file_location("fake_cuda", FAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
