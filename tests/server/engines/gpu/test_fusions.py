"""Whole stages with our own kernels: the same answers and the same state, by fewer operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest
from server.engines.gpu import fusions, torch_stage
from server.engines.gpu.engine import batch_sizes
from server.engines.gpu.probe import visible_gpus
from tests.server.engines.gpu.conftest import Rig
from tests.server.engines.gpu.runs import all_stages, images

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
pytest.importorskip("onnxscript", reason="bundles are exported here")

from benchmarks.gpu_fused import Here
from export.half import Precision
from export.stage import StageGraph
from export.to_onnx import write_onnx
from model.config import VARIANTS
from model.dvt import DVT

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning"),
    *([pytest.mark.gpu] if visible_gpus() else []),
]

DEVICE = torch.device("cuda" if visible_gpus() else "cpu")
OURS = {fusions.ATTENTION, fusions.RELATION_MLP, fusions.STATE}


def exported(precision: Precision, out: Path) -> Bundle:
    """The micro model, with weights that make logits and relations count. Nothing is counted, nothing verified."""
    torch.manual_seed(0)
    model = DVT(VARIANTS["micro"]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name or "relation_reuse" in name:
                parameter *= 4
    stages = []
    for number in range(1, model.config.num_stages + 1):
        graph, file = StageGraph(model, number, precision=precision), f"stage{number}.onnx"
        write_onnx(graph, out / file)
        inputs, outputs = (
            {name: TensorSpec(dtype=dtype, shape=shape) for name, (dtype, shape) in shapes.items()}
            for shapes in (graph.inputs(), graph.outputs())
        )
        grid = model.config.grids[number - 1]
        stages.append(StageSpec.of(out, file, inputs=inputs, outputs=outputs, grid=(grid, grid), gmacs=float(number)))
    write_manifest(
        out,
        name="micro",
        labels=["a", "b", "c", "d"],
        preprocessing=Preprocessing(resize=48, crop=(48, 48)),
        stages=stages,
        precision=precision,
        provenance={},
    )
    return Bundle.load(out, need_frontier=False)


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported("fp32", tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="session", params=["fp16", "bf16"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(request.param, tmp_path_factory.mktemp(request.param))


def run(
    bundle: Bundle,
    number: int,
    given: Mapping[str, Tensor],
    fuse: bool,
    compile_: torch_stage.Compile | None = None,
    leave_out: Sequence[str] = (),
) -> dict[str, Tensor]:
    """What a stage gives when it runs the first time, and again into memory that holds no numbers: the same."""
    spec, place = bundle.manifest.stages[number - 1], Here(DEVICE)
    stage = torch_stage.TorchStage(bundle.stage_path(number), spec, place, (3,), compile_, fuse)
    addresses = {}
    for name, tensor in {**spec.inputs, **spec.outputs}.items():
        if name in leave_out:
            continue
        addresses[name] = len(place.tensors)
        dtype, shape = torch_stage.DTYPES[tensor.dtype], torch_stage._shape(tensor, 3)
        place.tensors.append(given[name] if name in given else torch.empty(shape, dtype=dtype, device=DEVICE))
    context = stage.context(3, addresses, 0, 0)
    found = []
    for _ in range(2):
        for name, address in addresses.items():
            if name not in given:
                place.tensors[address].fill_(torch.nan)
        context.enqueue()
        found.append({name: place.tensors[at].clone() for name, at in addresses.items() if name not in given})
    context.close()
    for name, tensor in found[0].items():
        assert tensor.isfinite().all(), name
        if compile_ is None:  # else the first run is by operators
            torch.testing.assert_close(tensor, found[1][name], atol=1e-3, rtol=1e-3)
    return found[1]


def through(bundle: Bundle, fuse: bool, compile_: torch_stage.Compile | None = None) -> list[dict[str, Tensor]]:
    """All stages, one after the other."""
    pixels = torch.from_numpy(np.stack(images(bundle, 3))).to(DEVICE)
    said: list[dict[str, Tensor]] = []
    for number, spec in enumerate(bundle.manifest.stages, start=1):
        state = {name: said[-1][name] for name in spec.inputs if name != "image"}
        said.append(run(bundle, number, {"image": pixels, **state}, fuse, compile_))
    return said


def operators(file: Path) -> Counter[str]:
    return Counter(node.operator for node in torch_stage._Graph.read(file, DEVICE).nodes)


def test_a_stage_leaves_nothing_of_attention_and_relations_to_others(half: Bundle) -> None:
    layers = 2
    for number, ours in (
        (1, {fusions.STATE: 1}),
        (2, {fusions.STATE: 1, fusions.RELATION_MLP: 1}),
        (3, {fusions.RELATION_MLP: 1}),
    ):
        found = operators(half.stage_path(number))
        assert {name: found[name] for name in OURS & found.keys()} == {fusions.ATTENTION: layers, **ours}
        assert found["Softmax"] == 1, "the answer's"
        assert not found.keys() & {"PlainAttention", "AddedProduct", "ByHead"}
        before = Counter(node.operator for node in torch_stage._Graph.read(half.stage_path(number)).nodes)
        assert found["Concat"] <= before["Concat"] - (number < 3), "relations are written where they belong"


def test_answers_and_state_are_those_of_the_operators(half: Bundle) -> None:
    step = 2.0**-10 if half.manifest.precision == "fp16" else 2.0**-7
    for ours, theirs in zip(through(half, True), through(half, False), strict=True):
        for name, tensor in ours.items():
            scale = max(1.0, float(theirs[name].abs().max()))
            assert (tensor.float() - theirs[name].float()).abs().max() <= 6 * step * scale, name


def test_they_are_no_less_exact(half: Bundle, exact: Bundle) -> None:
    """Against the same weights in float32."""
    said = {"exact": through(exact, False), "ours": through(half, True), "theirs": through(half, False)}
    off = {
        name: max(
            float((one["probabilities"] - other["probabilities"]).abs().max())
            for one, other in zip(said[name], said["exact"], strict=True)
        )
        for name in ("ours", "theirs")
    }
    assert off["ours"] <= 1.5 * off["theirs"] + 1e-4


def test_float32_is_not_touched(small: Bundle, photo10: Bundle) -> None:
    for bundle in (small, photo10):
        for number in range(1, 4):
            assert not operators(bundle.stage_path(number)).keys() & OURS


def test_a_state_that_nobody_wants_is_not_made(half: Bundle) -> None:
    pixels = torch.from_numpy(np.stack(images(half, 3))).to(DEVICE)
    graph = torch_stage._Graph.read(half.stage_path(1), DEVICE)
    assert fusions.STATE in {node.operator for node in graph.needed_for(["relations_1"])}
    assert fusions.STATE not in {node.operator for node in graph.needed_for(["probabilities"])}
    whole = run(half, 1, {"image": pixels}, True)
    less = run(half, 1, {"image": pixels}, True, leave_out=("relations_1", "features_1"))
    only = run(half, 1, {"image": pixels}, True, leave_out=("logits", "probabilities", "confidence", "features_1"))
    assert torch.equal(less["probabilities"], whole["probabilities"])
    assert torch.equal(only["relations_1"], whole["relations_1"])


def test_compiled_they_answer_alike(half: Bundle) -> None:
    def compile_(program: torch_stage.Kernel, tensors: Sequence[Tensor]) -> torch_stage.Kernel:
        graph = make_fx(program)(*tensors)
        assert any("dvt" in str(node.target) for node in graph.graph.nodes)
        backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
        compiled: torch_stage.Kernel = torch.compile(graph, backend=backend, fullgraph=True, dynamic=False)
        compiled(*tensors)
        return compiled

    step = 2.0**-10 if half.manifest.precision == "fp16" else 2.0**-7
    for ours, theirs in zip(through(half, True, compile_), through(half, True), strict=True):
        for name, tensor in ours.items():
            scale = max(1.0, float(theirs[name].abs().max()))
            assert (tensor.float() - theirs[name].float()).abs().max() <= 6 * step * scale, name


def test_an_engine_with_them_answers_as_without(half: Bundle, rig: Rig) -> None:
    """Re-batched, in lanes, in memory that others write over."""
    plain = torch_stage.load(half, rig.place, [batch_sizes(2)] * 3, fuse=False)
    ours, theirs = rig.engine(half, largest=2), rig.engine(half, plain)
    ours.warm_up()
    assert all(program._graph is not None for lane in ours._all_lanes for program in lane.programs.values()), "recorded"
    for size in (1, 2, 3):
        pixels = images(half, size, seed=size)
        one, other = all_stages(ours, pixels), all_stages(theirs, pixels)
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=2e-2)


# -- what is like them, and is not


def changed(bundle: Bundle, number: int, out: Path, change: object) -> Path:
    model = onnx.load(bundle.stage_path(number))
    change(model.graph)  # type: ignore[operator]
    onnx.save(model, out / "changed.onnx")
    return out / "changed.onnx"


def _node(graph: onnx.GraphProto, operator: str, at: int = 0) -> onnx.NodeProto:
    return [node for node in graph.node if node.op_type == operator][at]


def _a_weaker_mask(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if "lifted_tensor" in tensor.name:
            values = numpy_helper.to_array(tensor) / 1000
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))


def _a_mask_in_the_middle(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if "lifted_tensor" in tensor.name:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))


def _softmax_of_queries(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Softmax" and node.output[0] != "probabilities":
            node.attribute[0].i = 2


def _other_heads(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Transpose" and list(node.attribute[0].ints) == [2, 0, 3, 1, 4]:
            node.attribute[0].ints[:] = [2, 0, 1, 3, 4]


def _logits_for_somebody_else(graph: onnx.GraphProto) -> None:
    concat = next(node for node in graph.node if node.output[0] == "relations_1")
    for at, name in enumerate(list(concat.input)):
        graph.node.insert(len(graph.node) - 1, helper.make_node("Abs", [name], [f"abs_{at}"]))
        concat.input[at] = f"abs_{at}"
    graph.node.remove(concat)
    graph.node.append(concat)


def _a_state_that_is_read(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Abs", ["relations_1"], ["read"]))


@pytest.mark.parametrize(
    "change",
    [
        _a_weaker_mask,
        _a_mask_in_the_middle,
        _softmax_of_queries,
        _other_heads,
        _logits_for_somebody_else,
        _a_state_that_is_read,
    ],
)
def test_other_attention_stays_as_it_is(half: Bundle, tmp_path: Path, change: object) -> None:
    if half.manifest.precision == "bf16":
        pytest.skip("numpy has no bfloat16 to write masks in")
    found = operators(changed(half, 1, tmp_path, change))
    assert not found.keys() & OURS
    assert found["Softmax"] + found["PlainAttention"] == 3


def test_another_gelu_stays_as_it_is(half: Bundle, tmp_path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Gelu":
                node.attribute[0].s = b"tanh"

    assert fusions.RELATION_MLP not in operators(changed(half, 2, tmp_path, change))


def test_logits_that_are_handed_on_in_another_order_go_where_they_belong(half: Bundle, tmp_path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        concat = next(node for node in graph.node if node.output[0] == "relations_1")
        concat.input[0], concat.input[1] = concat.input[1], concat.input[0]

    pixels = torch.from_numpy(np.stack(images(half, 3))).to(DEVICE)
    usual = run(half, 1, {"image": pixels}, True)["relations_1"]
    file = changed(half, 1, tmp_path, change)
    other = Here(DEVICE)
    spec = half.manifest.stages[0]
    stage = torch_stage.TorchStage(file, spec, other, (3,))
    assert fusions.STATE in {node.operator for node in stage._graph.nodes}
    other.tensors = [pixels, torch.full_like(usual, torch.nan)]
    context = stage.context(3, {"image": 0, "relations_1": 1}, 0, 0)
    for _ in range(2):
        context.enqueue()
        found = other.tensors[1]
        assert torch.equal(found[:, :2], usual[:, 2:4])
        assert torch.equal(found[:, 2:4], usual[:, :2])
        assert torch.equal(found[:, 4:], usual[:, 4:])
        found.fill_(torch.nan)
    context.close()
