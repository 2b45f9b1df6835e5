"""The tiny bundle's stages in half precision as real ONNX graphs, for a real builder."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.server.engines.tensorrt.tiny_bundle import tensors

KINDS = {"uint8": TensorProto.UINT8, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def half_graph(stage: int, *, body: str = "float16") -> bytes:
    """Inputs flattened and joined, one matrix for each output, the head in float32. `body`: the type of the middle."""
    inputs, outputs = tensors(stage)
    rng = np.random.default_rng(stage)
    constants = {"rows": np.array([0, -1]), "last": np.array([-1])}
    nodes = []
    for name in inputs:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_half"], to=KINDS[body]))
        nodes.append(helper.make_node("Reshape", [f"{name}_half", "rows"], [f"{name}_flat"]))
    nodes.append(helper.make_node("Concat", [f"{name}_flat" for name in inputs], ["joined"], axis=1))
    width = sum(int(np.prod(shape[1:])) for _, *shape in inputs.values())
    for name in ("logits", *(name for name in outputs if name.startswith("features"))):
        kind, _, size = outputs[name]
        constants[f"{name}_w"] = rng.normal(0, 0.1, (width, size)).astype(body)
        nodes.append(helper.make_node("MatMul", ["joined", f"{name}_w"], [f"{name}_body"]))
        nodes.append(helper.make_node("Cast", [f"{name}_body"], [name], to=KINDS[kind]))
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1))
    nodes.append(helper.make_node("ReduceMax", ["probabilities", "last"], ["confidence"], keepdims=0))
    graph = helper.make_graph(
        nodes,
        f"stage{stage}",
        *(
            [helper.make_tensor_value_info(name, KINDS[kind], shape) for name, (kind, *shape) in side.items()]
            for side in (inputs, outputs)
        ),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def attention_graph() -> bytes:
    """What cannot be built: ONNX's own attention with its logits as a second output, as exported for CPUs."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Attention", ["pixels", "pixels", "pixels"], ["out", "", "", "logits4"]),
        helper.make_node("ReduceMax", ["logits4", "axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ReduceMax", ["probabilities", "last"], ["confidence"], keepdims=0),
    ]
    shapes = {"logits": ["B", 3], "probabilities": ["B", 3], "confidence": ["B"]}
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 8, 8, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.array([1, 2]), "axes"), numpy_helper.from_array(np.array([-1]), "last")],
    )
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    ).SerializeToString()
    return content
