"""A bundle whose graphs the fake understands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest
from server.engines.tensorrt.gpus import Gpu
from tests.server.engines.tensorrt.fake_tensorrt import graph

LABELS = ("bird", "car", "cat")
IMAGE = ["uint8", "B", 8, 8, 3]
ANSWERS = {"logits": ["float32", "B", 3], "probabilities": ["float32", "B", 3], "confidence": ["float32", "B"]}
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0))


def tensors(stage: int) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Inputs and outputs; each stage but the last hands features on."""
    taken = {f"features_{stage - 1}": ["float16", "B", 4]} if stage > 1 else {}
    left = {f"features_{stage}": ["float16", "B", 4]} if stage < 3 else {}
    return {"image": IMAGE, **taken}, {**ANSWERS, **left}


def write_bundle(root: Path, precision: str = "fp16", graphs: Callable[[int], bytes] | None = None) -> Bundle:
    root.mkdir(exist_ok=True)
    stages = []
    for stage in (1, 2, 3):
        inputs, outputs = tensors(stage)
        (root / f"stage{stage}.onnx").write_bytes(graphs(stage) if graphs else graph(inputs, outputs))
        specs = [
            {name: TensorSpec(dtype=dtype, shape=tuple(shape)) for name, (dtype, *shape) in side.items()}
            for side in (inputs, outputs)
        ]
        stages.append(
            StageSpec.of(root, f"stage{stage}.onnx", inputs=specs[0], outputs=specs[1], grid=(1, 1), gmacs=float(stage))
        )
    write_manifest(
        root, name="tiny", labels=LABELS, preprocessing=Preprocessing(8, (8, 8)), stages=stages, precision=precision
    )
    return Bundle.load(root, need_frontier=False)
