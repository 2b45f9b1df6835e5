"""A stage's graph as an ONNX file, with a dynamic batch: in fp32 for ONNX Runtime on CPUs, opset 23 with `Attention` as
one operator; in half precision for GPUs, opset 20, where TensorRT builds all of it."""

from __future__ import annotations

import logging
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import torch

from export.half import Precision
from export.stage import IMAGE, StageGraph

OPSETS: dict[Precision, int] = {"fp32": 23, "fp16": 20, "bf16": 20}  # the first with Attention; the first with Gelu
NORMALIZED = "normalized"  # tensor in every graph: the image after normalisation, float32, (B, 3, S, S) or (B, S, S, 3)


def write_onnx(graph: StageGraph, path: Path) -> None:
    """Trace `graph` with a dynamic batch and write it, weights inside."""
    inputs = graph.inputs()
    batch = torch.export.Dim("B", min=1, max=4096)
    # The exporter reports its progress on stdout and warns about operators that it looked at; neither helps a user.
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                graph,
                graph.example(batch=2),
                dynamo=True,
                opset_version=OPSETS[graph.precision],
                input_names=list(inputs),
                output_names=list(graph.outputs()),
                dynamic_shapes=tuple({0: batch} for _ in inputs),
            )
        finally:
            logger.setLevel(level)
    assert program is not None  # it is None only where the exporter writes the file itself
    proto = program.model_proto
    del proto.graph.value_info[:]  # the exporter's intermediate shapes break quantisers, and no runtime needs them
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer):
        part.ClearField("metadata_props")  # stack traces, with paths of the machine that exported
        part.ClearField("doc_string")
    _name_normalized(proto.graph, graph.channels_last)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def _name_normalized(graph: onnx.GraphProto, channels_last: bool) -> None:
    """Give the tensor that leaves the normalisation its name: image -> Cast (-> Transpose) -> Mul -> Add -> this."""
    name = IMAGE
    for operator in ("Cast", *([] if channels_last else ["Transpose"]), "Mul", "Add"):
        found = [node for node in graph.node if name in node.input and node.op_type != "Shape"]
        if [node.op_type for node in found] != [operator]:
            raise RuntimeError(f"expected the normalisation's {operator} after {name}, found {found}")
        name = found[0].output[0]
    for node in graph.node:
        _rename(node, name, NORMALIZED)


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            if name == old:
                names[i] = new


def normalized_input(path: Path) -> onnx.ModelProto:
    """The graph of `path` with its image input replaced by the normalised image, (B, 3, S, S) whatever the layout
    inside: for inputs that are not pixels."""
    proto = onnx.load(path)
    graph = proto.graph
    state = [value for value in graph.input if value.name != IMAGE]
    side = next(v for v in graph.input if v.name == IMAGE).type.tensor_type.shape.dim[1].dim_value
    pixels = onnx.helper.make_tensor_value_info(NORMALIZED, onnx.TensorProto.FLOAT, ["B", 3, side, side])
    del graph.input[:]
    graph.input.extend([pixels, *state])
    dead, channels_last = {IMAGE}, True  # what only the normalisation computed
    for node in list(graph.node):
        if node.op_type == "Shape":  # asks for the batch, which both have
            _rename(node, IMAGE, NORMALIZED)
        if dead & set(node.input):
            graph.node.remove(node)
            channels_last &= node.op_type != "Transpose"
            if NORMALIZED in node.output:
                break
            dead.update(node.output)
    if channels_last:
        inside = f"{NORMALIZED}_channels_last"
        for node in graph.node:
            _rename(node, NORMALIZED, inside)
        graph.node.insert(0, onnx.helper.make_node("Transpose", [NORMALIZED], [inside], perm=[0, 2, 3, 1]))
    return proto


def without_bfloat16(path: Path) -> onnx.ModelProto:
    """The graph of `path` with float32 wherever it has bfloat16, the weights as they were rounded: ONNX Runtime has no
    kernels for bfloat16 on CPUs."""
    proto = onnx.load(path)
    graph = proto.graph
    for value in (*graph.input, *graph.output):
        tensor = value.type.tensor_type
        tensor.elem_type = _widened(tensor.elem_type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to":
                attribute.i = _widened(attribute.i)
            elif attribute.HasField("t"):
                attribute.t.CopyFrom(_widened_tensor(attribute.t))
    for tensor in graph.initializer:
        tensor.CopyFrom(_widened_tensor(tensor))
    return proto


def _widened(dtype: int) -> int:
    return onnx.TensorProto.FLOAT if dtype == onnx.TensorProto.BFLOAT16 else dtype


def _widened_tensor(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_type != onnx.TensorProto.BFLOAT16:
        return tensor
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
