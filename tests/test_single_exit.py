"""A model of one token grid, a backbone alone, is a cascade of one: exported, calibrated, judged and served as any."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from model.checkpoint import save_model
from model.config import variant
from model.dvt import DVT
from server.__main__ import build
from server.bundle.manifest import Bundle
from server.calibration.sweep import sweep

CLASSES = ("blue", "green", "red", "white")


def dvt(*arguments: str) -> str:
    ran = CliRunner().invoke(build(), list(arguments), catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.output


@pytest.fixture(scope="module")
def single(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a model with seeded weights, calibrated."""
    folder = tmp_path_factory.mktemp("single")
    torch.manual_seed(0)
    save_model(folder / "m.safetensors", DVT(variant("micro", grids=(4,), tokenizer="patch", labels=CLASSES)))
    assert "exit 1: 4x4 tokens" in dvt("export", str(folder / "m.safetensors"), str(folder / "bundle"))
    assert "1 operating points" in dvt("calibrate", str(folder / "bundle"), str(image_folder))
    return folder / "bundle"


def test_its_frontier_is_one_row_without_a_choice(single: Path):
    frontier = Bundle.load(single).frontier
    (row,) = frontier.rows
    assert (row.thresholds, row.exit_fractions) == ((0.0,), (1.0,))
    assert (row.gmacs, row.accuracy) == (frontier.stage_gmacs[0], frontier.exit_accuracy[0])
    assert frontier.predict([]) == frontier.predict([0.0]) == row
    assert frontier.mixture(1.0).share == 0.0


def test_a_frontier_of_no_exit_is_refused():
    with pytest.raises(ValueError, match="cumulative costs that rise"):
        sweep(np.empty((0, 4)), np.ones((0, 4)), [])


def test_it_can_be_certified_since_the_only_exit_is_the_last(single: Path, image_folder: Path):
    # A loss of nothing: a few images are enough.
    said = dvt("calibrate", str(single), str(image_folder), "--max-accuracy-loss", "0.2")
    assert "certified on 80 other images" in said


def test_it_is_judged_with_a_report(single: Path, image_folder: Path, tmp_path: Path):
    out = tmp_path / "report"
    said = dvt("evaluate", str(single), str(image_folder), "--report", str(out))
    assert "geometric" not in said
    for name in re.findall(r'src="([^"]+)"', (out / "index.html").read_text()):
        with Image.open(out / name) as image:
            image.load()


@contextmanager
def served(bundle: Path, state: Path) -> Iterator[httpx.Client]:
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", str(bundle), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "DVT_STATE_DIR": str(state)},
    )
    assert process.stdout is not None
    try:
        found = None
        for line in process.stdout:
            if found := re.search(r"Listening on (\S+)", line):
                break
        assert found, "the server ended before it listened"
        with httpx.Client(base_url=found[1], timeout=30) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
    assert process.wait(timeout=30) == 0


def photo() -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def test_it_is_served_and_its_budget_answers_sensibly(single: Path, tmp_path: Path):
    (gmacs,) = Bundle.load(single).manifest.stage_gmacs
    with served(single, tmp_path) as client:
        for query, status in (("", 200), ("max_exit=1", 200), ("min_confidence=1", 200), ("max_exit=2", 422)):
            answer = client.post(f"/classify?{query}", content=photo(), headers={"content-type": "image/png"})
            assert answer.status_code == status, answer.text
            if status == 200:
                (result,) = answer.json()["results"]
                assert (result["exit"], result["degraded"], result["gmacs"]) == (1, False, gmacs)
        (row,) = client.get("/frontier").json()["rows"]
        assert row["thresholds"] == [0.0]
        accuracy = row["accuracy"]
        assert [stage["grid"] for stage in client.get("/model").json()["stages"]] == [[4, 4]]
        for target, clamped in (
            ({"gmacs": gmacs}, False),
            ({"gmacs": 2 * gmacs}, True),
            ({"gmacs": 2 * gmacs, "mix": True}, True),
            ({"accuracy": accuracy}, False),
            ({"accuracy": accuracy / 2}, True),
            ({"latency_ms": 10_000}, False),
            ({"thresholds": [0]}, False),
            ({"thresholds": []}, False),
        ):
            preview = client.post("/budget/preview", json=target)
            assert preview.status_code == 200, preview.text
            assert preview.json()["traffic"]["target"]["gmacs"] == gmacs
            budget = client.put("/budget", json=target)
            assert budget.status_code == 200, budget.text
            state = budget.json()
            assert (state["thresholds"], state["clamped"], state["row"]) == ([0.0], clamped, 0)
            assert state["predicted"] == {"accuracy": accuracy, "gmacs": gmacs, "exit_fractions": [1.0]}
        for target, code in (
            ({"gmacs": gmacs / 2}, "budget_infeasible"),
            ({"accuracy": 1.0}, "budget_infeasible"),
            ({"thresholds": [0.5]}, "invalid_request"),
            ({"thresholds": [0.5, 0]}, "invalid_request"),
        ):
            refused = client.put("/budget", json=target)
            assert (refused.status_code, refused.json()["code"]) == (422, code)
            if code == "budget_infeasible":
                assert refused.json()["feasible"]["gmacs"] == [gmacs, gmacs]
    with served(single, tmp_path) as client:
        assert client.get("/budget").json()["target"] == {"thresholds": []}
