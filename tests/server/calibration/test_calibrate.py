"""Calibration runs the deployed path over held-out images and writes down what it saw, and only on images that fit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from server.__main__ import build
from server.bundle.frontier import NEVER
from server.bundle.manifest import Bundle, Preprocessing, StageSpec, TensorSpec, write_manifest
from server.calibration.calibrate import CalibrationError, Promise, calibrate, held_out, read_image_folder
from server.core import StageBatch, StageOutput
from server.engines.fake import FakeEngine

LABELS = ("bird", "car", "cat")
GMACS = (0.1, 0.25, 0.6)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Not calibrated, for the FakeEngine: 8 x 8 pixels, three classes."""
    root = tmp_path / "bundle"
    root.mkdir()
    answers = {
        "logits": TensorSpec(dtype="float32", shape=("B", 3)),
        "probabilities": TensorSpec(dtype="float32", shape=("B", 3)),
        "confidence": TensorSpec(dtype="float32", shape=("B",)),
    }
    image = {"image": TensorSpec(dtype="uint8", shape=("B", 8, 8, 3))}
    stages = []
    for number, gmacs in enumerate(GMACS, start=1):
        (root / f"stage{number}.onnx").write_bytes(b"%d" % number)
        stages.append(
            StageSpec.of(root, f"stage{number}.onnx", inputs=image, outputs=answers, grid=(2, 2), gmacs=gmacs)
        )
    write_manifest(root, name="fake", labels=LABELS, preprocessing=Preprocessing(8, (8, 8)), stages=stages)
    return Bundle.load(root, need_frontier=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty photos in which the FakeEngine reads class and confidences; every fifth shows a class not its own."""
    engine = FakeEngine(num_classes=3)
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for number in range(30):
        label = number % 3
        seen = (label + 1) % 3 if number % 5 == 0 else label
        low, middle = sorted(rng.integers(100, 255, size=2).tolist())
        pixels = engine.image(low, middle, 255, klass=seen)
        (root / LABELS[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / LABELS[label] / f"{number:02d}.png")  # PNG keeps every pixel
    return root


def fake_engine() -> FakeEngine:
    return FakeEngine(num_classes=3, max_batch_sizes=(8, 4, 4))


@pytest.mark.parametrize("threads", [1, 3])
def test_every_image_goes_through_every_stage_and_the_frontier_says_what_was_seen(
    bundle: Bundle, folder: Path, threads: int
) -> None:
    engine = fake_engine()
    frontier = calibrate(bundle, engine, read_image_folder(folder, LABELS), threads=threads)
    assert Counter(row for batch in engine.batches for row in [batch.stage] * len(batch.pixels)) == {
        1: 30,
        2: 30,
        3: 30,
    }
    assert all(len(batch.pixels) <= 4 for batch in engine.batches), "no larger than what the smallest stage takes"
    assert engine.slots_in_use == 0
    assert frontier.samples == 30
    assert frontier.exit_accuracy == (0.8, 0.8, 0.8)
    assert frontier.stage_gmacs == GMACS
    assert frontier.key == bundle.manifest.frontier_key
    assert Bundle.load(bundle.path).frontier == frontier


def test_what_calibration_counts_is_what_the_engine_does_with_the_rows_thresholds(bundle: Bundle, folder: Path) -> None:
    frontier = calibrate(bundle, fake_engine(), read_image_folder(folder, LABELS))
    engine = fake_engine()
    # A confidence that was seen, as threshold: the hardest case, for the image that has it must leave.
    for threshold in np.unique(frontier.records.confidence[0])[::5].tolist():
        pixels = [np.asarray(Image.open(file)) for file, _ in read_image_folder(folder, LABELS)]
        output = engine.run(StageBatch(1, pixels, (), [threshold] * len(pixels)))
        left = sum(slot is None for slot in output.slots)
        engine.free([slot for slot in output.slots if slot is not None])
        assert frontier.predict([threshold, 0.0]).exit_fractions[0] == pytest.approx(left / 30)


def test_a_promise_is_tested_on_other_images_and_kept_with_the_frontier(bundle: Bundle, folder: Path) -> None:
    images = read_image_folder(folder, LABELS)
    frontier = calibrate(bundle, fake_engine(), images, promise=Promise(0.5, 0.9))
    assert frontier.samples == 15
    certificate = frontier.certificate
    assert certificate is not None
    assert (certificate.max_accuracy_loss, certificate.confidence, certificate.samples) == (0.5, 0.9, 15)
    assert certificate.gmacs == frontier.rows[0].gmacs  # every exit sees the same class here: nothing is ever lost
    assert Bundle.load(bundle.path).frontier.certificate == certificate


def test_a_promise_that_so_few_images_cannot_certify_is_not_made(bundle: Bundle, folder: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be certified: with 15 images it is below 0\.\d+ for"):
        calibrate(bundle, fake_engine(), read_image_folder(folder, LABELS), promise=Promise(0.01))
    assert not (bundle.path / "frontier.json").exists()


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_written(bundle: Bundle, folder: Path) -> None:
    engine = fake_engine()
    (folder / "car" / "05.jpg").write_bytes(b"not a photo")
    with pytest.raises(CalibrationError, match=r"05\.jpg: "):
        calibrate(bundle, engine, read_image_folder(folder, LABELS))
    assert not (bundle.path / "frontier.json").exists()
    assert engine.slots_in_use == 0


def test_an_engine_that_fails_half_way_leaves_no_state_behind(bundle: Bundle, folder: Path) -> None:
    class FailsAtStage3(FakeEngine):
        def run(self, batch: StageBatch) -> StageOutput:
            self.fail_next = int(batch.stage == 3)
            return super().run(batch)

    engine = FailsAtStage3(num_classes=3)
    with pytest.raises(RuntimeError, match="told to fail"):
        calibrate(bundle, engine, read_image_folder(folder, LABELS))
    assert engine.slots_in_use == 0


def test_an_engine_whose_confidence_is_no_number_is_refused(bundle: Bundle, folder: Path) -> None:
    class NoNumber(FakeEngine):
        def run(self, batch: StageBatch) -> StageOutput:
            output = super().run(batch)
            self.free([slot for slot in output.slots if slot is not None])
            nothing = np.full(len(batch.pixels), np.nan, dtype=np.float32)
            return StageOutput(output.probabilities, nothing, [None] * len(batch.pixels))

    with pytest.raises(CalibrationError, match="stage 1 gives a confidence"):
        calibrate(bundle, NoNumber(num_classes=3), read_image_folder(folder, LABELS))


def test_sub_folders_are_labels_and_their_order_does_not_matter(folder: Path) -> None:
    (folder / "readme.txt").write_text("not an image")
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    examples = read_image_folder(folder, ("cat", "bird", "car"))
    assert len(examples) == 30
    assert all(("cat", "bird", "car")[label] == file.parent.name for file, label in examples)
    assert examples == sorted(examples)


def test_a_folder_that_is_no_label_is_named_with_the_labels_there_are(folder: Path) -> None:
    with pytest.raises(CalibrationError, match=r"car: 'car' is not a label of this bundle \(bird, cat\)"):
        read_image_folder(folder, ("bird", "cat"))


def test_without_images_there_is_nothing_to_calibrate_on(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(CalibrationError, match="no such folder"):
        read_image_folder(tmp_path / "nowhere", LABELS)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(CalibrationError, match="no images"):
        read_image_folder(tmp_path / "empty", LABELS)
    with pytest.raises(CalibrationError, match="no images"):
        calibrate(bundle, fake_engine(), [])


def test_a_limit_takes_the_same_fair_share_of_every_class_each_time(folder: Path) -> None:
    taken = read_image_folder(folder, LABELS, limit=12)
    assert Counter(label for _, label in taken) == {0: 4, 1: 4, 2: 4}
    assert taken == read_image_folder(folder, LABELS, limit=12)
    assert set(taken) < set(read_image_folder(folder, LABELS))
    assert len(read_image_folder(folder, LABELS, limit=1000)) == 30


def test_the_held_out_slice_is_told_from_the_relative_path_alone(folder: Path) -> None:
    whole = read_image_folder(folder, LABELS)
    half = read_image_folder(folder, LABELS, fraction=0.5)
    assert half == [e for e in whole if held_out(e[0].relative_to(folder).as_posix(), 0.5)]
    assert 0 < len(half) < len(whole)
    with pytest.raises(CalibrationError, match="no images in the held-out slice of 1e-09"):
        read_image_folder(folder, LABELS, fraction=1e-9)


def test_the_rule_of_the_held_out_slice_is_fixed_for_ever() -> None:
    # Training and calibration must agree on it across versions and machines.
    names = [f"cat/{number:05d}.jpg" for number in range(10_000)]
    assert sum(held_out(name, 0.1) for name in names) == pytest.approx(1000, abs=100)
    assert all(held_out(name, 0.2) for name in names if held_out(name, 0.1)), "a larger slice holds the smaller"
    assert all(held_out(name, 1.0) for name in names)
    assert not any(held_out(name, 0.0) for name in names)
    assert [name for name in names[:40] if held_out(name, 0.1)] == ["cat/00026.jpg", "cat/00039.jpg"]


def test_the_command_tells_a_users_mistake_in_one_line(tmp_path: Path, bundle: Bundle) -> None:
    app = build()
    runner = CliRunner()
    for arguments, cause in (
        ([tmp_path / "nowhere", tmp_path], "no such folder"),
        ([bundle.path, tmp_path / "nowhere"], "no such folder"),
        ([bundle.path, bundle.path.parent], "is not a label of this bundle"),
    ):
        answer = runner.invoke(app, ["calibrate", *map(str, arguments)])
        assert answer.exit_code == 1
        assert isinstance(answer.exception, click.ClickException)  # which `main` shows as one line
        assert cause in answer.exception.message
        assert "\n" not in answer.exception.message
    assert runner.invoke(app, ["calibrate", "x", "y", "--held-out", "2"]).exit_code == 2
    assert "--held-out" in runner.invoke(app, ["calibrate", "--help"], env={"COLUMNS": "200"}).stdout


def test_never_is_beyond_any_confidence() -> None:
    assert np.float32(NEVER) > np.float32(1) + np.finfo(np.float32).eps
