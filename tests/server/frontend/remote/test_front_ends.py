"""Front ends in processes of their own, around an engine in this one: answers, limits, deaths, the end."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from server.frontend.front import Phase
from server.frontend.remote import records
from server.frontend.remote.fleet import MAX_DEATHS, share_of
from server.frontend.remote.records import Kind
from server.settings import Settings

Photo = Callable[..., bytes]
SURE, UNSURE = 255, 10
PNG = {"content-type": "image/png"}
WITHIN_S = 60.0  # whatever is waited for: the machine may be slow, but it does not hang


@pytest.fixture(autouse=True)
async def _in_time() -> AsyncIterator[None]:
    task = asyncio.current_task()
    assert task is not None
    late = asyncio.get_running_loop().call_later(WITHIN_S, os.kill, os.getpid(), signal.SIGALRM)
    yield
    late.cancel()


def client(here: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{here.port}", timeout=WITHIN_S)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not holds():
            await asyncio.sleep(0.005)


def in_json(*files: bytes) -> dict[str, list[str]]:
    return {"images": [base64.b64encode(file).decode() for file in files]}


def processes(here: Any) -> list[int]:
    return sorted(one.process.pid for one in here.service.apart._running)


def slots_held(here: Any) -> int:
    return sum(len(one.link._held) for one in here.service.apart._running)


async def sample(http: httpx.AsyncClient, name: str, *labels: str) -> float:
    """The sum of the series of that name that have these labels."""
    lines = (await http.get("/metrics")).text.splitlines()
    found = [line.rpartition(" ") for line in lines if line.startswith(name)]
    return sum(float(value) for series, _, value in found if all(label in series for label in labels))


async def test_answers_are_those_of_one_process(listening: Any, serve: Any, photo: Photo) -> None:
    good, bad = photo(UNSURE, SURE, klass=3), b"\x89PNG\r\n\x1a\nno"
    asks: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/classify", {"content": good, "headers": PNG}),
        ("POST", "/classify?top_k=2&max_exit=1", {"content": good, "headers": PNG}),
        ("POST", "/classify?min_confidence=1", {"content": photo(9, 9, 9), "headers": PNG}),
        ("POST", "/classify?top_k=0", {"content": good, "headers": PNG}),
        ("POST", "/classify", {"json": in_json(good, photo(SURE, klass=4), good)}),
        ("POST", "/classify", {"json": in_json(good, bad)}),
        ("POST", "/classify", {"files": [("image", ("a.png", good, "image/png"))] * 2}),
        ("POST", "/classify", {"json": in_json(*[good] * 9)}),
        ("POST", "/classify", {"content": bad, "headers": PNG}),
        ("POST", "/classify", {"content": b"", "headers": PNG}),
        ("POST", "/classify", {"content": good, "headers": {"content-type": "text/plain"}}),
        ("POST", "/classify", {"content": bytes(2000), "headers": PNG}),
        ("POST", "/classify", {"content": good, "headers": {**PNG, "x-request-id": "mine"}}),
        ("POST", "/classify", {"content": good, "headers": {**PNG, "host": "evil.example"}}),
        ("GET", "/classify", {}),
        ("OPTIONS", "/classify", {}),
        ("GET", "/budget", {}),
        ("HEAD", "/budget", {}),
        ("PUT", "/budget", {"json": {"thresholds": [0.9, 0.9]}, "headers": {"if-match": '"99"'}}),
        ("PUT", "/budget", {"json": {"thresholds": [0.9, 0.9]}, "headers": {"origin": "http://evil.example"}}),
        ("PUT", "/budget", {"json": {"gmacs": 1e-9}}),
        ("PUT", "/budget", {"content": b"{", "headers": {"content-type": "application/json"}}),
        ("PUT", "/budget", {"content": bytes(20_000), "headers": {"content-type": "application/json"}}),
        ("POST", "/budget/preview", {"json": {"gmacs": 0.05}}),
        ("GET", "/model", {}),
        ("GET", "/frontier", {}),
        ("GET", "/livez", {}),
        ("GET", "/readyz", {}),
        ("GET", "/docs", {}),
        ("GET", "/docs/assets/swagger-ui-bundle.js", {}),
        ("GET", "/openapi.json", {}),
        ("GET", "/nothing", {"headers": {"host": "evil.example"}}),
        ("DELETE", "/nothing%20there", {}),
    ]
    settings = {"max_images": 8, "max_body_bytes": 1500}
    async with serve(**settings) as whole:
        expected = [told(await whole.http.request(method, path, **ask)) for method, path, ask in asks]
    async with listening(frontends=1, **settings) as here, client(here) as http:
        found = [
            told(
                await http.request(method, path, **{**ask, "headers": {"host": "localhost", **ask.get("headers", {})}})
            )
            for method, path, ask in asks
        ]
    for ask, one, other in zip(asks, found, expected, strict=True):
        assert one == other, ask


def told(response: httpx.Response) -> Any:
    """What is the same for all who ask the same."""
    headers = {name: response.headers.get(name) for name in ("content-type", "allow", "etag", "cache-control")}
    given = response.headers["x-request-id"] if response.headers["x-request-id"] == "mine" else ""
    if "json" not in (headers["content-type"] or "") or not response.content:
        return response.status_code, headers, given, response.content
    document = response.json()
    for name in ("request_id", "observed", "drift", "traffic"):  # what is counted behind an answer comes when it comes
        document.pop(name, None)
    (document.get("fleet") or {}).pop("set_at", None)
    for result in document.get("results", []):
        result["timing_ms"] = sorted(result["timing_ms"])
    return response.status_code, headers, given, document


async def test_one_budget_and_one_page_of_metrics_whoever_is_asked(listening: Any, engine: Any, photo: Photo) -> None:
    async with listening(frontends=2) as here:
        pids = processes(here)
        # Connections of their own, until both have some.
        clients = [client(here) for _ in range(12)]
        versions = {(await http.get("/budget")).json()["version"] for http in clients}
        new = (await clients[0].put("/budget", json={"thresholds": [1.0, 0.5]})).json()["version"]
        assert versions == {new - 1}
        answers = [await http.post("/classify", content=photo(200, SURE), headers=PNG) for http in clients]
        assert {(one.status_code, one.json()["budget_version"]) for one in answers} == {(200, new)}
        assert {one.json()["results"][0]["exit"] for one in answers} == {2}
        refused = await clients[1].post("/classify", content=b"none", headers=PNG)
        assert refused.status_code == 400
        assert await sample(clients[2], "dvt_requests_total", 'route="/classify"') == 13
        assert await sample(clients[3], 'dvt_refused_total{code="bad_image"') == 1
        assert await sample(clients[3], "dvt_images_total") == 12
        assert await sample(clients[4], "dvt_decode_seconds_count") == 12
        assert await sample(clients[5], "dvt_connections") == 12
        assert await sample(clients[5], "dvt_frontends") == 2
        assert (await clients[6].get("/budget")).json()["observed"]["images"] == 12
        for http in clients:
            await http.aclose()
        assert processes(here) == pids
        engine.batches.clear()
        await until(lambda: slots_held(here) == 0)


async def test_a_killed_front_end_costs_its_own_connections_and_nothing_else(
    listening: Any, engine: Any, photo: Photo
) -> None:
    async with listening(frontends=2, timeout_ms=30000) as here:
        engine.gates[2].clear()
        victim, other = here.service.apart._running
        lines: list[Any] = []
        while not (victim.link.waiting and other.link.waiting):  # both take connections, in the end
            lines.append(await here.connect())
            lines[-1].send(photo(UNSURE, SURE))
            await until(lambda: len(victim.link.waiting) + len(other.link.waiting) == len(lines))
        lost, kept = len(victim.link.waiting), len(other.link.waiting)
        os.kill(victim.process.pid, signal.SIGKILL)
        await until(lambda: victim not in here.service.apart._running)
        engine.open_gates()
        ends = [await outcome(line) for line in lines]
        assert (ends.count(200), ends.count(0)) == (kept, lost)
        await until(lambda: here.service.apart.count == 2)
        assert victim.process.pid not in processes(here)
        async with client(here) as http:
            assert await sample(http, "dvt_frontend_restarts_total") == 1
            assert await sample(http, "dvt_requests_total", 'route="/classify"', 'status="200"') == kept
            assert await sample(http, 'dvt_images_abandoned_total{reason="disconnect"}') == lost
            assert await sample(http, "dvt_requests_in_flight") == 0
            assert (await http.post("/classify", content=photo(SURE), headers=PNG)).status_code == 200
        engine.batches.clear()
        await until(lambda: not victim.link._held)
        assert engine.slots_in_use == 0
        assert slots_held(here) == 0


async def outcome(line: Any) -> int:
    """The status of an answer; 0 where the connection broke."""
    try:
        status: int = (await line.answer()).status
        return status
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0


async def test_what_the_dead_one_had_counted_stays_counted(listening: Any, photo: Photo) -> None:
    async with listening(frontends=1) as here:
        async with client(here) as http:
            for _ in range(3):
                await http.post("/classify", content=photo(SURE), headers=PNG)
        os.kill(processes(here)[0], signal.SIGKILL)
        await until(lambda: here.service.apart.count == 0)
        await until(lambda: here.service.apart.count == 1)
        async with client(here) as http:
            await http.post("/classify", content=photo(SURE), headers=PNG)
            assert await sample(http, "dvt_requests_total", 'route="/classify"', 'status="200"') == 4


async def test_connections_that_wait_to_be_accepted_outlive_a_front_end(listening: Any, photo: Photo) -> None:
    async with listening(frontends=1, timeout_ms=30000) as here:
        (pid,) = processes(here)
        os.kill(pid, signal.SIGSTOP)
        lines = [await here.connect() for _ in range(5)]
        for line in lines:
            line.send(photo(SURE))
        os.kill(pid, signal.SIGKILL)
        assert [(await line.answer()).status for line in lines] == [200] * 5


async def test_a_front_end_that_says_what_cannot_be_is_replaced(
    listening: Any, photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(frontends=1) as here:
        (one,) = here.service.apart._running
        one.link.data_received(b"\x01\xff" + bytes(10))
        await until(lambda: one not in here.service.apart._running)
        await until(lambda: here.service.apart.count == 1)
        async with client(here) as http:
            assert (await http.post("/classify", content=photo(SURE), headers=PNG)).status_code == 200
        assert "said what cannot be" in caplog.text


@pytest.mark.parametrize(
    ("slots", "deadline_s", "arrived_s"),
    [([10**6], 1.0, 0.0), ([0, 0], 1.0, 0.0), ([0], 1e9, 0.0), ([0], 1.0, 100.0), ([0], 1.0, -1e9)],
)
async def test_slots_and_times_that_cannot_be_end_the_link_and_hurt_nobody(
    listening: Any, engine: Any, slots: list[int], deadline_s: float, arrived_s: float
) -> None:
    async with listening(frontends=1) as here:
        (one,) = here.service.apart._running
        now = here.service.clock()
        terms = records.Terms(now + deadline_s, now + arrived_s, 0.0, None, 1, None)
        one.link.data_received(records.submit(1, slots, terms))
        await until(lambda: one not in here.service.apart._running)
        assert here.service.batcher.healthy
        engine.batches.clear()
        await until(lambda: not one.link._held)


async def test_a_slot_that_is_read_here_cannot_be_given_a_second_time(
    listening: Any, engine: Any, photo: Photo
) -> None:
    async with listening(frontends=1) as here:
        engine.gates[1].clear()
        line = await here.connect()
        line.send(photo(SURE))
        await until(lambda: slots_held(here) == 1)
        (one,) = here.service.apart._running
        (slot,) = one.link._held
        now = here.service.clock()
        one.link.data_received(records.submit(77, [slot], records.Terms(now + 1, now, 0.0, None, 1, None)))
        await until(lambda: one not in here.service.apart._running)
        assert len(one.link._held) == 1, "the engine still reads it"
        engine.open_gates()
        engine.began.acquire()
        await until(lambda: not here.service.batcher.out)
        engine.batches.clear()
        await until(lambda: not one.link._held)


async def test_hang_ups_free_slots_and_leave_the_queue(listening: Any, engine: Any, photo: Photo) -> None:
    async with listening(frontends=1) as here:
        engine.gates[1].clear()
        lines = [await here.connect() for _ in range(6)]
        for line in lines:
            line.send(photo(SURE))
        await until(lambda: slots_held(here) == 6)
        for line in lines[1:]:
            line.close()
        await until(lambda: here.service.batcher.load.waiting == (0, 0, 0))
        engine.open_gates()
        assert (await lines[0].answer()).status in (200, 504)
        await until(lambda: not here.service.batcher.out)
        engine.batches.clear()
        await until(lambda: slots_held(here) == 0)


async def test_a_full_queue_refuses_and_so_does_the_door_of_the_front_end(
    listening: Any, engine: Any, photo: Photo
) -> None:
    async with (
        listening(frontends=1, max_queued_images=4, max_images=4, timeout_ms=30000) as here,
        client(here) as http,
    ):
        engine.gates[1].clear()
        held = asyncio.create_task(http.post("/classify", content=photo(SURE), headers=PNG))
        await until(lambda: bool(here.service.batcher.out))
        waiting = asyncio.create_task(http.post("/classify", json=in_json(*[photo(SURE)] * 4)))
        await until(lambda: here.service.batcher.load.waiting[0] == 4)
        for _ in range(3):  # by the batcher or, once it has heard of it, by the front end
            full = await http.post("/classify", content=photo(SURE), headers=PNG)
            assert (full.status_code, full.json()["code"]) == (503, "overloaded")
            assert "retry-after" in full.headers
        high = await asyncio.wait_for(
            http.post("/classify?priority=high&timeout_ms=50", content=photo(SURE), headers=PNG), WITHIN_S
        )
        assert high.status_code == 504, "it took the place of the lower one, and waited"
        assert (await waiting).json()["detail"] == "gave way to a request of higher priority"
        engine.open_gates()
        assert (await held).status_code == 200
        assert (await http.post("/classify", content=photo(SURE), headers=PNG)).status_code == 200


async def test_large_requests_that_together_are_more_than_the_memory_are_refused_not_stuck(
    listening: Any, engine: Any, photo: Photo
) -> None:
    settings = {"max_queued_images": 16, "max_images": 16, "max_slots": 4, "max_queued_decodes": 1000}
    async with listening(frontends=1, **settings, timeout_ms=30000) as here, client(here) as http:
        many = in_json(*[photo(SURE)] * 16)
        for _ in range(3):
            answers = await asyncio.gather(*[http.post("/classify", json=many) for _ in range(12)])
            statuses = [one.status_code for one in answers]
            assert set(statuses) <= {200, 503}
            assert 200 in statuses
            engine.batches.clear()
        await until(lambda: slots_held(here) == 0)
        async with asyncio.timeout(WITHIN_S):
            while (await http.post("/classify", json=many)).status_code != 200:
                pass  # until the front end has been told that they are free


async def test_a_deadline_that_passes_in_the_engine_is_answered_and_its_pixels_stay_until_they_are_read(
    listening: Any, engine: Any, photo: Photo
) -> None:
    async with listening(frontends=1) as here, client(here) as http:
        engine.gates[1].clear()
        late = await http.post("/classify?timeout_ms=100", content=photo(SURE), headers=PNG)
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert slots_held(here) == 1
        engine.open_gates()
        await until(lambda: not here.service.batcher.out)
        engine.batches.clear()
        await until(lambda: slots_held(here) == 0)


async def test_a_front_end_that_stands_still_is_killed_when_somebody_asks_how_all_are(listening: Any) -> None:
    async with listening(frontends=2, stall_timeout_s=0.2) as here:
        (victim, other) = processes(here)
        os.kill(victim, signal.SIGSTOP)
        while victim in processes(here):
            await here.service.refresh()
            await asyncio.sleep(0.02)
        await until(lambda: here.service.apart.count == 2)
        assert other in processes(here)


async def test_front_ends_that_die_one_after_the_other_end_the_server(
    listening: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(frontends=1) as here:
        for _ in range(MAX_DEATHS):
            await until(lambda: bool(here.service.apart._running))
            for pid in processes(here):
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not here.service.apart._running)
        await asyncio.wait_for(here.task, WITHIN_S)
        assert here.server.failed
    assert f"{MAX_DEATHS} front ends have died" in caplog.text


async def test_one_that_dies_as_the_server_ends_is_waited_for(listening: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(frontends=1) as here:
        fleet = here.service.apart
        (one,) = fleet._running
        finished: list[asyncio.Task[None]] = []

        def ended(of: Any) -> None:  # the end comes before the keeper has heard of the death
            type(fleet)._ended(fleet, of)
            for keeper in fleet._keepers:
                keeper.cancel()
            finished.append(asyncio.ensure_future(fleet.finish()))

        monkeypatch.setattr(fleet, "_ended", ended)
        one.process.kill()
        await until(lambda: bool(finished))
        await finished[0]
        assert one.process.returncode == -signal.SIGKILL


async def test_the_end_answers_what_was_accepted(listening: Any, engine: Any, photo: Photo) -> None:
    async with listening(frontends=2) as here:
        pids = processes(here)
        engine.gates[1].clear()
        lines = [await here.connect() for _ in range(8)]
        idle = await here.connect()
        for line in lines:
            line.send(photo(SURE))
        await until(lambda: sum(len(one.link.waiting) for one in here.service.apart._running) == 8)
        here.server.signalled(signal.SIGTERM)
        await until(lambda: here.service.phase is Phase.DRAINING)
        idle.send(photo(SURE))
        refused = await idle.answer()
        assert (refused.status, refused.code) == (503, "draining")
        engine.open_gates()
        answers = [await line.answer() for line in lines]
        assert [one.status for one in answers] == [200] * 8
        assert {one.headers["connection"] for one in answers} == {"close"}
        await asyncio.wait_for(here.task, WITHIN_S)
        assert not here.server.failed
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


async def test_connections_that_came_before_the_end_are_answered(listening: Any, photo: Photo) -> None:
    async with listening(frontends=1) as here:
        (pid,) = processes(here)
        os.kill(pid, signal.SIGSTOP)
        lines = [await here.connect() for _ in range(200)]
        for line in lines:
            line.send(photo(SURE))
        here.server.signalled(signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
        ends = [await outcome(line) for line in lines]
        assert set(ends) <= {200, 503, 504}, "none was reset"


async def test_signals_that_reach_a_front_end_are_the_engines_to_hear(listening: Any, photo: Photo) -> None:
    async with listening(frontends=1) as here:
        (pid,) = processes(here)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        async with client(here) as http:
            assert (await http.post("/classify", content=photo(SURE), headers=PNG)).status_code == 200
        assert processes(here) == [pid]


async def test_a_body_of_another_path_is_read_as_it_is_wanted(listening: Any) -> None:
    async with listening(frontends=1) as here:
        line = await here.connect()
        line.writer.write(
            b"PUT /budget HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        assert await line.reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        await line.reader.readline()
        for piece in (b'{"thresh', b'olds": [0.5', b", 0.5]}"):
            line.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        line.writer.write(b"0\r\n\r\n")
        assert json.loads((await line.answer()).body)["target"] == {"thresholds": [0.5, 0.5]}
        line.writer.write(
            b"PUT /budget HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
        )
        bad = await line.answer()
        assert (bad.status, bad.code) == (400, "bad_request")


async def test_more_requests_of_other_paths_than_may_wait_are_refused(listening: Any) -> None:
    async with listening(frontends=1) as here:
        lines = [await here.connect() for _ in range(records.MAX_ASKED + 5)]
        for line in lines:
            line.send(b"{}", "Content-Type: application/json", path="/budget/preview", cut=-1)
        refused = [await line.answer() for line in lines[records.MAX_ASKED :]]
        assert {(one.status, one.code) for one in refused} == {(503, "overloaded")}
        (one,) = here.service.apart._running
        assert len(one.link._asked) == records.MAX_ASKED
        for line in lines[: records.MAX_ASKED]:
            line.close()
        await until(lambda: not one.link._asked)


def test_what_a_server_may_hold_is_divided_and_what_a_request_may_have_is_not() -> None:
    share = share_of(Settings(frontends=3, decode_threads=2, max_connections=100, max_requests=10))
    assert (share.max_connections, share.max_requests, share.decode_threads) == (34, 4, 1)
    assert (share.max_images, share.max_body_bytes) == (64, 32 * 2**20)
    least = share_of(Settings(frontends=64))
    assert least.max_held_bytes >= least.max_body_bytes
    assert least.max_queued_decodes >= least.max_images


def test_a_record_of_the_other_direction_is_not_taken() -> None:
    assert not set(records.TO_ENGINE) & set(records.TO_FRONT_END)
    assert set(records.TO_ENGINE) | set(records.TO_FRONT_END) == set(Kind)


def test_a_port_that_is_taken_is_told_in_one_line(dvt: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, out, err = dvt("serve", "--port", str(port), "--frontends", "2")
    assert (status, out) == (2, "")
    assert "cannot listen on" in err
