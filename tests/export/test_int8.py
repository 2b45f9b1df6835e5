"""Graphs in 8-bit integers: what is quantised, by which photos, how near they are to the model, and who runs them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from export.int8 import body_products, scaling_images
from export.logits import bundle_logits
from export.stage import StageGraph
from export.to_onnx import NORMALIZED
from export.verify import MAX_INT8_DIFFERENCE, VerificationError, verify_int8
from export.write import export_model, photos_for_scales
from model.checkpoint import load_model
from server.__main__ import build
from server.bundle.manifest import FRONTIER, Bundle
from server.calibration.calibrate import CalibrationError, read_image_folder, read_pixels
from server.engines.onnx import open_session
from server.errors import BundleError
from tests.conftest import CLASSES, HELD_OUT


@pytest.fixture(scope="module")
def int8(micro_checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As users make it: exported with training images, then calibrated."""
    path = tmp_path_factory.mktemp("bundles") / "int8"
    arguments = ["export", str(micro_checkpoint), str(path), "--precision", "int8", "--images", str(image_folder)]
    ran = CliRunner().invoke(build(), arguments)
    assert ran.exit_code == 0, ran.output
    assert "in int8" in ran.output
    ran = CliRunner().invoke(build(), ["calibrate", str(path), str(image_folder), "--held-out", str(HELD_OUT)])
    assert ran.exit_code == 0, ran.output
    return path


@pytest.fixture(scope="module")
def photos(image_folder: Path, int8: Path) -> np.ndarray:
    how = Bundle.load(int8).preprocessing
    return np.stack([read_pixels(file, how) for file, _ in scaling_images(image_folder, CLASSES, HELD_OUT, 16)])


def test_the_bundle_says_what_it_is_and_its_state_and_answers_are_float32(int8: Path, micro_bundle: Path):
    manifest, plain = Bundle.load(int8).manifest, Bundle.load(micro_bundle).manifest
    assert manifest.precision == "int8"
    assert manifest.version != plain.version
    assert manifest.parity["batch_invariant"] is True
    assert 0 < max(manifest.parity["max_logit_difference"]) < 1
    assert manifest.provenance["scaling_images"] == 160 - Bundle.load(int8).frontier.samples
    assert manifest.stage_gmacs == plain.stage_gmacs
    for mine, theirs in zip(manifest.stages, plain.stages, strict=True):
        assert (mine.inputs, mine.outputs) == (theirs.inputs, theirs.outputs)


def test_its_weights_are_integers_of_7_bits_with_a_scale_for_each_channel(int8: Path, micro_bundle: Path):
    for number in (1, 2, 3):
        file = Bundle.load(int8).stage_path(number)
        proto = onnx.load(file)
        assert b".py" not in proto.SerializeToString()
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        quantised = [tensor for tensor in tensors.values() if tensor.dtype == np.int8 and tensor.ndim > 1]
        plain = onnx.load(Bundle.load(micro_bundle).stage_path(number)).graph
        assert len(quantised) == len(body_products(plain)) > 8
        assert 48 < max(np.abs(tensor).max() for tensor in quantised) <= 64
        activations = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        assert {tensors[node.input[2]].dtype for node in activations} == {np.dtype(np.uint8)}
        assert file.stat().st_size < Bundle.load(micro_bundle).stage_path(number).stat().st_size


def test_what_is_judged_and_handed_on_stays_float(int8: Path):
    for number in (1, 2, 3):
        graph = onnx.load(Bundle.load(int8).stage_path(number)).graph
        integers = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        consumers = {node.op_type for node in graph.node if integers & set(node.input)}
        assert consumers <= {"MatMul", "Gemm", "Slice"}  # a norm's outcome, of which the last block takes a row apart
        head = [node for node in graph.node if node.op_type == "Gemm"][-1]
        assert not integers & {*head.input, *(value.name for value in graph.output)}


