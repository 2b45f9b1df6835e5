"""The examples for Ray, on a real Ray of one machine: `make ray-test`. Skipped where Ray is not installed."""

from __future__ import annotations

import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="Ray is not installed: make ray-test")

with warnings.catch_warnings(action="ignore"):  # Ray's own use of its libraries
    import ray
    import yaml
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from examples.ray_serve.dataset import classify
    from server.bench.photos import photos
    from server.core import ImageResult
    from server.offline.cascade import Cascade

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("default")
FILES = photos(24)
REFUSED = re.compile("the budget stays as it is: .*1e-06.*: the cheapest operating point costs")
CHEAP, DEAR = {"thresholds": [0.3, 0.3]}, {"thresholds": [0.8, 0.8]}


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    # One CPU for the replica, one for the actor of the data set, one for the tasks that read its files.
    ray.init(address="local", include_dashboard=False, num_cpus=3, object_store_memory=100 * 2**20)
    yield
    serve.shutdown()
    ray.shutdown()


def deploy(url: str, budget: dict[str, Any]) -> None:
    """What `serve run` and `serve deploy` do with the example's file and this budget. Returns at once."""
    config = yaml.safe_load((ROOT / "examples/ray_serve/config.yaml").read_text())
    config["http_options"]["port"] = httpx.URL(url).port
    config["applications"][0]["deployments"][0]["user_config"]["budget"] = budget
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))


def within(seconds: float, holds: Any) -> float:
    """Until it holds: how long that took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)  # there is nothing to wait on: another process may change its mind at any time
    return time.monotonic() - began


def budget(url: str) -> dict[str, Any]:
    answer = httpx.get(f"{url}/budget")
    return answer.json() if answer.is_success else {}


@pytest.fixture(scope="module")
def url(_cluster: None) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": httpx.URL(url).port})
    deploy(url, CHEAP)

    def up() -> bool:
        try:
            return budget(url).get("thresholds") == [0.3, 0.3, 0.0]
        except httpx.TransportError:
            return False

    within(60, up)
    yield url
    serve.delete("dvt")


def exits_alone(target: dict[str, Any]) -> list[int]:
    """By the cascade in this process."""
    with Cascade.open(target=target) as cascade:
        answers = [answer for _, answer in cascade.classify(enumerate(FILES))]
    assert all(isinstance(answer, ImageResult) for answer in answers)
    return [answer.exit for answer in answers if isinstance(answer, ImageResult)]


def ask(url: str, file: bytes, client: httpx.Client | None = None) -> httpx.Response:
    post = client.post if client is not None else httpx.post
    return post(f"{url}/classify?timeout_ms=20000", content=file, headers={"content-type": "image/jpeg"}, timeout=30)


def test_a_replica_answers_as_the_server_does(url: str) -> None:
    answers = [ask(url, file).json() for file in FILES]
    assert [answer["results"][0]["exit"] for answer in answers] == exits_alone(CHEAP)
    handle = serve.get_app_handle("dvt")
    by_handle = handle.classify.remote(FILES[0], top_k=1).result()
    assert by_handle["results"][0]["predictions"] == answers[0]["results"][0]["predictions"][:1]


def test_what_is_no_image_is_a_problem_document(url: str) -> None:
    answer = ask(url, b"no image")
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json()["code"] == "bad_image"
    assert answer.headers.get_list("x-request-id") == [answer.json()["request_id"]]


def test_the_budget_is_not_set_by_http_where_one_replica_would_hear_of_it(url: str) -> None:
    assert httpx.put(f"{url}/budget", json=DEAR).status_code == 405
    assert budget(url)["thresholds"] == [0.3, 0.3, 0.0]


def test_user_config_moves_the_budget_of_a_replica_that_runs_and_no_request_fails(url: str) -> None:
    asked, failed, versions, stop = [0], [], set(), threading.Event()

    def client(number: int) -> None:
        with httpx.Client() as http:
            while not stop.is_set():
                answer = ask(url, FILES[number % len(FILES)], http)
                asked[0] += 1
                if answer.is_error:
                    failed.append(answer.text)
                else:
                    versions.add(answer.json()["budget_version"])

    took = []
    first = budget(url)["version"]
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(client, number) for number in range(8)]
        try:
            for change in range(6):
                target = DEAR if change % 2 == 0 else CHEAP
                wanted = [*target["thresholds"], 0.0]
                deploy(url, target)
                took.append(within(30, lambda wanted=wanted: budget(url).get("thresholds") == wanted))
        finally:
            stop.set()
    assert [task.exception() for task in running] == [None] * 8
    print(f"\n{asked[0]} requests, {len(failed)} failed; changes in force after {[round(s, 2) for s in took]} s")
    assert failed == []
    # The same replica: a new one would have begun to count anew.
    assert versions <= set(range(first, first + 7))
    assert budget(url)["version"] == first + 6


def test_a_budget_that_cannot_be_leaves_the_replica_and_its_budget(url: str) -> None:
    before = budget(url)
    deploy(url, {"gmacs": 1e-6})
    within(30, lambda: REFUSED.search(logged()))
    after = budget(url)
    assert (after["version"], after["target"]) == (before["version"], before["target"])
    deploy(url, DEAR)  # and the next one is heard
    within(30, lambda: budget(url)["version"] == before["version"] + 1)


def logged() -> str:
    """What replicas said, by Ray's files."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    return "".join(file.read_text() for file in folder.glob("logs/serve/replica_*.log"))


def test_a_data_set_gets_the_answers_of_the_cascade(tmp_path: Path) -> None:
    for number, file in enumerate(FILES):
        (tmp_path / f"{number:02d}.jpg").write_bytes(file)
    (tmp_path / "no-image.jpg").write_bytes(b"no image")
    rows = sorted(classify(str(tmp_path), target=DEAR).take_all(), key=lambda row: row["path"])
    assert [row["exit"] for row in rows] == [*exits_alone(DEAR), 0]
    assert [bool(row["error"]) for row in rows] == [False] * len(FILES) + [True]
