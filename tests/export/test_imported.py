"""A published checkpoint brings operating points along: they serve at once, or are left out with the cause."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from export.commands import _table
from export.imported import imported_frontier
from export.report import Calibration, _page, _plot_curve
from server.__main__ import build
from server.budget.controller import BudgetController
from server.budget.store import MemoryStore
from server.bundle.frontier import NEVER, Frontier, Records
from server.bundle.manifest import EMBEDDED, Bundle, Manifest
from server.calibration.evaluate import evaluate
from tests.model.published import Layout

POINTS = 59
NOT_THERE = "not there"


def published(gmacs: tuple[float, ...]) -> dict[str, Any]:
    """What the authors' code writes, for a model of these costs: accuracy rises to row 49 and falls after it."""
    p = np.arange(1, POINTS + 1)[:, None] / 20
    shares = p ** np.arange(1, len(gmacs) + 1)
    costs = (shares / shares.sum(axis=1, keepdims=True)) @ np.array(gmacs)
    accuracies = 70 + 10 * np.sin(np.arange(POINTS) / 49 * np.pi / 2)
    thresholds = np.linspace(0.05, 1.1, POINTS)[:, None] * np.array([1.0, 0.9, 0.5])
    return {
        "flops": list(gmacs),
        "dynamic_threshold": torch.tensor(thresholds),
        "anytime_classification": [70.0, torch.tensor(76.0), np.float64(80.0)],
        "budgeted_batch_classification": [costs.tolist(), [torch.tensor(a) for a in accuracies]],
    }


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Bundle.load(EMBEDDED, verify=False, need_frontier=False).manifest


def as_kept(gmacs: tuple[float, ...]) -> dict[str, Any]:
    """As `dvt import` leaves it in the header."""
    from model.published import _kept

    kept: dict[str, Any] = json.loads(json.dumps(_kept(published(gmacs))))
    return kept


def test_rows_have_the_file_s_thresholds_and_accuracies_and_our_costs(manifest: Manifest):
    notices: list[str] = []
    frontier = imported_frontier(as_kept(manifest.stage_gmacs), manifest, notices.append)
    assert frontier is not None
    assert notices == []
    assert (frontier.source, frontier.samples, frontier.records) == ("imported", 0, None)
    assert frontier.exit_accuracy == (0.7, 0.76, 0.8)
    assert len(frontier.rows) == 50, "rows behind the most accurate one cost more and give less"
    even = frontier.rows[19]  # p = 1: a third each
    assert even.exit_fractions == pytest.approx((1 / 3,) * 3)
    assert even.gmacs == pytest.approx(sum(manifest.stage_gmacs) / 3)
    assert even.accuracy == pytest.approx(0.7 + 0.1 * np.sin(19 / 49 * np.pi / 2))
    assert even.thresholds == pytest.approx((0.05 + 19 * 1.05 / 58, 0.9 * (0.05 + 19 * 1.05 / 58), 0.0))
    assert all(row.accuracy_lower is None for row in frontier.rows)
    assert Frontier.from_json(frontier.to_json()) == frontier


def test_thresholds_beyond_any_confidence_are_never_and_those_below_are_zero(manifest: Manifest):
    kept = as_kept(manifest.stage_gmacs)
    kept["dynamic_threshold"][0] = [1e8, -0.5, 1e8]
    frontier = imported_frontier(kept, manifest, pytest.fail)
    assert frontier is not None
    assert frontier.rows[0].thresholds == (NEVER, 0.0, 0.0)


def test_a_file_without_thresholds_says_nothing(manifest: Manifest):
    assert imported_frontier({"file": "x.pth", "flops": [1.0]}, manifest, pytest.fail) is None


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("dynamic_threshold", [[0.5] * 3] * 58, r"dynamic_threshold has shape (58, 3), expected (59, 3)"),
        ("dynamic_threshold", [[0.5] * 2] * 59, r"dynamic_threshold has shape (59, 2), expected (59, 3)"),
        ("dynamic_threshold", [[0.5], [0.5, 0.5]], "dynamic_threshold is no array of numbers"),
        ("dynamic_threshold", [["x"] * 3] * 59, "dynamic_threshold is no array of numbers"),
        ("dynamic_threshold", [[float("nan")] * 3] * 59, "dynamic_threshold holds values that are not finite"),
        ("budgeted_batch_classification", NOT_THERE, "budgeted_batch_classification is missing"),
        ("budgeted_batch_classification", [[1.0] * 59], "has shape (1, 59), expected (2, 59)"),
        ("budgeted_batch_classification", [[1.0] * 59, [101.0] * 59], "an accuracy is not a percentage"),
        ("anytime_classification", NOT_THERE, "anytime_classification is missing"),
        ("anytime_classification", [70.0, -1.0, 80.0], "an accuracy is not a percentage"),
    ],
)
def test_a_malformed_set_is_left_out_with_one_line_on_what_is_wrong(
    name: str, value: object, cause: str, manifest: Manifest
):
    kept = as_kept(manifest.stage_gmacs)
    if value == NOT_THERE:
        del kept[name]
    else:
        kept[name] = value
    notices: list[str] = []
    assert imported_frontier(kept, manifest, notices.append) is None
    (notice,) = notices
    assert notice.startswith("the checkpoint's thresholds are left out: ")
    assert cause in notice
    assert "\n" not in notice


