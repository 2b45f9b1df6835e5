"""`dvt batch`, with the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.bundle.manifest import EMBEDDED, Bundle

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVT_ENGINE", "onnx")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_a_folder_becomes_a_file_of_answers(dvt: Run, photos: Path) -> None:
    status, out, err = dvt("batch", "photos", "-o", "answers.jsonl", "--top-k", "2", "--budget", "thresholds=never,0")
    assert (status, err) == (0, "")
    assert out.startswith("6 images in ")
    at_exit_2 = Bundle.load(EMBEDDED).manifest.stages[1].gmacs
    assert f"6 answered, 0 at exit 1, 6 at exit 2, 0 at exit 3, mean {at_exit_2:.4g} GMAC" in out
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"photos/{number}.png" for number in range(6)]
    assert {(len(line["predictions"]), line["exit"]) for line in lines} == {(2, 2)}
    assert photos.is_dir()


def test_the_status_says_that_some_have_failed_also_when_that_was_before(dvt: Run, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"x")
    status, out, err = dvt("batch", "photos", "-o", "answers.csv")
    assert status == 1
    assert err.startswith("Error: photos/bad.jpg: The image cannot be decoded")
    assert "1 failed" in out
    (photos / "z.png").write_bytes((photos / "0.png").read_bytes())
    status, out, err = dvt("batch", "photos", "-o", "answers.csv", "--resume", "--json")
    told = json.loads(out)
    assert (status, err) == (1, "")
    assert (told["images"], told["failed"], told["skipped"], told["failed_before"]) == (1, 0, 7, 1)
    assert len(Path("answers.csv").read_text().splitlines()) == 9


def test_answers_may_go_to_stdout(dvt: Run, photos: Path) -> None:  # noqa: ARG001
    status, out, err = dvt("batch", "photos/0.png", "photos/1.png", "-o", "-")
    assert status == 0
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["photos/0.png", "photos/1.png"]
    assert err.startswith("2 images in ")


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (("empty", "-o", "out"), 1, "no images in empty"),
        (("photos", "-o", "nowhere/out"), 1, "nowhere/out.part: no such file or directory"),
        (("photos", "-o", "-", "--resume"), 2, "--resume does not go with --output -"),
        (("photos", "-o", "out", "--resume", "--force"), 2, "--resume does not go with --force"),
        (("photos", "-", "-o", "out"), 2, "- stands for all names: it does not go with others"),
        (("photos", "-o", "out", "--budget", "fast"), 2, "fast is no target"),
        (("photos", "-o", "out", "--budget", "latency_ms=25"), 1, "latency_ms is a target for a server"),
        (
            ("photos", "-o", "out", "--budget", "gmacs=0.001"),
            1,
            "0.0218336 GMAC per image; feasible: cost 0.02184 to ",
        ),
        (("photos", "-o", "out", "--bundle", "nothing"), 1, "nothing"),
        (("photos", "-o", "out", "--engine", "abacus"), 1, "there is no engine abacus"),
        (("photos", "-o", "photos"), 1, "photos: is not a regular file"),
    ],
)
def test_what_cannot_be_is_told_in_a_line_and_leaves_nothing(
    dvt: Run, photos: Path, arguments: tuple[str, ...], status: int, error: str
) -> None:
    (photos.parent / "empty").mkdir()
    got, out, err = dvt("batch", *arguments)
    assert (got, out) == (status, "")
    assert error in err
    assert "Traceback" not in err
    assert sorted(entry.name for entry in photos.parent.iterdir() if entry.name != "state") == ["empty", "photos"]
