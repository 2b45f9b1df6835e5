"""From checkpoint to bundle: every stage exported, run and compared, then written with its hashes as one folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx
import torch

from export.half import Precision
from export.imported import imported_frontier
from export.stage import StageGraph, TensorShape
from export.to_onnx import OPSETS, without_bfloat16, write_onnx
from export.verify import verify
from model.checkpoint import load_model
from model.dvt import DVT
from model.flops import cumulative_macs
from server.bundle.frontier import Criterion
from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest
from server.engines.onnx import open_session


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    progress: Callable[[str], None] = lambda _: None,
    criterion: Criterion = "max_probability",
    notice: Callable[[str], None] = lambda _: None,
    precision: Precision = "fp32",
) -> Bundle:
    """Write the bundle of a checkpoint. It still wants a calibration before it can serve, unless the checkpoint brings
    thresholds along; what is odd about those, in one line, goes to `notice`.

    Raises CheckpointError for an unusable checkpoint, FileExistsError where `out` exists, VerificationError where the
    graphs do not compute what the model does. `out` appears only when all of it is right.
    """
    model, header = load_model(checkpoint)
    recipe = header.get("recipe", {})
    provenance = {
        "checkpoint_epochs": header.get("epochs"),
        "recipe": recipe,
        "torch": version("torch").split("+")[0],
        "onnx": onnx.__version__,
        "opset": OPSETS[precision],
    }
    bundle = export_model(model, out, provenance, progress, criterion, precision)
    frontier = imported_frontier(header.get("imported", {}), bundle.manifest, notice)
    return bundle if frontier is None else bundle.write_frontier(frontier)


def export_model(
    model: DVT,
    out: Path,
    provenance: dict[str, object],
    progress: Callable[[str], None] = lambda _: None,
    criterion: Criterion = "max_probability",
    precision: Precision = "fp32",
) -> Bundle:
    """As `export_checkpoint`, for a model in memory."""
    if out.exists():
        raise FileExistsError(f"{out} exists already; name another folder")
    config = model.config
    progress("counting MACs")
    macs = cumulative_macs(model)
    graphs = [
        StageGraph(model, number, criterion=criterion, precision=precision)
        for number in range(1, config.num_stages + 1)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        stages = []
        for graph, cost, grid in zip(graphs, macs, config.grids, strict=True):
            progress(f"exporting stage {graph.number} of {len(graphs)}")
            file = f"stage{graph.number}.onnx"
            write_onnx(graph, building / file)
            stages.append(
                StageSpec.of(
                    building,
                    file,
                    inputs=_specs(graph.inputs()),
                    outputs=_specs(graph.outputs()),
                    grid=(grid, grid),
                    gmacs=round(cost / 1e9, 9),
                )
            )
        progress("comparing with PyTorch")
        sessions = [
            open_session(without_bfloat16(file).SerializeToString() if precision == "bf16" else file)
            for file in (building / stage.file for stage in stages)
        ]
        parity = verify(model, graphs, sessions)
        write_manifest(
            building,
            name=f"{config.name}-dvt",
            labels=config.labels or tuple(str(i) for i in range(config.num_classes)),
            preprocessing=Preprocessing(resize=config.resize, crop=(config.image_size, config.image_size)),
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


def _specs(shapes: dict[str, TensorShape]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype=dtype, shape=shape) for name, (dtype, shape) in shapes.items()}


def seeded_model(config_name: str, seed: int = 0) -> DVT:
    """A variant with random weights: for benchmarks, where only the cost of a model matters."""
    from model.config import variant

    torch.manual_seed(seed)
    return DVT(variant(config_name)).eval()
