"""Every operator in torch does what ONNX Runtime does; what nothing here does is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from server.bundle.manifest import Bundle, StageSpec, TensorSpec
from server.engines.gpu import torch_stage
from server.errors import BundleError
from tests.server.engines.gpu.fake_cuda import FakeCuda, HostPlace
from tests.server.engines.small_stages import MAPS, stage_model, write_bundle

RNG = np.random.default_rng(0)
B = 3


def f32(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


Case = tuple[str, list[np.ndarray | None], dict[str, Any]]
# The operator; what it takes, the first the input of the graph and the rest constants; attributes.
CASES: list[Case] = [
    *[(name, [f32(B, 5)], {}) for name in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "Neg")],
    *[
        (name, [f32(B, 5)], {})
        for name in ("Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Tanh")
    ],
    *[(name, [np.abs(f32(B, 5))], {}) for name in ("Log", "Sqrt")],
    *[(name, [f32(B, 4, 5), f32(4, 1)], {}) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")],
    ("Pow", [np.abs(f32(B, 5)), np.array(2.5, np.float32)], {}),
    *[
        (name, [f32(B, 5), np.zeros(5, np.float32)], {})
        for name in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")
    ],
    ("Gelu", [f32(B, 5)], {}),
    ("Gelu", [f32(B, 5)], {"approximate": "tanh"}),
    ("MatMul", [f32(B, 4, 5), f32(5, 6)], {}),
    ("MatMul", [f32(B, 2, 4, 5), f32(B, 2, 5, 6)], {}),
    ("Gemm", [f32(B, 5), f32(6, 5), f32(6)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [f32(B, 5), f32(5, 6)], {}),
    ("Einsum", [f32(B, 4, 5), f32(B, 6, 5)], {"equation": "bij, bkj -> bik"}),
    ("Conv", [f32(B, 4, 9, 9), f32(8, 4, 3, 3), f32(8)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("Conv", [f32(B, 4, 9, 9), f32(8, 2, 3, 3)], {"group": 2, "pads": [0, 1, 2, 1], "dilations": [2, 2]}),
    ("Conv", [f32(B, 4, 9), f32(8, 4, 3)], {}),
    ("LayerNormalization", [f32(B, 4, 5), f32(5), f32(5)], {"epsilon": 1e-3}),
    ("LayerNormalization", [f32(B, 4, 8), f32(8), f32(8)], {}),
    ("LayerNormalization", [f32(B, 4, 5), f32(4, 5)], {"axis": 1}),
    ("Softmax", [f32(B, 4, 5)], {"axis": 1}),
    ("Softmax", [f32(B, 4, 5)], {}),
    ("LogSoftmax", [f32(B, 4, 5)], {}),
    ("Clip", [f32(B, 5), np.float32(-0.5), np.float32(0.5)], {}),
    ("Clip", [f32(B, 5), None, np.float32(0.5)], {}),
    ("ReduceMax", [f32(B, 4, 5), i64(-1)], {"keepdims": 0}),
    ("ReduceMin", [f32(B, 4, 5), i64(1, 2)], {"keepdims": 1}),
    ("ReduceMean", [f32(B, 4, 5), i64(1)], {}),
    ("ReduceSum", [f32(B, 4, 5)], {}),
    ("ReduceSum", [f32(B, 4, 5)], {"noop_with_empty_axes": 1}),
    ("ReduceSumSquare", [f32(B, 4, 5), i64(2)], {}),
    ("ReduceL2", [f32(B, 4, 5), i64(2)], {}),
    ("Reshape", [f32(B, 4, 6), i64(0, -1, 3)], {}),
    ("Reshape", [f32(B, 4, 6), i64(-1, 8, 3)], {"allowzero": 1}),
    ("Flatten", [f32(B, 4, 6)], {"axis": -1}),
    ("Transpose", [f32(B, 4, 6)], {"perm": [0, 2, 1]}),
    ("Transpose", [f32(B, 4, 6)], {}),
    ("Squeeze", [f32(B, 1, 6, 1), i64(1, -1)], {}),
    ("Squeeze", [f32(B, 1, 6, 1)], {}),
    ("Unsqueeze", [f32(B, 6), i64(-1, 1)], {}),
    ("Expand", [f32(B, 1, 6), i64(1, 4, 1)], {}),
    ("Tile", [f32(B, 2, 3), i64(1, 2, 2)], {}),
    ("Concat", [f32(B, 2, 3), f32(B, 4, 3)], {"axis": 1}),
    ("Split", [f32(B, 7), i64(2, 5)], {"axis": 1}),
    ("Split", [f32(B, 8)], {"axis": -1, "num_outputs": 3}),
    ("TopK", [f32(B, 9), i64(2)], {}),
    ("TopK", [f32(B, 9, 4), i64(3)], {"axis": 1, "largest": 0}),
    ("Slice", [f32(B, 9, 8), i64(1, -5), i64(2**62, -1), i64(1, 2), i64(2, 1)], {}),
    ("Slice", [f32(B, 9), i64(0, 3), i64(B, 6)], {}),
    ("Gather", [f32(B, 9, 8), np.array(-1, np.int64)], {"axis": 1}),
    ("Gather", [f32(B, 9, 8), np.array([[0, 8], [3, 3]], np.int64)], {"axis": -2}),
    ("Pad", [f32(B, 4, 5), i64(0, 1, 0, 0, 2, 3), np.float32(0.5)], {}),
    ("Pad", [f32(B, 4, 5), i64(1, 2), None, i64(2)], {}),
    ("Cast", [f32(B, 5) * 10], {"to": TensorProto.INT32}),
    ("Where", [f32(B, 5) > 0, f32(5), f32(5)], {}),
    ("Not", [f32(B, 5) > 0], {}),
    ("Dropout", [f32(B, 5)], {}),
]
OUTPUTS = {"TopK": 2}


def compare(file: Path, proto: onnx.ModelProto, feed: np.ndarray, *, within: float = 1e-5) -> None:
    """One graph by ONNX Runtime, and by torch, whose operators get it as constants and as what is computed."""
    import onnxruntime as ort

    onnx.save(proto, file)
    expected = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": feed}
    )
    graph = torch_stage._Graph.read(file)
    given = torch_stage.torch.from_numpy(feed)
    values = {"x": given}
    constants = dict(graph.constants)
    for node in graph.nodes:
        kernel, which = node.kernel(constants)
        everything = {**constants, **values}
        values |= node.named(kernel(*(everything[name] if name else None for name in which)))
    for output, wanted in zip(proto.graph.output, expected, strict=True):
        found = values[output.name].numpy()
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, atol=within, rtol=within)


@pytest.mark.parametrize(("operator", "takes", "attributes"), CASES, ids=[f"{c[0]}-{at}" for at, c in enumerate(CASES)])
def test_an_operator_does_what_it_does_in_onnx_runtime(
    tmp_path: Path, operator: str, takes: list[np.ndarray | None], attributes: dict[str, Any]
) -> None:
    first, *rest = takes
    assert first is not None
    names = ["x", *("" if array is None else f"constant{at}" for at, array in enumerate(rest))]
    parts = len(rest[0]) if operator == "Split" and rest else attributes.get("num_outputs", OUTPUTS.get(operator, 1))  # type: ignore[arg-type]
    results = [f"y{at}" for at in range(parts)]
    graph = helper.make_graph(
        [helper.make_node(operator, names, results, **attributes)],
        "one",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(first.dtype), first.shape)],
        [helper.make_empty_tensor_value_info(name) for name in results],
        [numpy_helper.from_array(a, f"constant{at}") for at, a in enumerate(rest) if a is not None],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto)
    compare(tmp_path / "one.onnx", proto, first)


@pytest.mark.parametrize("mode", [0, 2, 3])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_attention_and_the_logits_that_it_hands_out(
    tmp_path: Path, mode: int, mask: bool, flat: bool, logits: bool
) -> None:
    heads, tokens, width = 2, 5, 4
    shape = (B, tokens, heads * width) if flat else (B, heads, tokens, width)
    constants = {"k": f32(*shape), "v": f32(*shape), **({"mask": f32(B, heads, tokens, tokens)} if mask else {})}
    more = {"q_num_heads": heads, "kv_num_heads": heads} if flat else {}
    node = helper.make_node(
        "Attention", ["x", *constants], ["y", "", "", "logits"] if logits else ["y"],
        scale=0.3, qk_matmul_output_mode=mode, **more,
    )  # fmt: skip
    outputs = ["y", "logits"] if logits else ["y"]
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    compare(tmp_path / "attention.onnx", proto, f32(*shape))


def test_a_product_and_its_bias_are_one_operator(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["b", "p"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (B, 4, 5))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(f32(5, 6), "w"), numpy_helper.from_array(f32(6), "b")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    compare(tmp_path / "linear.onnx", proto, f32(B, 4, 5))
    assert [node.operator for node in torch_stage._Graph.read(tmp_path / "linear.onnx").nodes] == ["Linear"]


def relation_bias(tmp_path: Path, mixed: str = "v") -> Path:
    """Queries and keys out of one product, laid out by head, and a bias on their logits that is a product, too."""
    heads, tokens, width = 2, 4, 3
    nodes = [
        helper.make_node("Reshape", ["x", "parts"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[2, 0, 3, 1, 4]),
        helper.make_node("Split", ["t"], ["q5", "k5", "v5"], axis=0, num_outputs=3),
        *[helper.make_node("Squeeze", [f"{name}5", "first"], [name]) for name in "qkv"],
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["logits"]),
        helper.make_node("Transpose", [mixed], ["vt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["w", "vt"], ["bias"]),
        helper.make_node("Add", ["logits", "bias"], ["y"]),
    ]
    constants = {
        "parts": i64(0, tokens, 3, heads, width),
        "first": i64(0),
        "w": f32(tokens, width),
        "c": f32(B, heads, tokens, width),
    }
    graph = helper.make_graph(
        nodes,
        "relations",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (B, tokens, 3 * heads * width))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    compare(tmp_path / "relations.onnx", proto, f32(B, tokens, 3 * heads * width))
    return tmp_path / "relations.onnx"


def test_a_product_is_added_to_another_in_place_and_heads_are_laid_out_once(tmp_path: Path) -> None:
    operators = [node.operator for node in torch_stage._Graph.read(relation_bias(tmp_path)).nodes]
    assert operators.count("ByHead") == operators.count("AddedProduct") == 1
    assert operators.count("MatMul") == 1


def test_a_product_that_is_alike_for_all_images_is_not_added_to_in_place(tmp_path: Path) -> None:
    file = relation_bias(tmp_path, mixed="c")
    assert "AddedProduct" not in [node.operator for node in torch_stage._Graph.read(file).nodes]


def half_normalization() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray], tuple[int, ...]]:
    nodes = [
        helper.make_node("Cast", ["x"], ["x32"], to=TensorProto.FLOAT),
        helper.make_node("LayerNormalization", ["x32", "w", "b"], ["n32"], epsilon=1e-4),
        helper.make_node("Cast", ["n32"], ["y"], to=TensorProto.FLOAT16),
    ]
    return nodes, {"w": f32(16), "b": f32(16)}, (B, 5, 16)


def half_attention() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray], tuple[int, ...]]:
    nodes = [
        helper.make_node("Identity", ["x"], ["k"]),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["x", "kt"], ["product"]),
        helper.make_node("Add", ["product", "mask"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "k"], ["y"]),
    ]
    return nodes, {"mask": f32(B, 2, 5, 5).astype(np.float16)}, (B, 2, 5, 8)


JOINS = {"HalfLayerNormalization": half_normalization, "PlainAttention": half_attention}


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("joined", JOINS)
def test_in_half_precision_some_operators_are_one_unless_others_want_what_is_between(
    tmp_path: Path, joined: str, also: bool
) -> None:
    nodes, constants, shape = JOINS[joined]()
    between = "n32" if joined == "HalfLayerNormalization" else "logits"
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)],
        [helper.make_empty_tensor_value_info(name) for name in (["y", between] if also else ["y"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto)
    compare(tmp_path / "half.onnx", proto, f32(*shape).astype(np.float16), within=5e-3)
    operators = [node.operator for node in torch_stage._Graph.read(tmp_path / "half.onnx").nodes]
    assert (joined in operators) == (not also)


# -- what cannot be run


def stage(root: Path, proto: onnx.ModelProto, spec: StageSpec) -> torch_stage.TorchStage:
    onnx.save(proto, root / "changed.onnx")
    return torch_stage.TorchStage(root / "changed.onnx", spec, HostPlace(FakeCuda()), (1,))


def first_stage(bundle: Bundle) -> tuple[onnx.ModelProto, StageSpec]:
    return stage_model(1), bundle.manifest.stages[0]


def test_an_operator_that_nothing_here_does_is_named(tmp_path: Path) -> None:
    proto, spec = first_stage(write_bundle(tmp_path))
    next(node for node in proto.graph.node if node.op_type == "Softmax").op_type = "Hardmax"
    with pytest.raises(BundleError, match=r"changed\.onnx: the operator Hardmax is not known here"):
        stage(tmp_path, proto, spec)


def test_a_graph_that_does_not_fit_its_manifest_is_named(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    for change, message in (
        (lambda proto, _: proto.graph.output.pop(0), "has no output `logits`"),
        (lambda _, spec: spec.inputs.update(more=TensorSpec(dtype="uint8", shape=("B",))), "has no input `more`"),
        (lambda _, spec: spec.inputs.pop("image"), "has an input `image` that the manifest does not name"),
        (lambda _, spec: spec.outputs.update(logits=TensorSpec(dtype="int8", shape=("B",))), "`logits` is of int8"),
    ):
        proto, spec = first_stage(bundle)
        spec = spec.model_copy(update={"inputs": dict(spec.inputs), "outputs": dict(spec.outputs)})
        change(proto, spec)
        with pytest.raises(BundleError, match=message):
            stage(tmp_path, proto, spec)
    (tmp_path / "stage1.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"stage1\.onnx: cannot be read as ONNX"):
        torch_stage.TorchStage(tmp_path / "stage1.onnx", spec, HostPlace(FakeCuda()), (1,))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"relations1": ("B", MAPS, 3, 4)},
            r"stage1\.onnx: output `relations1` is float32 \[1, 2, 3, 3\]",
        ),
        (
            {"probabilities": ("B", 1)},
            r"output `probabilities` .*, the manifest says float32 \[1, 1\]",
        ),
    ],
)
def test_an_output_of_another_shape_than_the_manifest_says_is_named(
    tmp_path: Path, changed: dict[str, tuple[int | str, ...]], message: str
) -> None:
    spec = write_bundle(tmp_path, **changed).manifest.stages[0]
    cuda = FakeCuda()
    found = torch_stage.TorchStage(tmp_path / "stage1.onnx", spec, HostPlace(cuda), (1,))
    stream = cuda.stream()
    addresses = {name: cuda.allocate(4096) for name in ("image", "probabilities", "confidence", "relations1")}
    found.context(1, addresses, 0, stream).enqueue()
    with pytest.raises(BundleError, match=message):
        cuda.synchronize(stream)


def test_tensors_that_do_not_fit_an_operator_are_the_bundles_fault(tmp_path: Path) -> None:
    proto, spec = first_stage(write_bundle(tmp_path))
    weights = next(tensor for tensor in proto.graph.initializer if tensor.name == "logits_w")
    weights.CopyFrom(numpy_helper.from_array(f32(7, 10), "logits_w"))
    onnx.save(proto, tmp_path / "changed.onnx")
    cuda = FakeCuda()
    found = torch_stage.TorchStage(tmp_path / "changed.onnx", spec, HostPlace(cuda), (1,))
    stream = cuda.stream()
    addresses = {name: cuda.allocate(4096) for name in ("image", "probabilities", "confidence")}
    found.context(1, addresses, 0, stream).enqueue()
    with pytest.raises(BundleError, match=r"changed\.onnx: MatMul that gives `logits_row`: .*shapes"):
        cuda.synchronize(stream)
