"""The file that answers go to: whole or not there, taken up wherever a run ended, nothing lost and nothing twice."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from server.bundle.manifest import Bundle
from server.core import ImageResult
from server.errors import BadImage, ServeError
from server.offline.answers import AnswerFile, Csv, Form, JsonLines, OutputError

MISSING = 250  # of the pictures
THRESHOLDS = (0.75, 0.5, 0.0)
NAMES = ["a.jpg", 'b "quoted", and\nbroken.jpg', "{c.jpg", "d\udcff.jpg", "é.jpg", "", "f\r.jpg", "g.jpg"]

FORMS = pytest.mark.parametrize("kind", [JsonLines, Csv])


def answer(number: int) -> ImageResult | ServeError:
    if number % 4 == 3:
        return BadImage('The image cannot be decoded: "x",\ny', reason="x")
    probabilities = np.full(10, 0.05, np.float32)
    probabilities[number] = 0.55
    return ImageResult(probabilities, number % 3 + 1, 0.55, False, 0.0, 0.0, (0.55,))


def write(file: AnswerFile, names: list[str]) -> None:
    """As `dvt batch` does with images of these names."""
    for number, name in enumerate(names):
        if name not in file.done:
            file.add(name, answer(number))


def finished(path: Path, form: Form, **how: bool) -> bytes:
    file = AnswerFile(path, form, **how)
    write(file, NAMES)
    file.finish()
    file.close()
    return path.read_bytes()


@pytest.fixture
def form(bundle: Bundle) -> Callable[..., Form]:
    def make(kind: Any, thresholds: tuple[float, ...] = THRESHOLDS) -> Form:
        form: Form = kind(bundle, thresholds, 2)
        return form

    return make


def test_json_lines_tell_what_the_server_tells(form: Callable[..., Form], tmp_path: Path, bundle: Bundle) -> None:
    lines = [json.loads(line) for line in finished(tmp_path / "out", form(JsonLines)).splitlines()]
    assert [line["image"] for line in lines] == NAMES
    assert lines[1] == {
        "image": NAMES[1],
        "predictions": [
            {"label": "label1", "class_id": 1, "probability": 0.55},
            {"label": "label0", "class_id": 0, "probability": 0.05},
        ],
        "exit": 2,
        "confidence": 0.55,
        "gmacs": 0.03,
        "version": bundle.manifest.version,
        "thresholds": list(THRESHOLDS),
    }
    assert lines[3]["error"] == {"code": "bad_image", "detail": 'The image cannot be decoded: "x",\ny'}


def test_csv_is_read_by_any_reader_of_it(form: Callable[..., Form], tmp_path: Path) -> None:
    finished(tmp_path / "out", form(Csv))
    with open(tmp_path / "out", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image"] for row in rows] == NAMES
    assert (rows[1]["label"], rows[1]["exit"], rows[1]["error"]) == ("label1", "2", "")
    assert (rows[3]["label"], rows[3]["exit"]) == ("", "")
    assert rows[3]["error"].startswith("bad_image: ")


@FORMS
def test_until_all_are_there_the_file_is_not(kind: Any, form: Callable[..., Form], tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "out", form(kind))
    write(file, NAMES)
    file.flush()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.part"]
    file.finish()
    file.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@FORMS
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_wherever_a_run_is_cut_off_the_next_one_makes_the_same_file(
    kind: Any, form: Callable[..., Form], tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "out"
    whole = finished(path, form(kind), force=True)
    path.unlink()
    cut = data.draw(st.integers(0, len(whole)))
    path.with_name("out.part").write_bytes(whole[:cut] + data.draw(st.sampled_from([b"", b"\0" * 7])))
    assert finished(path, form(kind), resume=True) == whole


@FORMS
def test_a_file_that_is_complete_stays_so_until_there_is_more(
    kind: Any, form: Callable[..., Form], tmp_path: Path
) -> None:
    path = tmp_path / "out"
    whole = finished(path, form(kind))
    file = AnswerFile(path, form(kind), resume=True)
    assert (file.done, file.failed) == (set(NAMES), 2)
    file.add("new.jpg", answer(0))
    file.flush()
    assert path.read_bytes() == whole
    file.close()  # as if killed
    file = AnswerFile(path, form(kind), resume=True)
    assert file.done == {*NAMES, "new.jpg"}
    file.finish()
    file.close()
    assert path.read_bytes().startswith(whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@FORMS
def test_nobody_loses_a_file_unasked(kind: Any, form: Callable[..., Form], tmp_path: Path) -> None:
    path = tmp_path / "out"
    whole = finished(path, form(kind))
    with pytest.raises(OutputError, match="out: is there already; --resume goes on with it, --force begins anew"):
        AnswerFile(path, form(kind))
    path.rename(tmp_path / "out.part")
    with pytest.raises(OutputError, match=r"out\.part: is there already"):
        AnswerFile(path, form(kind))
    assert (tmp_path / "out.part").read_bytes() == whole
    assert finished(path, form(kind), force=True) == whole


@FORMS
@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b"{}\n", b'{"image": 1}\n', b"[" * 5000 + b"\n"])
def test_what_is_somebody_elses_is_not_taken_up(
    kind: Any, form: Callable[..., Form], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="out: does not hold answers in this form"):
        AnswerFile(path, form(kind), resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert path.read_bytes() == content


@FORMS
def test_answers_of_two_budgets_are_not_mixed(kind: Any, form: Callable[..., Form], tmp_path: Path) -> None:
    path = tmp_path / "out"
    whole = finished(path, form(kind))
    with pytest.raises(OutputError, match=r"out: has answers by thresholds \[0.75, 0.5, 0.0\], not \[0.7, 0.5, 0.0\]"):
        AnswerFile(path, form(kind, (0.7, 0.5, 0.0)), resume=True)
    assert path.read_bytes() == whole
    (tmp_path / "out.part").write_bytes(whole)
    with pytest.raises(OutputError, match=r"out\.part: has answers by thresholds"):
        AnswerFile(path, form(kind, (0.7, 0.5, 0.0)), resume=True)
    assert (tmp_path / "out.part").read_bytes() == whole


def test_one_run_writes_at_a_time(form: Callable[..., Form], tmp_path: Path) -> None:
    first = AnswerFile(tmp_path / "out", form(JsonLines))
    for how in ({"resume": True}, {"force": True}):
        with pytest.raises(OutputError, match=r"out\.part: another run is writing it"):
            AnswerFile(tmp_path / "out", form(JsonLines), **how)
    write(first, NAMES)
    first.finish()
    first.close()
    assert len((tmp_path / "out").read_bytes().splitlines()) == len(NAMES)


def test_a_link_stays_and_what_is_no_file_is_refused(form: Callable[..., Form], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there" / "file")
    finished(tmp_path / "out", form(JsonLines))
    assert (tmp_path / "out").is_symlink()
    assert [entry.name for entry in (tmp_path / "there").iterdir()] == ["file"]
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "there"):
        with pytest.raises(OutputError, match="is not a regular file"):
            AnswerFile(tmp_path / name, form(JsonLines), force=True)
    (tmp_path / "link.part").symlink_to(tmp_path / "there" / "file")
    with pytest.raises(OutputError, match=r"link\.part: "):
        AnswerFile(tmp_path / "link", form(JsonLines), force=True)
    with pytest.raises(OutputError, match="no such file or directory"):
        AnswerFile(tmp_path / "nowhere" / "out", form(JsonLines))


# -- the process, killed


def batch(folder: Path, *arguments: str, limit_blocks: int | None = None, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "server", "batch", "-", "--budget", "thresholds=0.2,0.2", *arguments]
    if limit_blocks is not None:
        command = ["bash", "-c", f'ulimit -f {limit_blocks}; exec "$@"', "-", *command]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "DVT_ENGINE": "onnx"}
    return subprocess.Popen(command, text=True, cwd=folder, env=environment, **pipes, **options)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder and the names of 600 images in it; one is not there."""
    folder = tmp_path_factory.mktemp("pictures")
    names = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    for number in range(600):
        names.append(f"{number:03d}.jpg")
        if number != MISSING:
            os.link(folder / f"{number % 4}.jpg", folder / names[-1])
    return folder, names


