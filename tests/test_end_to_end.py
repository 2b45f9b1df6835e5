"""The whole line: a micro DVT, trained a few steps, exported, calibrated, served by a real process, asked by real
clients over HTTP and from the command line."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from server.bundle.manifest import EMBEDDED, Bundle

COLOURS = {"blue": (0, 0, 100), "green": (0, 100, 0), "red": (100, 0, 0), "white": (80, 80, 80)}


def dvt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def picture(name: str, seed: int = 99) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 150, (60, 80, 3)) + COLOURS[name]
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def url(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the micro bundle; it must end well when told to stop."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", str(micro_bundle), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "DVT_STATE_DIR": str(tmp_path_factory.mktemp("state"))},
    )
    assert process.stdout is not None
    found = None
    for line in process.stdout:
        if found := re.search(r"Listening on (\S+)", line):
            break
    assert found, "the server ended before it listened"
    yield found[1]
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait(timeout=30) == 0


def test_photos_are_classified_and_the_budget_moves_the_exit(url: str, micro_bundle: Path) -> None:
    with httpx.Client(base_url=url) as client:
        model = client.get("/model").json()
        assert (model["name"], model["labels"]) == ("micro-dvt", list(COLOURS))
        exits = {}
        for thresholds in ([0.0, 0.0], [1.0, 0.0], [1.0, 1.0]):
            budget = client.put("/budget", json={"thresholds": thresholds}).json()
            answers = []
            for name in COLOURS:
                answer = client.post("/classify", content=picture(name), headers={"content-type": "image/png"}).json()
                assert answer["budget_version"] == budget["version"]
                (result,) = answer["results"]
                assert result["predictions"][0]["label"] == name
                answers.append(result)
            exits[tuple(thresholds)] = {result["exit"] for result in answers}
        assert exits == {(0.0, 0.0): {1}, (1.0, 0.0): {2}, (1.0, 1.0): {3}}
        gmacs = Bundle.load(micro_bundle).manifest.stage_gmacs
        assert answers[0]["gmacs"] == pytest.approx(gmacs[2])


def test_one_request_of_many_images_is_answered_in_their_order(url: str) -> None:
    names = ["red", "blue", "red", "white", "green"]
    files = [("image", (f"{i}.png", picture(name, seed=i), "image/png")) for i, name in enumerate(names)]
    results = httpx.post(f"{url}/classify", files=files).json()["results"]
    assert [result["predictions"][0]["label"] for result in results] == names


def test_the_command_line_classifies_and_sets_the_budget(url: str, tmp_path: Path) -> None:
    photo = tmp_path / "red.png"
    photo.write_bytes(picture("red"))
    classified = dvt("classify", str(photo), "--url", url)
    assert classified.returncode == 0, classified.stderr
    assert re.search(r"^red.png +red ", classified.stdout, re.MULTILINE)
    changed = dvt("budget", "thresholds=0.5,0.5", "--url", url)
    assert changed.returncode == 0, changed.stderr
    assert httpx.get(f"{url}/budget").json()["thresholds"] == [0.5, 0.5, 0.0]
    refused = dvt("budget", "gmacs=0.0000001", "--url", url)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_a_load_finds_what_the_server_counted(url: str, image_folder: Path) -> None:
    def counted() -> Counter[str]:
        lines = re.findall(r"^dvt_requests_total{(.*)} (\S+)$", httpx.get(f"{url}/metrics").text, re.M)
        found: Counter[str] = Counter()
        for labels, number in lines:
            if 'route="/classify"' in labels:
                found[re.findall(r'status="(\d+)"', labels)[0]] += int(float(number))
        return found

    before = counted()
    load = ("--rate", "60", "--seconds", "1", "--timeout-ms", "10000", "--together", "2", "--processes", "2")
    loaded = dvt("bench", str(image_folder), "--url", url, *load, "--json")
    assert loaded.returncode == 0, loaded.stderr
    document = json.loads(loaded.stdout)
    requests, images = document["requests"], document["images"]
    assert requests["sent"] == requests["answered"] == requests["in_time"] > 20
    assert images["labelled"] == images["answered"] == sum(images["by_exit"].values()) == 2 * requests["sent"]
    assert images["correct_in_time_share"] == images["accuracy"] > 0.8
    assert document["server"]["after"]["budget"]["observed"]["images"] > 0
    tried = 1  # to see whether it answers
    assert counted()["200"] - before.get("200", 0) == requests["sent"] + requests["warm_up"] + tried
    assert requests["sent"] + requests["warm_up"] == requests["planned"]


def test_the_embedded_model_is_in_order_and_small_enough_to_ship(tmp_path: Path) -> None:
    checked = dvt("serve", "--dry-run", DVT_STATE_DIR=str(tmp_path))
    assert checked.returncode == 0, checked.stderr
    assert "photo10" in checked.stdout
    bundle = Bundle.load(EMBEDDED)
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= 25e6
    grids = [stage.grid for stage in bundle.manifest.stages]
    assert len(grids) == 3
    assert grids == sorted(grids)


def test_nothing_is_told_to_others_nor_left_in_the_users_home(tmp_path: Path) -> None:
    # In continuous integration ONNX Runtime tells nothing anyway.
    outside = dict.fromkeys(("CI", "XDG_CACHE_HOME", "XDG_STATE_HOME"), "") | {"HOME": str(tmp_path)}
    checked = dvt("serve", "--dry-run", **outside)
    assert checked.returncode == 0, checked.stderr
    assert list(tmp_path.rglob("*")) == []


def test_the_embedded_model_sees_a_landscape_in_the_example_picture() -> None:
    from server.core import StageBatch
    from server.engines import load_engine
    from server.frontend.images import ImageLimits, decode

    bundle = Bundle.load(EMBEDDED)
    engine = load_engine(bundle)
    example = Path(__file__).parents[1] / "docs" / "example.jpg"
    pixels = decode(example.read_bytes(), "image/jpeg", bundle.preprocessing, ImageLimits())
    output = engine.run(StageBatch(1, [pixels], [], [0.0]))
    engine.close()
    assert bundle.manifest.labels[int(output.probabilities[0].argmax())] == "landscape"
