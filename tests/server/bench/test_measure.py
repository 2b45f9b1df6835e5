"""`dvt bench` from end to end, against a server that says what it is told to say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.bench.conftest import HANG_UP, answer, result

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--seconds", "0.4", "--warm-up", "0.1", "--rate", "100", "--distinct", "4")


def test_a_load_is_told_in_a_table_a_document_and_a_page(dvt: Run, standing: Any, tmp_path: Path) -> None:
    with standing(lambda n: answer(result(1 + n % 2, "cat"))) as server:
        out, figures = tmp_path / "report.html", tmp_path / "figures.json"
        files = ("--out", str(out), "--json-out", str(figures))
        status, printed, err = dvt("bench", "--url", server.url, *QUICK, "--timeout-ms", "5000", *files)
    assert (status, err) == (0, "")
    assert "answered in time  100.00 %" in printed
    document = json.loads(figures.read_text())
    requests = document["requests"]
    assert document["schema"] == "dvt-bench/1"
    assert requests["sent"] + requests["warm_up"] == requests["planned"] == server.asked - 1, "and one to try"
    assert set(document["images"]["by_exit"]) == {"1", "2"}
    assert document["driver"]["ceiling_per_s"] > 0
    assert document["server"]["before"]["model"]["name"] == "standing"
    assert document["server"]["before"]["budget"] is None, "this one has none"
    assert set(server.queries) == {"/classify?top_k=1&timeout_ms=5000"}
    assert "standing 1" in out.read_text()
    assert str(tmp_path.parent) not in figures.read_text()


def test_the_same_seed_sends_the_same(dvt: Run, standing: Any) -> None:
    def sent(*more: str) -> tuple[int, list[bytes]]:
        with standing() as server:
            status, printed, _ = dvt("bench", "--url", server.url, *QUICK, "--json", *more)
            assert status == 0
            return json.loads(printed)["requests"]["planned"], sorted(server.bodies)

    once = sent()
    assert once == sent("--processes", "2")
    assert once != sent("--seed", "1")


def test_right_answers_in_time_are_counted_over_all_labelled_images(dvt: Run, standing: Any, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 99)).save(tmp_path / name / f"{number}.png")
    said = [answer(), (503, "overloaded")]
    with standing(lambda n: said[n % 2]) as server:
        options = ("--rate", "100", "--arrivals", "even", "--requests", "40", "--warm-up", "0", "--json")
        status, printed, _ = dvt("bench", str(tmp_path), "--url", server.url, *options)
    document = json.loads(printed)
    assert status == 0, "a server may refuse"
    assert document["requests"]["refused"] == document["requests"]["answered"] == 20
    images = document["images"]
    assert images["labelled"] == 40
    assert images["accuracy"] == images["correct"] / 20
    assert images["correct_in_time_share"] == images["correct_in_time"] / 40


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--arrivals", "mmpp"), "requests"),
        (("--rate", "50,150"), "requests"),
        (("--rate", "0.2x"), "capacity"),
        (("--clients", "3"), "closed"),
        (("--leaving", "0.2", "--slow", "0.2", "--spoilt", "0.2", "--together", "2"), "odd"),
    ],
)
def test_every_kind_of_load_runs_and_conserves(dvt: Run, standing: Any, options: tuple[str, ...], name: str) -> None:
    together = 2 if "--together" in options else 1
    quick = QUICK if "--clients" not in options else (*QUICK[:4], *QUICK[6:])
    with standing(lambda _: answer(*[result()] * together)) as server:
        status, printed, err = dvt("bench", "--url", server.url, *quick, *options, "--json")
    assert printed, err
    document = json.loads(printed)
    requests, odd = document["requests"], sum(of["sent"] for of in document["odd_clients"].values())
    assert status == 0
    assert requests["sent"] > 0
    assert requests["unsent"] == 0
    assert requests["planned"] == requests["warm_up"] + requests["sent"] + odd
    assert requests["sent"] == requests["answered"]
    assert (document["load"]["capacity_per_s"] is not None) == (name == "capacity")
    assert (odd > 0) == (name == "odd")


def test_a_trace_is_sent_as_it_stands(dvt: Run, standing: Any, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("at\n10\n10.1\n10.1\n10.3\n")
    with standing() as server:
        trace = ("--trace", str(tmp_path / "trace.csv"), "--trace-time", "at", "--warm-up", "0")
        status, printed, _ = dvt("bench", "--url", server.url, *trace, "--distinct", "2", "--json")
    document = json.loads(printed)
    assert (status, document["requests"]["sent"]) == (0, 4)
    assert document["load"]["trace"] == "trace.csv", "no path of this machine"


def test_a_server_that_dies_is_counted_and_fails_the_run(dvt: Run, standing: Any, tmp_path: Path) -> None:
    def say(number: int) -> Any:
        if number == 20:
            server.socket.close()
        return answer() if number < 20 else HANG_UP

    with standing(say) as server:
        status, printed, err = dvt("bench", "--url", server.url, *QUICK, "--out", str(tmp_path / "report.html"))
    assert status == 1
    assert "failed" in printed
    assert "connection refused" in printed
    assert "Traceback" not in printed + err
    assert "connection refused" in (tmp_path / "report.html").read_text()


def test_a_server_that_is_only_busy_is_loaded_all_the_same(dvt: Run, standing: Any) -> None:
    with standing(lambda _: (503, "overloaded")) as server:
        status, printed, _ = dvt("bench", "--url", server.url, *QUICK)
    assert status == 0
    assert "answered in time  0.00 %" in printed
    assert "none answered" in printed


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ((422, "invalid_request"), "so (invalid_request)"),
        (b"<html>", "which is not an answer of this server"),
        ({"outputs": []}, "which is not an answer of this server"),
        (answer(result(), result()), "which is not an answer of this server"),
    ],
)
def test_what_is_no_server_of_images_is_told_before_the_load(dvt: Run, standing: Any, said: Any, cause: str) -> None:
    with standing(lambda _: said) as server:
        status, printed, err = dvt("bench", "--url", server.url, *QUICK)
        assert server.asked == 1
    assert (status, printed) == (1, "")
    assert cause in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "cause"),
    [
        (["--url", "http://127.0.0.1:1"], 1, "no server answers at http://127.0.0.1:1"),
        (["--rate", "fast"], 2, "--rate is requests a second"),
        (["--rate", "-1"], 2, "numbers above 0"),
        (["--rate", "0"], 2, "numbers above 0"),
        (["--rate", "nan"], 2, "numbers above 0"),
        (["--rate", "inf"], 2, "numbers above 0"),
        (["--rate", "1x,2"], 2, "not both"),
        (["--rate", "1e9"], 2, "too many"),
        (["--rate", "1e-9"], 2, "not one request"),
        (["--arrivals", "monthly"], 2, "--arrivals is poisson, gamma, mmpp or even, not monthly"),
        (["--priority", "vip"], 2, "--priority is high"),
        (["--leaving", "0.7", "--slow", "0.7"], 2, "at most 1 together"),
        (["--clients", "2", "--rate", "5"], 2, "closed loop"),
        (["--rate", "1,2", "--arrivals", "gamma"], 2, "goes with neither"),
        (["--trace", "no-such-file.csv"], 2, "no-such-file.csv: no such file"),
        (["--out", "no-such-folder/x.html"], 2, "no-such-folder/x.html: no such folder"),
        (["no-such-folder", "--url", "STANDING"], 1, "no-such-folder: no such folder"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    dvt: Run, standing: Any, arguments: list[str], status: int, cause: str
) -> None:
    with standing() as server:
        told = [server.url if part == "STANDING" else part for part in arguments]
        code, out, err = dvt("bench", *told)
    assert (code, out) == (status, "")
    assert cause in err
    assert err.count("\n") == 1


def test_serving_imports_nothing_of_it() -> None:
    code = (
        "import sys; from server.__main__ import build; build(); import server.app, server.frontend.listener; "
        "print(sorted(n for n in sys.modules if n.startswith('server.bench') or n == 'aiohttp'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['server.bench', 'server.bench.command']"
