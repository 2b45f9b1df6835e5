"""A stage's graph as an ONNX file for ONNX Runtime: opset 23, fp32, `Attention` as one operator, dynamic batch."""

from __future__ import annotations

import logging
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import onnx
import torch

from export.stage import IMAGE, StageGraph

OPSET = 23  # the first with Attention
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
                opset_version=OPSET,
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
