"""Engines run single stages of a cascade; `server.core.Engine` is their contract. `load_engine` makes the choice.

What waits, and why a stage runs, is not known here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from server.bundle.manifest import Bundle
from server.core import Engine
from server.errors import EngineUnavailable

log = logging.getLogger(__name__)

MAX_SLOTS = 256  # where nobody says


def load_engine(
    bundle: Bundle,
    *,
    engine: str = "auto",
    max_batch_sizes: Sequence[int] | None = None,
    executors: int | None = None,
    max_slots: int = MAX_SLOTS,
    engine_dir: Path | None = None,
    build_engines: bool = False,
) -> Engine:
    """The engine of this name for a bundle on this machine; "auto" takes the best that is really there,
    for a bundle in int8 the CPU.

    `max_batch_sizes` overrides what the engine says pays, per stage, `executors` how many batches it says pay at once.
    `max_slots`: states that it should be able to hold beside those of batches that run. `engine_dir`: where TensorRT's
    plans lie, None in the bundle; `build_engines`: plans that are missing are built.

    Raises EngineUnavailable for an engine that cannot run here, BundleError for a bundle that the engine cannot run,
    ModuleNotFoundError where not even ONNX Runtime is installed.
    """
    # Runtimes are heavy, and extras of the distribution: imported here, where they are chosen.
    from server.engines.gpu import load as gpu
    from server.engines.gpu.probe import visible_gpus

    def on_gpu(name: str) -> Engine:
        return gpu.load(
            name,
            bundle,
            max_batch_sizes=max_batch_sizes,
            executors=executors,
            max_slots=max_slots,
            engine_dir=engine_dir,
            build_engines=build_engines,
        )

    on_cpus = bundle.manifest.precision == gpu.FOR_CPUS
    if engine == "auto" and not on_cpus and visible_gpus():
        for name in gpu.NAMES:
            try:
                return on_gpu(name)
            except EngineUnavailable as error:
                log.info("%s", error)
    elif engine in gpu.NAMES:
        return on_gpu(engine)
    elif engine not in ("auto", "onnx"):
        raise EngineUnavailable(f"there is no engine {engine}; there are {', '.join(('onnx', *gpu.NAMES))}")
    if engine == "auto" and not on_cpus and bundle.manifest.precision != "fp32":
        raise EngineUnavailable(
            f"{bundle.path}: is in {bundle.manifest.precision}, which is for GPUs, and there is none that could run it "
            "here; export it with --precision fp32, or ask for --engine onnx"
        )
    from server.engines.onnx import OnnxEngine

    return OnnxEngine(bundle, max_batch_sizes=max_batch_sizes, executors=executors)
