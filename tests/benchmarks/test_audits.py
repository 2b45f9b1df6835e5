"""The study of audits, in small: what was left out before is stood for now."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import audits


def test_busy_hours_count_as_quiet_ones_and_no_id_makes_a_sample(tmp_path: Path) -> None:
    assert audits.main(["--seconds", "40", "--runs", "2", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "audits.json").read_text())["figures"]
    before, now = (figures["loads"][f"0.3 and 2 in turns: {way}"] for way in ("before", "now"))
    assert now["low"] < now["true"] < now["high"]
    assert before["mean"] - before["true"] > 0.03 > abs(now["mean"] - now["true"])
    assert figures["loads"]["2: before"]["mean"] is None, "nobody is asked while the load lasts"
    assert figures["loads"]["2: now"]["right_in_the_end"] == 1
    assert figures["swaps"]["0.9: before"]["dropped"] > figures["swaps"]["0.9: now"]["dropped"] == 0
    ids = figures["constant_id"]
    assert ids["before, an id that is chosen"] > 0.9
    assert ids["before, an id that is not"] == 0
    assert abs(ids["now, whatever the id"] - 0.1) < 0.02
