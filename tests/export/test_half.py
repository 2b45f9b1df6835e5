"""Graphs in half precision: what they are made of, how near they are to the model, and who may run them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from export.half import Precision
from export.logits import bundle_logits
from export.stage import StageGraph
from export.verify import MAX_HALF_DIFFERENCE, VerificationError, example_images, run_modules, torch_logits, verify
from export.write import export_model
from model.checkpoint import load_model
from model.config import DVTConfig, variant
from model.dvt import DVT
from server.__main__ import build
from server.bundle.manifest import FRONTIER, Bundle
from server.engines import load_engine
from server.engines.onnx import open_session
from server.engines.tensorrt.api import import_tensorrt
from server.engines.tensorrt.bundles import build_plans, choose
from server.engines.tensorrt.gpus import Gpu
from server.errors import BundleError
from tests.conftest import CLASSES, HELD_OUT

ON_CPU = ("--engine", "onnx")  # a bundle in half is for GPUs: elsewhere the engine has to be named
HALVES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def seeded(config: DVTConfig) -> DVT:
    torch.manual_seed(0)
    return DVT(config).eval()


def graphs_of(model: DVT, precision: Precision) -> list[StageGraph]:
    return [StageGraph(model, number, precision=precision) for number in range(1, model.config.num_stages + 1)]


@pytest.fixture(scope="module")
def fp16(micro_checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As users make it: exported, then calibrated on the CPU."""
    path = tmp_path_factory.mktemp("bundles") / "fp16"
    ran = CliRunner().invoke(build(), ["export", str(micro_checkpoint), str(path), "--precision", "fp16"])
    assert ran.exit_code == 0, ran.output
    ran = CliRunner().invoke(build(), ["calibrate", str(path), str(image_folder), "--held-out", str(HELD_OUT), *ON_CPU])
    assert ran.exit_code == 0, ran.output
    return path


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two stages, seeded weights."""
    model = seeded(variant("micro", grids=(2, 3), labels=CLASSES))
    return export_model(model, tmp_path_factory.mktemp("bundles") / "bf16", {}, precision="bf16")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer": "patch", "qkv_bias": True},
        {"tokenizer": "conv"},
        {"feature_reuse": False},
        {"relation_reuse": False},
        *[{"feature_design": design} for design in ("layer-wise", "class-token", "first-layer", "no-norm")],
        *[{"relation_design": design} for design in ("layer-wise", "final-layer", "linear", "naive-upsampling")],
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_every_design_answers_in_fp32_near_its_model_and_leaves_state_in_half(changes: dict[str, Any]):
    model = seeded(variant("micro", **changes))
    images = example_images(model.config.image_size)
    reference = torch_logits(model, images)
    for precision, half in HALVES.items():
        graphs = graphs_of(model, precision)
        for answer, want in zip(run_modules(graphs, images), reference, strict=True):
            assert {value.dtype for value in answer.values()} == {np.dtype(np.float32)}
            assert np.abs(answer["logits"] - want).max() <= MAX_HALF_DIFFERENCE[precision] * np.abs(want).max()
        with torch.inference_mode():
            *_, features, relations = graphs[1](*graphs[1].example(2))
        assert (features.dtype, relations.dtype) == (half, half)


def test_the_model_itself_keeps_its_weights():
    model = seeded(variant("micro"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graphs_of(model, "bf16")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_a_bundle_in_half_says_so_and_promises_nothing_of_batches(fp16: Path, micro_bundle: Path):
    manifest, plain = Bundle.load(fp16).manifest, Bundle.load(micro_bundle).manifest
    assert (plain.precision, manifest.precision) == ("fp32", "fp16")
    assert manifest.version != plain.version
    assert manifest.provenance["opset"] == 20
    assert manifest.parity["batch_invariant"] is False
    assert 0 < max(manifest.parity["max_logit_difference"]) < 0.1
    for number, stage in enumerate(manifest.stages, start=1):
        state = {name: spec.dtype for name, spec in {**stage.inputs, **stage.outputs}.items() if name[-2:-1] == "_"}
        assert set(state.values()) == {"float16"}
        assert len(state) == (4 if number == 2 else 2)
        assert {stage.outputs[name].dtype for name in ("logits", "probabilities", "confidence")} == {"float32"}


def test_its_graphs_are_what_tensorrt_takes(fp16: Path, bf16: Bundle):
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    for bundle in (Bundle.load(fp16), bf16):
        for number in range(1, len(bundle.manifest.stages) + 1):
            proto = onnx.load(bundle.stage_path(number))
            assert [o.version for o in proto.opset_import if not o.domain] == [20]
            assert not proto.graph.value_info
            assert b".py" not in proto.SerializeToString()
            operators = {node.op_type for node in proto.graph.node}
            assert not operators & {"Attention", "If", "Loop", "NonZero", "Where"}
            types = {value.name: value.type.tensor_type.elem_type for value in _typed(proto)}
            taken = {
                (node.op_type, types[name]) for node in proto.graph.node for name in node.input[:1] if name in types
            }
            # In half what is large, in fp32 what would overflow or is judged.
            assert ("Softmax", half[bundle.manifest.precision]) in taken
            assert ("MatMul", half[bundle.manifest.precision]) in taken
            assert ("Exp", onnx.TensorProto.FLOAT) in taken
            for operator in ("LayerNormalization", "Exp", "ReduceSum", "ReduceMax"):
                assert (operator, half[bundle.manifest.precision]) not in taken


def test_it_builds_for_tensorrt(fp16: Path, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: no real engine is built")
    trt, gpu = import_tensorrt("tensorrt_rtx"), Gpu.of_capability("sm89")
    plans = build_plans(Bundle.load(fp16), trt=trt, gpu=gpu, choices=choose([1]), cache=tmp_path)
    assert all(plan.why is not None and plan.record.size > 1000 for plan in plans)


def _typed(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    return [*graph.input, *graph.value_info, *graph.output]


def test_fp16_is_calibrated_and_evaluated_on_a_cpu(fp16: Path, micro_bundle: Path, image_folder: Path):
    bundle = Bundle.load(fp16)
    assert "/fp16/" in bundle.frontier.key
    reports = []
    for path in (fp16, micro_bundle):
        ran = CliRunner().invoke(build(), ["evaluate", str(path), str(image_folder), "--json", *ON_CPU])
        assert ran.exit_code == 0, ran.output
        reports.append(json.loads(ran.stdout))
    assert reports[0]["exit_accuracy"] == pytest.approx(reports[1]["exit_accuracy"], abs=3 / 160)
    assert reports[0]["stage_gmacs"] == pytest.approx(reports[1]["stage_gmacs"])


def test_fp16_is_profiled_on_a_cpu(fp16: Path):
    ran = CliRunner().invoke(build(), ["profile", str(fp16), "--seconds", "1", "--json", *ON_CPU])
    assert ran.exit_code == 0, ran.output
    profile = Bundle.load(fp16).profile
    assert profile is not None
    assert profile.identity is not None
    assert profile.identity.precision == "fp16"


def test_logits_for_given_inputs_are_near_the_model_s(fp16: Path, micro_checkpoint: Path):
    model, _ = load_model(micro_checkpoint)
    x = np.random.default_rng(0).standard_normal((3, 3, 48, 48)).astype(np.float32)
    with torch.inference_mode():
        want = torch.stack(model(torch.from_numpy(x))).numpy()
    logits = bundle_logits(Bundle.load(fp16), x)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, want, atol=MAX_HALF_DIFFERENCE["fp16"] * np.abs(want).max())


def test_a_frontier_of_another_precision_is_refused(fp16: Path, micro_bundle: Path, tmp_path: Path):
    bundle = Bundle.load(fp16)
    other = replace(bundle.frontier, key=bundle.frontier.key.replace("/fp16/", "/fp32/"))
    with pytest.raises(BundleError, match=r"frontier\.json: calibrated for .*/fp32/.*, the bundle is .*/fp16/"):
        bundle.write_frontier(other)
    copy = shutil.copytree(fp16, tmp_path / "copy")
    shutil.copy(micro_bundle / FRONTIER, copy / FRONTIER)
    with pytest.raises(BundleError, match=r"frontier\.json: calibrated for .*/fp32/.*, the bundle is .*/fp16/"):
        Bundle.load(copy)


def test_bf16_is_refused_on_a_cpu_in_one_line_that_says_what_to_do(bf16: Bundle, image_folder: Path, tmp_path: Path):
    state = {name: spec.dtype for name, spec in bf16.manifest.stages[1].inputs.items()}
    assert state == {"image": "uint8", "features_1": "bfloat16", "relations_1": "bfloat16"}
    line = "is in bf16, which ONNX Runtime does not run on CPUs; run it on a GPU, or export it again with --precision"
    with pytest.raises(BundleError, match=line):
        load_engine(bf16, engine="onnx")
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 48, 48), np.float32))
    inputs = ["--inputs", str(tmp_path / "x.npy"), "--logits", str(tmp_path / "y.npy")]
    for arguments in (["calibrate", str(bf16.path), str(image_folder), *ON_CPU], ["evaluate", str(bf16.path), *inputs]):
        with pytest.raises(click.ClickException) as refused:
            CliRunner().invoke(build(), arguments, catch_exceptions=False, standalone_mode=False)
        assert line in refused.value.message
        assert "\n" not in refused.value.message


def test_an_unknown_precision_is_refused(tmp_path: Path):
    ran = CliRunner().invoke(build(), ["export", "x.safetensors", str(tmp_path / "y"), "--precision", "int4"])
    assert isinstance(ran.exception, click.UsageError)


# -- what verification finds


class InFp32:
    """Runs a stage as ONNX Runtime does on CPUs: between two operators in fp32. `spoil` changes its logits."""

    def __init__(self, graph: StageGraph, spoil: float = 0.0) -> None:
        self.graph, self.spoil = graph, spoil

    @torch.inference_mode()
    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        given = [torch.from_numpy(feeds[name]) for name in self.graph.inputs()]
        answer = dict(zip(names, self.graph(*given), strict=True))
        answer["logits"] = answer["logits"] + self.spoil
        return [answer[name].numpy() for name in names]


def test_a_graph_in_half_with_another_weight_is_not_passed_off_as_the_model(fp16: Path, micro_checkpoint: Path):
    model, _ = load_model(micro_checkpoint)
    graphs = graphs_of(model, "fp16")
    sessions = [open_session(Bundle.load(fp16).stage_path(number)) for number in (1, 2, 3)]
    assert max(verify(model, graphs, sessions).max_logit_difference) < 0.1
    with torch.no_grad():
        model.stages[2].head.bias[0] += 0.05 * max(
            np.abs(logits).max() for logits in torch_logits(model, example_images(48))
        )
    with pytest.raises(VerificationError, match="exit 3: logits differ from PyTorch"):
        verify(model, graphs, sessions)


def test_fp16_that_overflows_is_refused_and_bf16_is_not():
    model = seeded(variant("micro", grids=(2, 3)))
    with torch.no_grad():
        model.stages[1].blocks[0].mlp.fc2.bias[0] = 1e5  # a residual stream that fp16 cannot hold
    plain = [InFp32(graph) for graph in graphs_of(model, "fp32")]
    with pytest.raises(VerificationError, match=r"exit 2: logits are not finite in fp16, .* try bf16"):
        verify(model, graphs_of(model, "fp16"), plain)
    verify(model, graphs_of(model, "bf16"), plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("broken", [1, 2])
def test_logits_that_are_no_numbers_are_refused_at_every_exit(broken: int, precision: Precision):
    model = seeded(variant("micro", grids=(2, 3)))
    sessions = [InFp32(graph, float("nan") if graph.number == broken else 0.0) for graph in graphs_of(model, "fp32")]
    with pytest.raises(VerificationError, match=f"exit {broken}: logits are not finite"):
        verify(model, graphs_of(model, precision), sessions)
