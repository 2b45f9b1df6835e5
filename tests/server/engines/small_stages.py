"""Three small hand-made stages: enough for an engine, without torch or a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest

SIDE, CLASSES, DIM, MAPS = 8, 10, 6, 2  # input height and width; K; D; relation maps
GRIDS = ((1, 2), (2, 2), (2, 3))
IMAGE = ("B", SIDE, SIDE, 3)
Shapes = dict[str, tuple[int | str, ...]]


def state(stage: int) -> Shapes:
    """What a stage leaves for the next one. An ONNX graph cannot take and leave tensors of one name."""
    if not 1 <= stage < len(GRIDS):
        return {}
    tokens = GRIDS[stage - 1][0] * GRIDS[stage - 1][1]
    return {f"features{stage}": ("B", tokens, DIM), f"relations{stage}": ("B", MAPS, tokens + 1, tokens + 1)}


def outputs(stage: int) -> Shapes:
    return {"logits": ("B", CLASSES), "probabilities": ("B", CLASSES), "confidence": ("B",), **state(stage)}


def stage_model(stage: int) -> onnx.ModelProto:
    """All inputs flattened and joined, then one random matrix for each output."""
    rng = np.random.default_rng(stage)
    inputs: Shapes = {"image": IMAGE, **state(stage - 1)}
    constants = {"rows": np.array([0, -1]), "last": np.array([-1]), "scale": np.float32(1 / 255)}
    nodes = [
        helper.make_node("Cast", ["image"], ["image_f32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["image_f32", "scale"], ["image_scaled"]),
        helper.make_node("Reshape", ["image_scaled", "rows"], ["image_flat"]),
        *[helper.make_node("Reshape", [name, "rows"], [f"{name}_flat"]) for name in state(stage - 1)],
        helper.make_node("Concat", [f"{name}_flat" for name in inputs], ["joined"], axis=1),
    ]
    width = sum(int(np.prod(shape[1:])) for shape in inputs.values())
    for name, shape in {"logits": ("B", CLASSES), **state(stage)}.items():
        size = int(np.prod(shape[1:]))
        constants[f"{name}_w"] = rng.normal(0, 0.3, (width, size)).astype(np.float32)
        constants[f"{name}_shape"] = np.array([-1, *shape[1:]])
        nodes.append(helper.make_node("MatMul", ["joined", f"{name}_w"], [f"{name}_row"]))
        nodes.append(helper.make_node("Reshape", [f"{name}_row", f"{name}_shape"], [name]))
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1))
    nodes.append(helper.make_node("ReduceMax", ["probabilities", "last"], ["confidence"], keepdims=0))
    kinds = {"image": TensorProto.UINT8}
    graph = helper.make_graph(
        nodes,
        f"stage{stage}",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs(stage).items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_bundle(root: Path, **changed_outputs: tuple[int | str, ...]) -> Bundle:
    """A bundle of those stages; `changed_outputs`: other shapes than the graphs have, for the manifest only."""
    stages = []
    for stage, grid in enumerate(GRIDS, start=1):
        onnx.save(stage_model(stage), root / f"stage{stage}.onnx")
        inputs = {"image": TensorSpec(dtype="uint8", shape=IMAGE)}
        inputs |= {name: TensorSpec(dtype="float32", shape=shape) for name, shape in state(stage - 1).items()}
        named = outputs(stage) | {name: shape for name, shape in changed_outputs.items() if name in outputs(stage)}
        left = {name: TensorSpec(dtype="float32", shape=shape) for name, shape in named.items()}
        stages.append(
            StageSpec.of(root, f"stage{stage}.onnx", inputs=inputs, outputs=left, grid=grid, gmacs=float(stage))
        )
    labels = [f"class {number}" for number in range(CLASSES)]
    write_manifest(root, name="tiny", labels=labels, preprocessing=Preprocessing(SIDE, (SIDE, SIDE)), stages=stages)
    return Bundle.load(root, need_frontier=False)
