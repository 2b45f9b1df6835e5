"""A bundle in miniature: three real graphs, made by hand in a moment, whose exits differ in where images leave."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `benchmarks` is not installed; it is run from the root folder
    sys.path.insert(0, str(ROOT))

from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest  # noqa: E402
from server.calibration.sweep import sweep  # noqa: E402

SIDE = 32
LABELS = ("red", "green", "blue")
GMACS = (0.1, 0.3, 0.7)
STAGES = len(GMACS)

Shapes = dict[str, tuple[int | str, ...]]


def state(stage: int) -> Shapes:
    """What a stage leaves for the next: the image's mean colour."""
    return {f"features_{stage}": ("B", len(LABELS))} if 1 <= stage < STAGES else {}


def stage_model(stage: int) -> onnx.ModelProto:
    """The class is the strongest colour of the image, weighed by the stage; later stages add what came before.

    No matrix product: sums over an image's own pixels are the same in every batch.
    """
    inputs: Shapes = {"image": ("B", SIDE, SIDE, 3), **state(stage - 1)}
    outputs: Shapes = {"logits": ("B", 3), "probabilities": ("B", 3), "confidence": ("B",), **state(stage)}
    weights = np.roll(np.array([0.02, 0.03, 0.05], np.float32), stage)
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "sides"], ["colour"], keepdims=0),
        helper.make_node("Mul", ["colour", "weights"], ["weighed"]),
        helper.make_node("Add", ["weighed", next(iter(state(stage - 1)), "none")], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ReduceMax", ["probabilities", "last"], ["confidence"], keepdims=0),
        *[helper.make_node("Mul", ["logits", "half"], [name]) for name in state(stage)],
    ]
    constants = {
        "sides": np.array([1, 2]),
        "last": np.array([-1]),
        "weights": weights,
        "none": np.zeros(3, np.float32),
        "half": np.float32(0.5),
    }
    graph = helper.make_graph(
        nodes,
        f"stage{stage}",
        [_value(name, shape) for name, shape in inputs.items()],
        [_value(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def _value(name: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.UINT8 if name == "image" else TensorProto.FLOAT, shape)


def _specs(names: Shapes) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype="uint8" if name == "image" else "float32", shape=s) for name, s in names.items()}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("bundle")
    stages = []
    for stage, gmacs in enumerate(GMACS, start=1):
        model = stage_model(stage)
        onnx.save(model, root / f"stage{stage}.onnx")
        answers: Shapes = {"logits": ("B", 3), "probabilities": ("B", 3), "confidence": ("B",), **state(stage)}
        inputs: Shapes = {"image": ("B", SIDE, SIDE, 3), **state(stage - 1)}
        stages.append(
            StageSpec.of(
                root,
                f"stage{stage}.onnx",
                inputs=_specs(inputs),
                outputs=_specs(answers),
                grid=(stage, stage),
                gmacs=gmacs,
            )
        )
    manifest = write_manifest(
        root, name="colours-dvt", labels=LABELS, preprocessing=Preprocessing(SIDE, (SIDE, SIDE)), stages=stages
    )
    rng = np.random.default_rng(0)
    confidence = rng.random((STAGES, 200), dtype=np.float32)
    frontier = sweep(confidence[:-1], rng.random((STAGES, 200)) < confidence, GMACS, key=manifest.frontier_key)
    return Bundle.load(root, need_frontier=False).write_frontier(frontier)


@pytest.fixture
def run(bundle: Bundle, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run("swaps", "--swaps", "5")` runs the benchmark on the small bundle; its file of results."""

    def run(name: str, *arguments: str) -> dict[str, Any]:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        status = benchmark.main(["--bundle", str(bundle.path), "--images", "8", "--out", str(tmp_path), *arguments])
        results: dict[str, Any] = json.loads(next(tmp_path.glob(f"{name}*.json")).read_text())
        assert (status == 0) == (not results["broken"])
        return results

    return run
