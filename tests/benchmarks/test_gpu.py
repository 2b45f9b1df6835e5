"""The GPU benchmark on a device in the host's memory: every part runs, in small, and what fails costs no other part."""

from __future__ import annotations

import json
import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_engines import open_engine
from benchmarks.gpu_loops import ClosedLoop
from server.bundle.manifest import Bundle
from server.core import StageBatch, StageOutput


@pytest.fixture
def bundles(bundle: Bundle, tmp_path: Path) -> Path:
    """The toy cascade under all names that the benchmark wants; of `alone` only one stage is run."""
    folder = tmp_path / "bundles"
    folder.mkdir()
    for name in ("toy-fp16", "toy-fp32", "toy-alone-fp16", "micro-fp32"):
        (folder / name).symlink_to(bundle.path)
    return folder


def run(bundles: Path, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    options = ["--engine", "fake", "--bundles", str(bundles), "--models", "toy", "--small", "--minutes", "0.05"]
    status = gpu.main([*options, "--out", str(out), *arguments])
    return status, json.loads((out / "gpu.json").read_text())


def test_every_part_runs_and_keeps_what_is_promised(bundles: Path, tmp_path: Path) -> None:
    status, document = run(bundles, tmp_path / "out")
    parts = document["parts"]
    assert {name: part["error"] for name, part in parts.items() if part["error"] or part["broken"]} == {}
    assert status == 0
    assert list(parts) == ["bundles", *(part.name for part in gpu.plan(["toy"]))]
    assert all(part["table"] for part in parts.values())
    figures = parts["throughput toy"]["figures"]
    assert set(figures) >= {"backbone alone", "46/30/24", "no exit", "46/30/24, shrinking"}
    assert figures["46/30/24"]["images_s"][0] >= 0
    assert parts["answers"]["figures"]["photo10 fp32"]["exits"] == 0


def test_a_part_that_fails_leaves_one_line_and_the_others_go_on(bundles: Path, tmp_path: Path) -> None:
    (bundles / "toy-alone-fp16").unlink()
    status, document = run(bundles, tmp_path / "out", "--only", "t", "s")
    assert status == 1
    parts = document["parts"]
    assert "no such folder" in parts["throughput toy"]["error"]
    assert "\n" not in parts["throughput toy"]["error"]
    assert parts["state toy"]["error"] is None, "of the same group, after it"
    assert parts["single toy"]["error"] is None


def test_what_has_not_begun_when_the_minutes_are_over_is_left_out(bundles: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--engine", "fake", "--bundles", str(bundles), "--models", "toy", "--minutes", "0", "--out", str(out)]
    assert gpu.main(arguments) == 1
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert parts["bundles"]["error"] is None
    assert {part["error"] for name, part in parts.items() if name != "bundles"} == {"left out: the minutes were over"}


def test_images_leave_where_the_lot_says_and_survivors_fill_batches(bundles: Path) -> None:
    opened = open_engine("fake", Bundle.load(bundles / "toy-fp16"), sizes=(1, 2, 4), lanes=2, max_slots=64)
    batches: list[StageBatch] = []
    engine = opened.engine
    plain = engine.run

    class Told:
        """The engine, with a record of what it ran."""

        num_stages, free = engine.num_stages, staticmethod(engine.free)

        def run(self, batch: StageBatch) -> StageOutput:
            batches.append(batch)
            return plain(batch)

    pixels = [np.full((32, 32, 3), shade, np.uint8) for shade in range(8)]
    loop = ClosedLoop(Told(), pixels, (0.5, 0.3, 0.2), (4, 4, 4), lanes=2)  # type: ignore[arg-type]
    done = loop.run(0.4)
    assert engine.slots_in_use == 0
    assert {len(batch.pixels) for batch in batches} == {4}
    assert {batch.stage for batch in batches} == {1, 2, 3}
    assert done.images > 0
    ran = [sum(len(batch.pixels) for batch in batches if batch.stage == stage) for stage in (1, 2, 3)]
    assert ran[1] == pytest.approx(0.5 * ran[0], rel=0.35, abs=12)
    left_alone = ClosedLoop(engine, pixels, (0.5, 0.3, 0.2), (4, 4, 4), lanes=1, rebatch=False).run(0.4)
    assert left_alone.fill[1] < 4, "batches that shrink"
    assert engine.slots_in_use == 0
    engine.close()


def test_a_loop_tells_an_engine_that_does_not_obey(bundles: Path) -> None:
    opened = open_engine("fake", Bundle.load(bundles / "toy-fp16"), sizes=(1, 4), lanes=1, max_slots=64)
    engine = opened.engine

    class Lazy:
        num_stages, free = engine.num_stages, staticmethod(engine.free)

        def run(self, batch: StageBatch) -> StageOutput:
            return engine.run(StageBatch(batch.stage, batch.pixels, batch.slots, [0.0] * len(batch.pixels)))

    pixels = [np.zeros((32, 32, 3), np.uint8)]
    with pytest.raises(RuntimeError, match="should leave"):
        ClosedLoop(Lazy(), pixels, (0.5, 0.3, 0.2), (4, 4, 4)).run(0.2)  # type: ignore[arg-type]
    assert engine.slots_in_use == 0
    engine.close()


@pytest.fixture
def document() -> gpu.Document:
    document = gpu.Document(gpu.Options(out=None, command="", engine="fake"))
    document.begin("a part")
    return document


def test_a_process_that_dies_costs_its_part_alone_and_keeps_what_was_told(document: gpu.Document) -> None:
    ours, theirs = Pipe()

    def dying() -> None:
        theirs.recv()
        theirs.send(("line", "half", "a figure", {"half": 1}))
        theirs.close()

    process = threading.Thread(target=dying)
    process.start()
    error = gpu._follow(ours, "a part", document, 5.0)
    process.join()
    assert error == "its process died"
    document.end("a part", error)
    assert document.failed == ["a part"]
    assert document._parts["a part"]["figures"] == {"half": 1}


def test_a_part_that_hangs_is_ended(document: gpu.Document) -> None:
    ours, theirs = Pipe()
    assert gpu._follow(ours, "a part", document, 0.05) == "ended after 0 s"
    theirs.close()


def test_a_promise_that_was_broken_makes_the_part_a_failed_one(document: gpu.Document) -> None:
    ours, theirs = Pipe()
    theirs.send(("ended", None, ["slots left: 1"]))
    assert gpu._follow(ours, "a part", document, 5.0) is None
    document.end("a part")
    assert document.failed == ["a part"]
