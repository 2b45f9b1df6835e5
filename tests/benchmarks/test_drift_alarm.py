"""Deadlines and streams in small: who has time pays what was asked for; nothing alarms that has not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drift_alarm


def figures(tmp_path: Path, part: str, scale: float) -> dict[str, Any]:
    assert drift_alarm.main(["--only", part, "--scale", str(scale), "--out", str(tmp_path)]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "drift_alarm.json").read_text())["figures"][part]
    return found


def test_traffic_in_a_hurry_does_not_change_what_others_cost(tmp_path: Path) -> None:
    found = figures(tmp_path, "hurried", 0.1)["0.2/0"]
    assert found["cut_short"] > 0.02
    assert found["overall"] < 1.22
    assert found["with_time"] == pytest.approx(1.25, rel=0.02)
    assert found["alarmed_looks"] == 0


def test_an_overload_is_no_drift(tmp_path: Path) -> None:
    found = figures(tmp_path, "overload", 0.1)
    assert found["1.1/no brownout"]["cut_short"] > 0.05
    assert all(one["alarmed_looks"] == 0 for one in found.values())


def test_streams_that_have_not_changed_are_silent_and_a_change_is_heard(tmp_path: Path) -> None:
    assert all(one["per_million"] == 0 for one in figures(tmp_path, "false_alarms", 0.01).values())
    found = figures(tmp_path, "delays", 0.05)
    assert found["1/0"]["median"] <= 1000
    assert found["0.5/0"]["median"] <= 2000