def test_only_products_with_the_weights_of_the_body_become_integers():
    def conv(name: str, source: str, side: int) -> onnx.NodeProto:
        return helper.make_node("Conv", [source, "w"], [f"{name}_out"], name, kernel_shape=[side, side])

    nodes = [
        conv("first", NORMALIZED, 3),
        conv("stem", "first_out", 3),
        conv("relations", "relations_1", 1),
        helper.make_node("LayerNormalization", ["x", "w"], ["normed"], "norm"),
        helper.make_node("MatMul", ["normed", "w"], ["qkv_out"], "qkv"),
        helper.make_node("MatMul", ["keys", "w"], ["upsampled"], "upsample_keys"),
        helper.make_node("MatMul", ["w", "normed"], ["upsampled_too"], "upsample_queries"),
        helper.make_node("Gemm", ["x", "w"], ["fc1_out"], "fc1"),
        helper.make_node("Gemm", ["fc1_out", "w"], ["logits"], "head"),
    ]
    weights = [numpy_helper.from_array(np.ones((2, 2), np.float32), "w")]
    assert body_products(helper.make_graph(nodes, "stage", [], [], weights)) == ["stem", "qkv", "fc1"]


def test_what_finds_the_scales_solves_no_frontier(image_folder: Path):
    everything = read_image_folder(image_folder, CLASSES)
    solving = read_image_folder(image_folder, CLASSES, fraction=HELD_OUT)
    found = scaling_images(image_folder, CLASSES, HELD_OUT, 40)
    assert len(found) == len(set(found)) == 40
    assert not set(found) & set(solving)
    assert {label for _, label in found} == set(range(len(CLASSES)))
    assert len(scaling_images(image_folder, CLASSES, HELD_OUT, 10**6)) == len(everything) - len(solving)
    with pytest.raises(CalibrationError, match="every image is in the held-out slice of 1; scales need others"):
        scaling_images(image_folder, CLASSES, 1.0)


def test_it_is_calibrated_and_evaluated_as_always(int8: Path, micro_bundle: Path, image_folder: Path):
    assert "/int8/" in Bundle.load(int8).frontier.key
    reports = []
    for path in (int8, micro_bundle):
        ran = CliRunner().invoke(build(), ["evaluate", str(path), str(image_folder), "--json"])
        assert ran.exit_code == 0, ran.output
        reports.append(json.loads(ran.stdout))
    assert reports[0]["exit_accuracy"] == pytest.approx(reports[1]["exit_accuracy"], abs=8 / 160)


def test_logits_for_given_inputs_are_near_the_model_s(int8: Path, micro_bundle: Path, photos: np.ndarray):
    x = ((photos / 255 - 0.45) / 0.25).astype(np.float32).transpose(0, 3, 1, 2)
    got, want = (bundle_logits(Bundle.load(path), x) for path in (int8, micro_bundle))
    assert got.dtype == np.float32
    assert 0 < np.sqrt(((got - want) ** 2).mean()) < 0.25 * want.std()


def test_a_frontier_of_another_precision_is_refused(int8: Path, micro_bundle: Path, tmp_path: Path):
    bundle = Bundle.load(int8)
    other = replace(bundle.frontier, key=bundle.frontier.key.replace("/int8/", "/fp32/"))
    with pytest.raises(BundleError, match=r"frontier\.json: calibrated for .*/fp32/.*, the bundle is .*/int8/"):
        bundle.write_frontier(other)
    copy = shutil.copytree(int8, tmp_path / "copy")
    shutil.copy(micro_bundle / FRONTIER, copy / FRONTIER)
    with pytest.raises(BundleError, match=r"frontier\.json: calibrated for .*/fp32/.*, the bundle is .*/int8/"):
        Bundle.load(copy)


# -- what verification finds


