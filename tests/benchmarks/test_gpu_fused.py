"""The comparison of stages with and without our own kernels, on a CPU: every part runs, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_fused


def test_what_has_not_begun_when_the_minutes_are_over_is_left_out(tmp_path: Path) -> None:
    arguments = ["--bundles", str(tmp_path), "--models", "toy", "--minutes", "0", "--out", str(tmp_path)]
    assert gpu_fused.main(arguments) == 1
    parts = json.loads((tmp_path / "gpu_fused.json").read_text())["parts"]
    assert set(parts) == {"kernels", "plain toy", "compiled toy"}
    assert set(parts.values()) == {"left out: the minutes were over"}


def test_ratios_are_of_a_cascade_whose_survivors_fill_batches(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {f"toy {number} plain": {"fused_ms": ms} for number, ms in enumerate((8.0, 2.0, 5.0, 10.0))}
    gpu_fused._ratios(figures, "toy", "plain")
    assert figures["toy plain fused ratios"] == pytest.approx(  # type: ignore[comparison-overlap]
        [8 / (2 + 0.54 * 5 + 0.24 * 10), 8 / (2 + 0.30 * 5 + 0.13 * 10), 8 / (2 + 0.20 * 5 + 0.07 * 10)]
    )
    assert "46/30/24 1.13" in capsys.readouterr().out
    assert "toy plain unfused ratios" not in figures


def test_stages_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    from benchmarks.seeded_graphs import export, export_alone

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    export("micro", "fp16", tmp_path / "micro-fp16")
    export_alone("micro", "fp16", tmp_path / "micro-alone-fp16")
    arguments = ["--models", "micro", "--batch", "2", "--seconds", "0.01", "--device", "cpu", "--only", "plain"]
    assert gpu_fused.main(["--bundles", str(tmp_path), *arguments, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "gpu_fused.json").read_text())
    assert document["parts"] == {"plain micro": "done"}
    for number in (1, 2, 3):
        found = document["figures"][f"micro {number} plain"]
        assert min(found["fused_ms"], found["unfused_ms"]) > 0
        assert found["apart"]["probabilities"] < 1e-2
    assert len(document["figures"]["micro plain fused ratios"]) == 3
