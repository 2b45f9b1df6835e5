"""The report says what is so: its figures by hand, its page with every file it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from export.report import calibration, calibration_error, first_right
from server.__main__ import build


def test_the_calibration_error_is_the_weighted_gap_between_confidence_and_accuracy():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False, True, False])
    expected = (4 * abs(0.75 - 0.95) + 2 * abs(0.5 - 0.55)) / 6
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_that_made_a_model_too_sure_or_not_sure_enough(temperature: float):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (honest.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    told = np.exp(logits * temperature)
    found = calibration((told / told.sum(1, keepdims=True)).astype(np.float32), labels)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.ece_after < 0.02
    assert temperature == 1.0 or found.ece > 0.05


def test_a_temperature_is_judged_by_images_that_did_not_tell_it():
    """Two kinds of images, one far too sure: what fits one half of few images need not fit the other."""
    rng = np.random.default_rng(3)
    gains = []
    for _ in range(60):
        logits = rng.normal(0, 2, (12, 5))
        honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        labels = (honest.cumsum(1) > rng.random((12, 1))).argmax(1)
        found = calibration(honest.astype(np.float32), labels)
        gains.append(found.ece - found.ece_after)
    # These models are calibrated: no temperature helps, but one fitted to the images themselves would seem to.
    assert np.mean(gains) < 0


def test_a_single_image_tells_no_temperature_of_another():
    found = calibration(np.array([[0.7, 0.3]], np.float32), np.array([0]))
    assert found.ece_after == pytest.approx(found.ece)


def test_an_image_belongs_to_the_first_exit_that_has_it_right():
    correct = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0]], dtype=bool)
    assert first_right(correct).tolist() == [1, 1, 2, 3, 0]
    assert first_right(correct[:1]).tolist() == [1, 1, 0, 0, 0]  # a single exit


def test_the_command_writes_a_page_whose_files_are_all_there(micro_bundle: Path, image_folder: Path, tmp_path: Path):
    out = tmp_path / "report"
    arguments = ["evaluate", str(micro_bundle), str(image_folder), "--report", str(out)]
    ran = CliRunner().invoke(build(), arguments)
    assert ran.exit_code == 0, ran.output
    page = (out / "index.html").read_text()
    shown = re.findall(r'src="([^"]+)"', page)
    assert {"curve.png", "exits.png", "calibration.png"} <= set(shown)
    for name in shown:
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) >= 96
    assert not re.search(r"https?://|<script", page)
    document = json.loads((out / "report.json").read_text())
    assert len(document["calibration"]) == 3
    assert [c["accuracy"] for c in document["calibration"]] == pytest.approx(document["evaluation"]["exit_accuracy"])
    assert set(document["gallery"]) == {"blue", "green", "red", "white"}
    for label, kinds in document["gallery"].items():
        assert set(kinds) == {"easy", "hard"}
        assert all(image["answers"][0] == label for image in kinds["easy"])
        assert all(image["answers"][2] == label not in image["answers"][:2] for image in kinds["hard"])
    found = document["first_right"]
    assert sum(found["exits"]) + found["none"] == 160
    assert found["exits"][0] == round(document["calibration"][0]["accuracy"] * 160)
    again = CliRunner().invoke(build(), arguments)
    assert again.exit_code == 1
    assert "not empty" in str(again.exception)


def test_a_report_of_a_checkpoint_is_refused(micro_checkpoint: Path, image_folder: Path, tmp_path: Path):
    ran = CliRunner().invoke(build(), ["evaluate", str(micro_checkpoint), str(image_folder), "--report", str(tmp_path)])
    assert "needs a bundle" in str(ran.exception)