def test_a_quantised_graph_with_other_weights_is_not_passed_off_as_the_model(
    int8: Path, micro_checkpoint: Path, photos: np.ndarray
):
    model, _ = load_model(micro_checkpoint)
    graphs = [StageGraph(model, number) for number in (1, 2, 3)]
    sessions = [open_session(Bundle.load(int8).stage_path(number)) for number in (1, 2, 3)]
    verify_int8(model, graphs, sessions, photos)
    with torch.no_grad():
        model.stages[1].blocks[0].mlp.fc2.weight.neg_()
    with pytest.raises(
        VerificationError, match=f"exit 2: logits in int8 are off by .*, more than {MAX_INT8_DIFFERENCE} of"
    ):
        verify_int8(model, graphs, sessions, photos)


class Spoiled:
    """Adds to a stage's logits."""

    def __init__(self, session, by: float) -> None:
        self.session, self.by = session, by

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [
            value + np.float32(self.by * len(value)) if name == "logits" else value
            for name, value in zip(names, self.session.run(names, feeds), strict=True)
        ]


@pytest.mark.parametrize(
    ("by", "why"),
    [
        (float("nan"), "exit 3: logits are not finite in int8"),
        (0.01, "stage 3: `logits` of an image depends"),
    ],
)
def test_no_numbers_and_rows_that_depend_on_their_batch_are_refused(
    by: float, why: str, int8: Path, micro_checkpoint: Path, photos: np.ndarray
):
    model, _ = load_model(micro_checkpoint)
    graphs = [StageGraph(model, number) for number in (1, 2, 3)]
    sessions = [open_session(Bundle.load(int8).stage_path(number)) for number in (1, 2, 3)]
    with pytest.raises(VerificationError, match=why):
        verify_int8(model, graphs, [*sessions[:2], Spoiled(sessions[2], by)], photos)


# -- what is asked of the user


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--precision", "int8"], "--precision int8 needs --images FOLDER: photos"),
        (["--precision", "fp16", "--images", "."], "--images finds the scales of --precision int8; fp16 has none"),
        (["--images", "."], "--images finds the scales of --precision int8; fp32 has none"),
    ],
)
def test_images_and_int8_go_together(arguments: list[str], line: str, tmp_path: Path):
    ran = CliRunner().invoke(build(), ["export", "x.safetensors", str(tmp_path / "y"), *arguments])
    assert isinstance(ran.exception, click.UsageError)
    assert line in ran.exception.message
    assert "\n" not in ran.exception.message


def test_images_that_are_of_no_use_are_told_in_one_line_and_nothing_is_left(micro_checkpoint: Path, tmp_path: Path):
    other = tmp_path / "images" / "mauve"
    other.mkdir(parents=True)
    broken = tmp_path / "broken" / "red"
    broken.mkdir(parents=True)
    for number in range(9):
        (broken / f"{number}.png").write_bytes(b"no picture")
    for folder, line in {"none": "no such folder", "images": "is not a label", "broken": ".png: "}.items():
        arguments = ["export", str(micro_checkpoint), str(tmp_path / "out"), "--precision", "int8"]
        with pytest.raises(click.ClickException) as refused:
            CliRunner().invoke(
                build(), [*arguments, "--images", str(tmp_path / folder)], catch_exceptions=False, standalone_mode=False
            )
        assert line in refused.value.message
        assert "\n" not in refused.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "images"]


@pytest.mark.parametrize("recipe", [{}, {"held_out": "half"}, "photo10"])
def test_a_checkpoint_that_names_no_slice_is_scaled_by_any_image_and_that_is_said(
    recipe: object, micro_checkpoint: Path, image_folder: Path
):
    model, _ = load_model(micro_checkpoint)
    said: list[str] = []
    assert len(photos_for_scales(image_folder, model.config, recipe, said.append)) == 160
    assert len(said) == 1
    assert "does not say which images training left out" in said[0]


def test_photos_and_int8_go_together_in_code_too(micro_checkpoint: Path, tmp_path: Path):
    model, _ = load_model(micro_checkpoint)
    with pytest.raises(ValueError, match="photos find the scales of int8"):
        export_model(model, tmp_path / "out", {}, precision="int8")
