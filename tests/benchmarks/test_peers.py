"""The race, in small, with a peer that needs no environment of its own. No real peer is needed here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import page, triton
from benchmarks.peers.__main__ import main
from benchmarks.peers.ours import Ours
from benchmarks.peers.peer import Contender, Peer, PeerFailed, Task
from server.bundle.manifest import Bundle

pytestmark = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (apt-get install wrk)")

FAKE = Path(__file__).with_name("fake_peer.py")
SHORT = ("--rounds", "1", "--seconds", "1", "--open-seconds", "0.3", "--loads", "0.5,2", "--clients", "2")


class Ready(Peer):
    """It runs where the tests run."""

    def install(self) -> None:
        pass

    def versions(self) -> dict[str, str]:
        return {"fake": "1.0"}


class NotToBeHad(Ready):
    def install(self) -> None:
        raise PeerFailed("could not be installed: no wheel for this machine")


def command(peer: Peer, task: Task, folder: Path, port: int) -> Sequence[str | Path]:
    del peer, task, folder, port
    return [sys.executable, FAKE]


FAKE_PEER = Ready(name="fake", requirements=(), command=command, path="/", about="One of its kind.")

Race = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def race(bundle: Bundle, tmp_path: Path) -> Race:
    def race(*contenders: Contender, more: Sequence[str] = ()) -> tuple[int, dict[str, Any]]:
        where = ["--bundle", str(bundle.path), "--images", "6", "--out", str(tmp_path)]
        status = main([*where, *SHORT, *more], contenders)
        return status, json.loads(next(tmp_path.glob("peers_*.json")).read_text())

    return race


def test_a_race_measures_every_contender_and_writes_a_page(race: Race, tmp_path: Path) -> None:
    absent = NotToBeHad("absent", (), command, "/", "Not here.")
    status, results = race(Ours(), FAKE_PEER, absent, more=("--modes", "cascade", "budget"))
    assert status == 0
    figures = results["figures"]
    assert figures["not_raced"] == {"absent": "could not be installed: no wheel for this machine"}
    assert set(figures["contenders"]) == {"ours cascade", "ours budget", "fake cascade"}
    for told in figures["contenders"].values():
        assert told["row"]["images_per_s"] > 0
        assert told["row"]["cpu_ms"] > 0
        assert told["row"]["memory_mb"] > 0
        assert [level["load"] for level in told["open"][0]["levels"]] == [0.5, 2.0]
        assert told["closed"][0]["bad"]["status"] in (400, 422)
        assert told["closed"][0]["bad"]["spoilt"] == 0
        assert told["open"][0]["stop"]["answered"] > 0
    # Both say how many images each stage ran; the fake one has no batches, and runs what nobody waits for.
    assert figures["contenders"]["fake cascade"]["closed"][0]["fill"][0] == 1
    assert figures["contenders"]["fake cascade"]["open"][0]["left"]["images_run"][0] > 0
    text = next(tmp_path.glob("peers_*.md")).read_text()
    for words in (
        "| ours cascade |",
        "| fake cascade |",
        "**fake**. One of its kind. (fake 1.0)",
        "**absent**: could not",
    ):
        assert words in text
    assert {file.suffix for file in tmp_path.glob("peers_*_*.svg")} == {".svg"}


def test_a_peer_that_serves_another_model_is_found_out(race: Race) -> None:
    wrong = replace(FAKE_PEER, variables={"FAKE_FAULT": "1"})
    status, results = race(wrong, more=("--modes", "cascade", "--open-rounds", "0"))
    assert status == 1
    assert "fake cascade: answers that are not the engine's: 6" in results["broken"]


def test_a_peer_that_does_not_start_is_named_with_its_last_words(race: Race) -> None:
    def broken(*_: object) -> Sequence[str | Path]:
        return [sys.executable, "-c", "raise SystemExit('no such model')"]

    _, results = race(replace(FAKE_PEER, name="mute", command=broken), more=("--modes", "full"))
    assert "no such model" in results["figures"]["not_raced"]["mute full"]
    assert results["figures"]["contenders"] == {}


@pytest.mark.parametrize(
    ("in_time", "goodput"), [((1, 1, 1), 400), ((1, 0.98, 1), 100), ((0.5, 1, 1), 0), ((1, 0.99, 0), 200)]
)
def test_goodput_is_the_highest_rate_below_the_first_that_fails(in_time: Sequence[float], goodput: float) -> None:
    levels = [{"load": n, "rate": 100 * 2**n, "in_time": part} for n, part in enumerate(in_time)]
    assert page.goodput(levels[::-1]) == goodput


def test_triton_is_configured_in_the_text_of_its_protocol_buffers() -> None:
    message = {
        "name": "stage1",
        "max_batch_size": 4,
        "input": [{"data_type": "TYPE_FP32", "dims": [2, 3]}],
        "queue": {},
    }
    assert triton.protobuf_text(message) == (
        'name: "stage1"\nmax_batch_size: 4\ninput {\n  data_type: TYPE_FP32\n  dims: 2\n  dims: 3\n}\nqueue {\n}\n'
    )