def test_they_are_for_the_largest_probability_only(manifest: Manifest):
    notices: list[str] = []
    entropy = manifest.model_copy(update={"criterion": "entropy"})
    assert imported_frontier(as_kept(manifest.stage_gmacs), entropy, notices.append) is None
    assert "not for entropy" in notices[0]


def test_a_bundle_in_half_precision_has_them_and_is_told_that_they_are_not_its_own(manifest: Manifest):
    notices: list[str] = []
    half = manifest.model_copy(update={"precision": "fp16"})
    frontier = imported_frontier(as_kept(manifest.stage_gmacs), half, notices.append)
    assert frontier is not None
    assert frontier.key == half.frontier_key
    assert notices == ["the checkpoint's thresholds were not solved in fp16; calibrate before relying on them"]


def test_costs_that_are_not_ours_are_told_and_ours_are_used(manifest: Manifest):
    notices: list[str] = []
    kept = as_kept(tuple(1.2 * gmacs for gmacs in manifest.stage_gmacs))
    frontier = imported_frontier(kept, manifest, notices.append)
    assert frontier is not None
    assert frontier.rows[19].gmacs == pytest.approx(sum(manifest.stage_gmacs) / 3)
    assert notices == ["the checkpoint's mean costs differ by up to 20% from those counted here, which are used"]


def test_an_evaluation_of_it_does_without_what_would_need_records(manifest: Manifest, tmp_path: Path):
    bundle = Bundle.load(EMBEDDED, verify=False, need_frontier=False)
    frontier = imported_frontier(as_kept(manifest.stage_gmacs), manifest, pytest.fail)
    assert frontier is not None
    rng = np.random.default_rng(0)
    records = Records(rng.random((2, 200), dtype=np.float32), rng.random((3, 200)) < 0.7)
    evaluation = evaluate(frontier, records)
    assert set(evaluation.points) == {"25%", "50%", "75%", "knee"}
    assert (evaluation.geometric_points, evaluation.geometric_area) == ({}, None)
    assert "geometric" not in _table(asdict(evaluation))
    _plot_curve(replace(bundle, solved=frontier), records, evaluation, tmp_path / "curve.png")
    page = _page(
        replace(bundle, solved=frontier), evaluation, [Calibration(0.7, 0.7, 0.0, 1.0, 0.0)] * 3, [60, 100, 30, 10], {}
    )
    assert "Thresholds come from the imported checkpoint" in page
    assert "geometric" not in page


async def test_from_the_published_file_to_a_budget_without_an_image(tmp_path: Path):
    layout = Layout("deit", dim=64, depth=2, hidden=64, classes=5)
    source, checkpoint, out = tmp_path / "x.pth.tar", tmp_path / "x.safetensors", tmp_path / "bundle"
    torch.save({"model_state_dict": layout.random(), **published((0.1, 0.2, 0.4))}, source)
    for arguments in (["import", source, checkpoint], ["export", checkpoint, out]):
        ran = CliRunner().invoke(build(), [str(argument) for argument in arguments])
        assert ran.exit_code == 0, ran.output
    assert "note: the checkpoint's mean costs differ" in ran.stderr
    assert "50 operating points of the checkpoint's own" in ran.stdout
    frontier = Bundle.load(out).frontier
    assert frontier.source == "imported"
    budget = BudgetController(frontier, MemoryStore())
    wanted = frontier.rows[30]
    state = await budget.put({"gmacs": wanted.gmacs + 1e-6})
    assert state.thresholds == wanted.thresholds
    assert state.predicted.accuracy == wanted.accuracy
    state = await budget.put({"thresholds": [0.9, 0.7]})
    assert state.thresholds == (0.9, 0.7, 0.0)
    assert (state.predicted.accuracy, state.predicted.gmacs, state.predicted.exit_fractions) == (None, None, None)
