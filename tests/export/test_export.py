"""The exported graphs compute what the model computes, and say so."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from export.logits import bundle_logits
from export.stage import StageGraph
from export.verify import VerificationError, run_cascade, torch_logits, verify
from export.write import export_checkpoint
from model.checkpoint import CheckpointError, load_model
from model.config import variant
from model.dvt import DVT
from server.__main__ import build
from server.bundle.manifest import EMBEDDED, Bundle
from server.calibration.calibrate import calibrate, read_image_folder
from server.calibration.every_stage import every_stage
from server.engines.onnx import OnnxEngine, open_session


@pytest.fixture(scope="module")
def parts(micro_checkpoint: Path, micro_bundle: Path):
    model, _ = load_model(micro_checkpoint)
    bundle = Bundle.load(micro_bundle)
    graphs = [StageGraph(model, number) for number in (1, 2, 3)]
    sessions = [open_session(bundle.stage_path(number)) for number in (1, 2, 3)]
    return model, bundle, graphs, sessions


def test_the_manifest_says_how_near_the_logits_are_and_that_batching_changes_nothing(parts):
    _, bundle, _, _ = parts
    parity = bundle.manifest.parity
    assert max(parity["max_logit_difference"]) <= 1e-4
    assert parity["batch_invariant"] is True


def test_confidence_is_the_largest_probability_and_probabilities_are_the_softmax(parts):
    model, _, graphs, sessions = parts
    images = np.random.default_rng(7).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    for out, logits in zip(run_cascade(graphs, sessions, images), torch_logits(model, images), strict=True):
        probabilities = torch.from_numpy(logits).softmax(1).numpy()
        np.testing.assert_allclose(out["probabilities"], probabilities, atol=1e-5)
        np.testing.assert_array_equal(out["confidence"], out["probabilities"].max(axis=1))


def test_confidence_may_be_one_less_the_normalised_entropy_and_is_calibrated_on_that_scale(
    parts, micro_checkpoint: Path, image_folder: Path, tmp_path: Path
):
    _, plain, graphs, _ = parts
    out = tmp_path / "entropy"
    ran = CliRunner().invoke(build(), ["export", str(micro_checkpoint), str(out), "--criterion", "entropy"])
    assert ran.exit_code == 0, ran.output
    bundle = Bundle.load(out, need_frontier=False)
    assert (plain.manifest.criterion, bundle.manifest.criterion) == ("max_probability", "entropy")
    assert bundle.manifest.version != plain.manifest.version
    sessions = [open_session(bundle.stage_path(number)) for number in (1, 2, 3)]
    images = np.random.default_rng(7).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    for answer in run_cascade(graphs, sessions, images):
        p = answer["probabilities"].astype(np.float64)
        np.testing.assert_allclose(answer["confidence"], 1 + (p * np.log(p)).sum(axis=1) / np.log(4), atol=1e-6)

    engine = OnnxEngine(bundle)
    frontier = calibrate(bundle, engine, read_image_folder(image_folder, bundle.manifest.labels))
    engine.close()
    assert frontier.criterion == Bundle.load(out).frontier.criterion == "entropy"


def test_confidence_may_be_the_largest_probability_less_the_second_and_is_calibrated_on_that_scale(
    parts, micro_checkpoint: Path, image_folder: Path, tmp_path: Path
):
    _, plain, graphs, _ = parts
    out = tmp_path / "margin"
    ran = CliRunner().invoke(build(), ["export", str(micro_checkpoint), str(out), "--criterion", "margin"])
    assert ran.exit_code == 0, ran.output
    bundle = Bundle.load(out, need_frontier=False)
    assert bundle.manifest.criterion == "margin"
    assert bundle.manifest.version != plain.manifest.version
    sessions = [open_session(bundle.stage_path(number)) for number in (1, 2, 3)]
    images = np.random.default_rng(7).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    for answer in run_cascade(graphs, sessions, images):
        second, first = np.sort(answer["probabilities"], axis=1)[:, -2:].T
        np.testing.assert_array_equal(answer["confidence"], first - second)

    engine = OnnxEngine(bundle)
    frontier = calibrate(bundle, engine, read_image_folder(image_folder, bundle.manifest.labels))
    engine.close()
    assert frontier.criterion == Bundle.load(out).frontier.criterion == "margin"


def test_the_margin_of_certain_and_of_tied_probabilities_is_exact(parts):
    graph = StageGraph(parts[0], 1, criterion="margin")
    logits = torch.tensor([[200.0, 0, 0, 0], [-1e30, 3.0, 3.0, -1e30], [7.0] * 4])
    assert graph._confidence(logits, logits.softmax(dim=-1)).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("criterion", ["entropy", "margin"])
def test_what_a_single_class_has_not_is_no_criterion(criterion: str):
    with pytest.raises(ValueError, match=f"criterion {criterion} needs at least two classes"):
        StageGraph(DVT(variant("micro", num_classes=1)), 1, criterion=criterion)


def test_the_entropy_of_certain_and_of_even_probabilities_is_exact_and_finite(parts):
    graph = StageGraph(parts[0], 1, criterion="entropy")
    logits = torch.tensor([[200.0, 0, 0, 0], [-1e30, 3.0, 3.0, -1e30], [7.0] * 4])
    confidence = graph._confidence(logits, logits.softmax(dim=-1))
    assert confidence.tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    assert 0 <= confidence.min() <= confidence.max() <= 1


def test_an_unknown_criterion_is_refused(tmp_path: Path):
    ran = CliRunner().invoke(build(), ["export", "x.safetensors", str(tmp_path / "y"), "--criterion", "surprise"])
    assert isinstance(ran.exception, click.UsageError)


def test_graphs_use_the_attention_operator_and_carry_no_trace_of_the_machine(parts):
    _, bundle, _, _ = parts
    for number in (1, 2, 3):
        proto = onnx.load(bundle.stage_path(number))
        assert [o.version for o in proto.opset_import if not o.domain] == [23]
        attention = [node for node in proto.graph.node if node.op_type == "Attention"]
        assert len(attention) == 2
        assert not proto.graph.value_info
        assert b".py" not in proto.SerializeToString()


def test_a_graph_with_other_weights_is_not_passed_off_as_the_model(parts):
    model, _, graphs, sessions = parts
    with torch.no_grad():
        weight = model.stages[2].head.weight
        weight += 0.01
        try:
            with pytest.raises(VerificationError, match="logits differ from PyTorch"):
                verify(model, graphs, sessions)
        finally:
            weight -= 0.01


def test_an_engine_whose_rows_depend_on_their_batch_is_refused(parts):
    model, _, graphs, sessions = parts

    class Leaky:
        """A session that lets neighbours in, a little."""

        def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            size = len(feeds["image"])
            return [value + np.float32(1e-6 * (size - 1)) for value in sessions[0].run(names, feeds)]

    with pytest.raises(VerificationError, match="depends on the batch"):
        verify(model, graphs, [Leaky(), *sessions[1:]])


def test_a_bundle_s_logits_for_normalised_inputs_are_the_checkpoint_s(
    micro_checkpoint: Path, micro_bundle: Path, tmp_path: Path
):
    x = np.random.default_rng(0).standard_normal((5, 3, 48, 48)).astype(np.float32)  # not pixels: nothing to undo
    np.save(tmp_path / "x.npy", x)
    results = []
    for target in (micro_checkpoint, micro_bundle):
        out = tmp_path / f"{target.name}.npy"
        args = ["evaluate", str(target), "--inputs", str(tmp_path / "x.npy"), "--logits", str(out)]
        result = CliRunner().invoke(build(), args)
        assert result.exit_code == 0, result.output
        results.append(np.load(out))
    assert results[0].shape == (3, 5, 4)
    assert results[0].dtype == np.float32
    np.testing.assert_allclose(*results, atol=1e-4)


@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_normalised_inputs_are_classified_as_the_pixels_they_come_from(layout: str, micro_checkpoint, micro_bundle):
    if layout == "channels last":
        bundle, config = Bundle.load(micro_bundle), load_model(micro_checkpoint)[0].config
    else:  # no T2T
        bundle, config = Bundle.load(EMBEDDED), variant("photo10")
    size = config.image_size
    images = np.random.default_rng(3).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    normalised = (images / 255 - config.mean) / config.std
    logits = bundle_logits(bundle, normalised.transpose(0, 3, 1, 2).astype(np.float32))
    probabilities = torch.from_numpy(logits).softmax(-1).numpy()
    outputs = every_stage(OnnxEngine(bundle), images)
    for got, want in zip(probabilities, outputs, strict=True):
        np.testing.assert_allclose(got, want.probabilities, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("missing.npy", None, "missing.npy: no such file or directory"),
        ("empty.npy", b"", "empty.npy: is not an .npy file of numbers"),
        ("garbage.npy", b"garbage", "garbage.npy: is not an .npy file of numbers"),
        ("many.npz", b"PK\x05\x06" + bytes(18), "many.npz: is not an .npy file of numbers"),
    ],
)
def test_inputs_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes | None, cause: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    args = ["evaluate", str(tmp_path), "--inputs", str(tmp_path / name), "--logits", str(tmp_path / "y.npy")]
    with pytest.raises(click.ClickException) as refused:
        CliRunner().invoke(build(), args, catch_exceptions=False, standalone_mode=False)
    assert refused.value.message == f"{tmp_path}/{cause}"


def test_inputs_of_another_shape_are_refused_with_both_shapes(micro_bundle: Path):
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\), the bundle takes \(B, 3, 48, 48\)"):
        bundle_logits(Bundle.load(micro_bundle), np.zeros((2, 3, 32, 32), np.float32))


def test_evaluate_gives_the_same_accuracy_for_a_checkpoint_and_for_its_bundle(
    micro_checkpoint: Path, micro_bundle: Path, image_folder: Path
):
    reports = []
    for target in (micro_checkpoint, micro_bundle):
        result = CliRunner().invoke(build(), ["evaluate", str(target), str(image_folder), "--json"])
        assert result.exit_code == 0, result.output
        reports.append(json.loads(result.stdout))
    assert reports[0]["images"] == reports[1]["images"] == 160
    assert reports[0]["exit_accuracy"] == pytest.approx(reports[1]["exit_accuracy"], abs=1 / 160)
    assert reports[0]["stage_gmacs"] == pytest.approx(reports[1]["stage_gmacs"])
    assert set(reports[1]["points"]) >= {"75%", "knee"}


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, micro_checkpoint: Path, micro_bundle: Path):
    with pytest.raises(FileExistsError):
        export_checkpoint(micro_checkpoint, micro_bundle)
    with pytest.raises(CheckpointError):
        export_checkpoint(tmp_path / "missing.safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
