"""The controllers in the simulator, in small: a cost is held through drift; an overload costs accuracy, not answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import control


def figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert control.main([*arguments, "--out", str(tmp_path), "--plots", str(tmp_path)]) == 0
    assert (tmp_path / f"control_{arguments[0]}.png").exists()
    found: dict[str, Any] = json.loads((tmp_path / f"control_{arguments[0]}.json").read_text())["figures"]
    return found


def test_a_held_cost_stays_while_the_input_gets_harder_and_easier(tmp_path: Path) -> None:
    found = figures(tmp_path, "drift", "--scale", "0.1")
    assert found["held_answered"] == found["fixed_answered"] == 1
    for held, fixed in list(zip(found["held_segments"], found["fixed_segments"], strict=True))[1:4:2]:
        assert abs(held) < 0.05 < 0.25 < abs(fixed)


def test_an_overload_costs_accuracy_before_it_costs_answers(tmp_path: Path) -> None:
    found = figures(tmp_path, "overload", "--scale", "0.1")
    assert found["brownout"]["refused"] == 0
    assert found["brownout"]["answered_in_time"] == 1
    assert found["fixed"]["refused"] > 0.002
    assert found["fixed"]["degraded"] > 0.05
    assert found["brownout"]["degraded"] == 0
    assert found["brownout"]["correct_in_time"] > 0.99 * found["fixed"]["correct_in_time"]
    assert found["brownout"]["p99_ms"] < 0.7 * found["fixed"]["p99_ms"]
