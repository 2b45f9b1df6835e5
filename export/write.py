"""From checkpoint to bundle: every stage exported, run and compared, then written with its hashes as one folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from export.imported import imported_frontier
from export.int8 import BundlePrecision, quantise, scaling_images, stage_feeds
from export.stage import StageGraph, TensorShape
from export.to_onnx import OPSETS, without_bfloat16, write_onnx
from export.verify import Parity, verify, verify_int8
from model.checkpoint import load_model
from model.config import DVTConfig
from model.dvt import DVT
from model.flops import cumulative_macs
from server.bundle.frontier import Criterion
from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest
from server.calibration.calibrate import read_pixels
from server.engines.onnx import open_session


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    progress: Callable[[str], None] = lambda _: None,
    criterion: Criterion = "max_probability",
    notice: Callable[[str], None] = lambda _: None,
    precision: BundlePrecision = "fp32",
    images: Path | None = None,
) -> Bundle:
    """Write the bundle of a checkpoint. It still wants a calibration before it can serve, unless the checkpoint brings
    thresholds along; what is odd about those, in one line, goes to `notice`. In int8 and only there, `images` is the
    image folder that finds the scales.

    Raises CheckpointError for an unusable checkpoint, FileExistsError where `out` exists, CalibrationError for images
    that are of no use, VerificationError where the graphs do not compute what the model does. `out` appears only when
    all of it is right.
    """
    model, header = load_model(checkpoint)
    recipe = header.get("recipe", {})
    photos = None if images is None else photos_for_scales(images, model.config, recipe, notice)
    provenance = {
        "checkpoint_epochs": header.get("epochs"),
        "recipe": recipe,
        "torch": version("torch").split("+")[0],
        "onnx": onnx.__version__,
        "opset": OPSETS["fp32" if precision == "int8" else precision],
    }
    if photos is not None:
        provenance |= {"onnxruntime": onnxruntime.__version__, "scaling_images": len(photos)}
    bundle = export_model(model, out, provenance, progress, criterion, precision, photos)
    frontier = imported_frontier(header.get("imported", {}), bundle.manifest, notice)
    return bundle if frontier is None else bundle.write_frontier(frontier)


def export_model(
    model: DVT,
    out: Path,
    provenance: dict[str, object],
    progress: Callable[[str], None] = lambda _: None,
    criterion: Criterion = "max_probability",
    precision: BundlePrecision = "fp32",
    photos: NDArray[np.uint8] | None = None,
) -> Bundle:
    """As `export_checkpoint`, for a model in memory, and photos that are read, (B, S, S, 3)."""
    if (precision == "int8") != (photos is not None):
        raise ValueError("photos find the scales of int8, and are for nothing else")
    if out.exists():
        raise FileExistsError(f"{out} exists already; name another folder")
    config = model.config
    progress("counting MACs")
    macs = cumulative_macs(model)
    graphs = [
        StageGraph(model, number, criterion=criterion, precision="fp32" if precision == "int8" else precision)
        for number in range(1, config.num_stages + 1)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        files = [building / f"stage{graph.number}.onnx" for graph in graphs]
        for graph, file in zip(graphs, files, strict=True):
            progress(f"exporting stage {graph.number} of {len(graphs)}")
            write_onnx(graph, file)
        progress("comparing with PyTorch")
        sessions = [
            open_session(without_bfloat16(file).SerializeToString() if precision == "bf16" else file) for file in files
        ]
        parity = verify(model, graphs, sessions)
        if photos is not None:
            progress("quantising")
            parity = _quantise(model, graphs, sessions, files, photos)
        stages = [
            StageSpec.of(
                building,
                file.name,
                inputs=_specs(graph.inputs()),
                outputs=_specs(graph.outputs()),
                grid=(grid, grid),
                gmacs=round(cost / 1e9, 9),
            )
            for graph, file, cost, grid in zip(graphs, files, macs, config.grids, strict=True)
        ]
        write_manifest(
            building,
            name=f"{config.name}-dvt",
            labels=_labels(config),
            preprocessing=_preprocessing(config),
            stages=stages,
            precision=precision,
            criterion=criterion,
            parity=parity.to_dict(),
            provenance=provenance,
        )
        building.chmod(0o755)
        building.rename(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return Bundle.load(out, need_frontier=False)


def _quantise(
    model: DVT, graphs: Sequence[StageGraph], sessions: Sequence[Any], files: Sequence[Path], photos: NDArray[np.uint8]
) -> Parity:
    """Put quantised stages in the place of `files`, whose `sessions` are in fp32, and compare them with the model."""
    for graph, file in zip(graphs, files, strict=True):
        quantise(file, file, stage_feeds(graphs, sessions, graph.number, photos))
    return verify_int8(model, graphs, [open_session(file) for file in files], photos)


def photos_for_scales(images: Path, config: DVTConfig, recipe: Any, notice: Callable[[str], None]) -> NDArray[np.uint8]:
    """Those that find the scales: not from the slice that training left for calibration."""
    fraction = recipe.get("held_out") if isinstance(recipe, Mapping) else None
    if not isinstance(fraction, int | float):
        notice("the checkpoint does not say which images training left out: scales are from any of the folder")
        fraction = 0.0
    examples = scaling_images(images, _labels(config), fraction)
    return np.stack([read_pixels(file, _preprocessing(config)) for file, _ in examples])


def _labels(config: DVTConfig) -> tuple[str, ...]:
    return config.labels or tuple(str(i) for i in range(config.num_classes))


def _preprocessing(config: DVTConfig) -> Preprocessing:
    return Preprocessing(resize=config.resize, crop=(config.image_size, config.image_size))


def _specs(shapes: dict[str, TensorShape]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype=dtype, shape=shape) for name, (dtype, shape) in shapes.items()}


def seeded_model(config_name: str, seed: int = 0) -> DVT:
    """A variant with random weights: for benchmarks, where only the cost of a model matters."""
    from model.config import variant

    torch.manual_seed(seed)
    return DVT(variant(config_name)).eval()