@pytest.fixture(scope="module")
def unbroken(pictures: tuple[Path, list[str]]) -> bytes:
    folder, names = pictures
    run = batch(folder, "-o", "unbroken.jsonl")
    _, err = run.communicate("\n".join(names), timeout=120)
    assert (run.returncode, err) == (
        1,
        f"Error: {MISSING}.jpg: The file cannot be read: no such file or directory (bad_image)\n",
    )
    content = (folder / "unbroken.jsonl").read_bytes()
    assert [json.loads(line)["image"] for line in content.splitlines()] == names
    return content


@pytest.mark.parametrize(("number", "status"), [("SIGKILL", -9), ("SIGINT", 130)])
def test_a_run_that_is_stopped_is_taken_up(
    pictures: tuple[Path, list[str]], unbroken: bytes, number: str, status: int
) -> None:
    folder, names = pictures
    out = folder / f"{number}.jsonl"
    run = batch(folder, "-o", out.name)
    assert run.stdin is not None
    assert run.stderr is not None
    run.stdin.write("\n".join(names))
    run.stdin.flush()  # and the end of it is still to come
    giving_up = threading.Timer(60, run.kill)
    giving_up.start()
    assert f"{MISSING}.jpg" in run.stderr.readline()
    giving_up.cancel()
    run.send_signal(signal.Signals[number])
    run.communicate(timeout=60)
    assert run.returncode == status
    assert not out.exists()
    part = (folder / f"{number}.jsonl.part").read_bytes()
    assert len(part) > 64 * 1024
    assert unbroken.startswith(part)
    again = batch(folder, "-o", out.name, "--resume", "--json")
    told, err = again.communicate("\n".join(names), timeout=120)
    assert again.returncode == 1, err
    assert json.loads(told)["skipped"] == part.count(b"\n")
    assert out.read_bytes() == unbroken


def test_where_nothing_more_can_be_written_it_says_so_and_is_taken_up(
    pictures: tuple[Path, list[str]], unbroken: bytes
) -> None:
    folder, names = pictures
    run = batch(folder, "-o", "full.jsonl", limit_blocks=100)
    _, err = run.communicate("\n".join(names), timeout=120)
    assert run.returncode == 1
    assert err.splitlines()[-1].endswith("full.jsonl.part: file too large")
    assert "Traceback" not in err
    again = batch(folder, "-o", "full.jsonl", "--resume")
    again.communicate("\n".join(names), timeout=120)
    assert (folder / "full.jsonl").read_bytes() == unbroken
