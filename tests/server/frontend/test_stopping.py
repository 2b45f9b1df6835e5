"""The end of a server in a process of its own: prompt where all is well, bounded where something hangs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from server.bundle.manifest import Bundle
from server.bundle.profile import LatencyProfile, LiveProfile
from server.frontend import images

Photo = Callable[..., bytes]

SERVER = textwrap.dedent(
    """
    import sys, threading
    from server import process
    from server.app import create_app
    from server.budget.store import MemoryStore
    from server.bundle.manifest import Bundle
    from server.engines.fake import FakeEngine
    from server.frontend import address, images, listener
    from server.settings import read_settings

    hangs = sys.argv[2]

    def hang(*_):
        threading.Event().wait()

    class Engine(FakeEngine):
        if hangs == "warm-up":
            warm_up = hang
        if hangs == "close":
            close = hang

        def run(self, batch):
            return hang() if hangs == "engine" else super().run(batch)

    class Store(MemoryStore):
        if hangs == "sync":
            sync = hang
        if hangs == "loop":
            save = hang

    if hangs == "decode":
        images._large_image.acquire()  # somebody else's turn, and no end of it
    process.log_to_stderr("info")
    process.hear_stop(lambda _: process.leave(0))
    settings = read_settings(
        {"port": 0, "state_dir": None, "executors": 1, "decode_threads": 1, "profile_seconds": 0, "audit_fraction": 0}
    )
    bound = address.bind(settings)
    app = create_app(settings, Bundle.load(sys.argv[1]), Engine(num_classes=10))
    app.state.service.budget._store = Store()
    if hangs == "warm-up":
        process.say("warming up")
    well = listener.run(app, settings, bound, lambda: process.say(address.url_of(bound)), end_s=0.5)
    process.leave(0 if well else 1)
    """
)


class Running:
    """A server in a process of its own, and what it said."""

    def __init__(self, bundle: Bundle, hangs: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(bundle.path), hangs],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "DVT_DRAIN_TIMEOUT_S": "0.2", "DVT_STALL_TIMEOUT_S": "0.1", **environment},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)

    def ended(self) -> tuple[int, str, float]:
        """Exit status, the log, and the seconds from now to the end."""
        began = time.monotonic()
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, log, time.monotonic() - began


@pytest.fixture
def running(bundle: Bundle) -> Iterator[Callable[..., Running]]:
    servers: list[Running] = []

    def start(hangs: str = "nothing", **environment: str) -> Running:
        servers.append(Running(bundle, hangs, **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.communicate()


def large() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((2200, 2200, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def provoke(client: httpx.Client, hangs: str, photo: Photo) -> None:
    """Let happen what hangs; nobody waits for its end."""
    if hangs in ("engine", "decode"):
        body = large() if hangs == "decode" else photo(255)
        answer = client.post(
            "/classify", params={"timeout_ms": 50}, content=body, headers={"content-type": "image/png"}
        )
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    elif hangs == "sync":
        assert client.put("/budget", json={"thresholds": [0.5, 0.5]}).status_code == 200
    elif hangs == "loop":
        with pytest.raises(httpx.ReadTimeout):
            client.put("/budget", json={"thresholds": [0.5, 0.5]}, timeout=0.2)


HANGS = [
    ("engine", "a batch of stage 1, in the engine for "),
    ("decode", "the thread decode-large, at one image for "),
    ("sync", "the sync of the stored budget to the disk"),
    ("loop", "the event loop, in "),
    ("close", "the event loop, in "),
]


@pytest.mark.parametrize(("hangs", "told"), HANGS)
def test_whatever_hangs_the_process_ends_in_time_and_one_line_says_what_it_was(
    running: Callable[..., Running], photo: Photo, hangs: str, told: str
) -> None:
    server = running(hangs)
    with server.client() as client:
        provoke(client, hangs, photo)
    server.process.send_signal(signal.SIGTERM)
    status, log, seconds = server.ended()
    assert status == 1
    (line,) = [line for line in log.splitlines() if " CRITICAL " in line]
    assert f"the process ends, and does not wait for {told}" in line
    assert "Traceback" not in log
    assert seconds < 10, "not for ever; how long exactly is the machine's matter"


def test_a_second_signal_ends_the_delay_and_the_drain_and_a_third_one_the_process(
    running: Callable[..., Running], photo: Photo
) -> None:
    server = running("engine", DVT_DRAIN_TIMEOUT_S="3600", DVT_DRAIN_DELAY_S="600")
    with server.client() as client:
        provoke(client, "engine", photo)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.stderr is not None
    while "stopping" not in server.process.stderr.readline():
        pass
    server.process.send_signal(signal.SIGTERM)
    status, log, seconds = server.ended()
    assert (status, log.count("CRITICAL")) == (1, 1)
    assert seconds < 10


def test_a_third_signal_waits_for_nothing(running: Callable[..., Running], photo: Photo) -> None:
    server = running("loop", DVT_DRAIN_TIMEOUT_S="3600", DVT_DRAIN_DELAY_S="600")
    with server.client() as client:
        provoke(client, "loop", photo)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # of one kind, those that come at once are one
        server.process.send_signal(number)
    status, log, seconds = server.ended()
    assert (status, log.count("CRITICAL")) == (1, 1)
    assert seconds < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_during_the_warm_up_is_prompt_and_nothing_says_that_it_listens(
    running: Callable[..., Running], number: signal.Signals
) -> None:
    server = running("warm-up")
    assert server.url == "warming up"
    server.process.send_signal(number)
    out, log = server.process.communicate(timeout=30)
    assert (server.process.returncode, out) == (0, "")
    assert "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_signal_that_asks_to_stop_drains(
    running: Callable[..., Running], photo: Photo, number: signal.Signals
) -> None:
    server = running()
    with server.client() as client:
        answer = client.post("/classify", content=photo(255), headers={"content-type": "image/png"})
        assert answer.status_code == 200
    server.process.send_signal(number)
    status, log, _ = server.ended()
    assert status == 0
    assert re.findall(r"(?:INFO|WARNING|ERROR|CRITICAL) (.*)", log) == ["server.frontend.listener: stopping"]


def test_a_hangup_is_left_alone_where_it_is_ignored(running: Callable[..., Running], photo: Photo) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does it
    try:
        server = running()
    finally:
        signal.signal(signal.SIGHUP, before)
    server.process.send_signal(signal.SIGHUP)
    with server.client() as client:
        answer = client.post("/classify", content=photo(255), headers={"content-type": "image/png"})
        assert answer.status_code == 200
        assert client.get("/readyz").status_code == 200


def test_the_waiters_are_answered_before_the_process_leaves_a_wedged_engine_behind(
    running: Callable[..., Running], photo: Photo
) -> None:
    server = running("engine", DVT_STALL_TIMEOUT_S="600")
    answers: list[httpx.Response] = []

    def wait() -> None:
        with server.client() as client:
            ask = {"content": photo(255), "headers": {"content-type": "image/png"}}
            answers.append(client.post("/classify", params={"timeout_ms": 30000}, **ask))

    waiter = threading.Thread(target=wait)
    waiter.start()
    with server.client() as client:
        while 'dvt_oldest_run_seconds{threads="executor"} 0.0' in client.get("/metrics").text:
            pass
    server.process.send_signal(signal.SIGTERM)
    waiter.join()
    assert (answers[0].status_code, answers[0].json()["code"]) == (503, "draining")
    assert server.ended()[0] == 1


async def status(served: Any, path: str) -> int:
    """Of a probe, after the loop had a turn."""
    await asyncio.sleep(0)
    return (await served.http.get(path)).status_code


async def test_a_batch_that_does_not_come_back_fails_the_probes_until_it_does(
    serve: Any, engine: Any, photo: Photo
) -> None:
    async with serve(stall_timeout_s=0.02) as served:
        engine.gates[1].clear()
        while not served.service.batcher.out:  # on a busy machine a deadline may come before its batch
            late = await served.classify(photo(255), params={"timeout_ms": 10})
            assert late.status_code == 504
        while await status(served, "/livez") == 200:
            pass
        for probe in (await served.http.get("/livez"), await served.http.get("/readyz")):
            assert probe.status_code == 503
            problem = json.loads(probe.content)
            assert problem["code"] == "not_ready"
            assert re.fullmatch(r"Stalled: a batch of stage 1, in the engine for [0-9.]+ s", problem["detail"])
        assert await served.metric("dvt_stalled_threads", threads="executor") == 1
        assert await served.metric("dvt_oldest_run_seconds", threads="executor") >= 0.02
        assert await served.metric("dvt_ready") == 0
        refused = await served.classify(photo(255))
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert "retry-after" in refused.headers

        engine.open_gates()
        while served.service.batcher.out:
            await status(served, "/metrics")
        for path in ("/livez", "/readyz"):
            assert await status(served, path) == 200
        assert await served.metric("dvt_stalled_threads", threads="executor") == 0
        assert await served.metric("dvt_oldest_run_seconds", threads="executor") == 0
        assert (await served.classify(photo(255))).status_code == 200


async def test_while_one_executor_works_requests_are_taken(serve: Any, engine: Any, photo: Photo) -> None:
    async with serve(stall_timeout_s=0.02, executors=2) as served:
        engine.gates[2].clear()
        while not served.service.batcher.out:
            late = await served.classify(photo(10, 255), params={"timeout_ms": 10})
        assert late.json()["results"][0]["degraded"]
        while await status(served, "/livez") == 200:
            pass
        assert (await served.classify(photo(255))).status_code == 200


async def test_a_slow_batch_that_is_known_to_be_slow_is_no_stall(serve: Any, engine: Any, photo: Photo) -> None:
    async with serve(stall_timeout_s=0.02) as served:
        served.service.machine.profile = LiveProfile(LatencyProfile.lines([60.0] * 3, [1.0] * 3))
        engine.gates[1].clear()
        while not served.service.batcher.out:
            await served.classify(photo(255), params={"timeout_ms": 10})
        while await served.metric("dvt_oldest_run_seconds", threads="executor") < 0.1:
            assert await status(served, "/livez") == 200


async def test_a_decoding_thread_that_hangs_fails_the_probes_and_holds_nobody_up(serve: Any, photo: Photo) -> None:
    async with serve(stall_timeout_s=0.02, decode_threads=2) as served:
        with images._large_image:
            late = await served.classify(large(), params={"timeout_ms": 30})
            assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
            while await status(served, "/livez") == 200:
                pass
            alive = await served.http.get("/livez")
            assert re.fullmatch(r"Stalled: the thread decode-large, at one image for [0-9.]+ s", alive.json()["detail"])
            assert await served.metric("dvt_stalled_threads", threads="decode") == 1
            assert (await served.classify(photo(255))).status_code == 200
        while served.service.decoder.out:
            await status(served, "/metrics")
        assert await status(served, "/livez") == 200


async def test_a_stall_is_logged_once_and_so_is_its_end(
    serve: Any, engine: Any, photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(stall_timeout_s=0.02) as served:
        engine.gates[1].clear()
        while not served.service.batcher.out:
            await served.classify(photo(255), params={"timeout_ms": 10})
        while "stalled: a batch of stage 1" not in caplog.text:
            await status(served, "/metrics")
        for _ in range(2):
            served.service._tick()
        engine.open_gates()
        while "has come back" not in caplog.text:
            await status(served, "/metrics")
        assert [record.levelname for record in caplog.records if record.name == "server.service"] == [
            "ERROR",
            "WARNING",
        ]
