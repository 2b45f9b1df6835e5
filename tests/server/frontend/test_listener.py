"""Over real sockets on 127.0.0.1: clients that hang up, dawdle or pipeline, and an end that answers everyone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from server.app import create_app
from server.bundle.manifest import Bundle
from server.core import StageBatch, StageOutput
from server.engines.fake import FakeEngine
from server.frontend import address, listener
from server.service import Phase
from server.settings import Settings, SettingsError

Photo = Callable[..., bytes]


wherever_http_is_spoken = pytest.mark.parametrize("listening", [0, 1], indirect=True, ids=["in-process", "apart"])


@wherever_http_is_spoken
async def test_requests_share_a_connection_one_after_another_and_pipelined(listening: Any, photo: Photo) -> None:
    async with listening() as here:
        line = await here.connect()
        for klass in (1, 2):
            line.send(photo(255, klass=klass))
            assert json.loads((await line.answer()).body)["results"][0]["predictions"][0]["class_id"] == klass
        for klass in (3, 4, 5):
            line.send(photo(255, klass=klass))
        for klass in (3, 4, 5):
            assert json.loads((await line.answer()).body)["results"][0]["predictions"][0]["class_id"] == klass


async def test_a_client_that_hangs_up_between_stages_frees_everything(
    listening: Any, engine: FakeEngine, photo: Photo
) -> None:
    async with listening() as here:
        engine.gates[2].clear()
        lines = [await here.connect() for _ in range(5)]
        for line in lines:
            line.send(photo(10, 10, 255))

        def load() -> int:
            now = here.service.batcher.load
            return sum(now.waiting) + sum(now.running)

        while load() < 5 or not here.service.batcher.load.running[1]:
            await asyncio.sleep(0)
        for line in lines:
            line.close()
        await here.service.intake.wait_idle()  # all hang-ups were noticed while the engine was still held
        assert here.service.batcher.load.waiting == (0, 0, 0)
        held = here.service.batcher.load.running[1]
        engine.open_gates()
        while load():
            await asyncio.sleep(0)
        assert engine.slots_in_use == 0
        assert sum(len(batch.pixels) for batch in engine.batches if batch.stage > 1) == held
        count = here.service.metrics.registry.get_sample_value
        assert count("dvt_images_abandoned_total", {"reason": "disconnect"}) == 5
        assert (
            count(
                "dvt_requests_total", {"route": "/classify", "status": "499", "priority": "normal", "hurried": "false"}
            )
            == 5
        )


@wherever_http_is_spoken
async def test_a_refusal_before_the_body_was_read_arrives_whole(listening: Any) -> None:
    async with listening(max_body_bytes=1000) as here:
        line = await here.connect()
        line.send(bytes(5_000_000))
        answer = await line.answer()
        assert (answer.status, answer.code) == (413, "body_too_large")
        assert answer.headers["connection"] == "close"
        await line.writer.drain()
        assert await line.ended()


async def test_a_body_that_trickles_is_answered_408(listening: Any, photo: Photo) -> None:
    async with listening(body_timeout_s=0.05) as here:
        line = await here.connect()
        line.send(photo(255), cut=-5)
        answer = await line.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")


async def test_a_header_that_trickles_is_answered_408_and_a_silent_connection_closed(listening: Any) -> None:
    async with listening(header_timeout_s=0.05) as here:
        silent, slow = await here.connect(), await here.connect()
        slow.writer.write(b"POST /classify HTTP/1.1\r\nHost:")
        answer = await slow.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert await slow.ended()
        assert await silent.ended()


@wherever_http_is_spoken
async def test_a_header_without_end_is_refused(listening: Any) -> None:
    async with listening(max_header_bytes=1024) as here:
        line = await here.connect()
        line.writer.write(b"GET /livez HTTP/1.1\r\n")
        for _ in range(20):
            line.writer.write(b"X-Padding: " + b"x" * 100 + b"\r\n")
        answer = await line.answer()
        assert (answer.status, answer.code) == (431, "request_header_too_large")


async def test_what_is_no_http_is_a_problem_document(listening: Any) -> None:
    async with listening() as here:
        line = await here.connect()
        line.writer.write(b"hello, is this the server?\r\n\r\n")
        answer = await line.answer()
        assert (answer.status, answer.code) == (400, "bad_request")
        assert answer.headers["content-type"] == "application/problem+json"
        assert json.loads(answer.body)["request_id"] == answer.headers["x-request-id"]


async def test_an_idle_connection_is_closed(listening: Any, photo: Photo) -> None:
    async with listening(keep_alive_timeout_s=1, header_timeout_s=0.1) as here:
        line = await here.connect()
        line.send(photo(255))
        assert (await line.answer()).status == 200
        assert await line.ended()


async def test_a_signal_lets_the_accepted_be_answered_and_the_new_be_refused(
    listening: Any, engine: FakeEngine, photo: Photo
) -> None:
    async with listening() as here:
        engine.gates[1].clear()
        waiting, idle, other = [await here.connect() for _ in range(3)]
        for line in (waiting, idle):
            line.send(photo(255), path="/classify" if line is waiting else "/nowhere")
        assert (await idle.answer()).status == 404
        await asyncio.to_thread(engine.began.acquire)
        os.kill(os.getpid(), signal.SIGTERM)
        while here.service.phase is not Phase.DRAINING:
            await asyncio.sleep(0)
        other.send(photo(255))
        refused = await other.answer()
        assert refused.code == "draining"
        assert await other.ended()
        engine.open_gates()
        assert (await waiting.answer()).status == 200
        assert await waiting.ended()
        assert await idle.ended()
        await here.task
        assert engine.closed
        assert not here.server.failed


async def test_while_it_leaves_it_serves_and_is_not_ready(listening: Any, photo: Photo) -> None:
    async with listening(drain_delay_s=0.1) as here:
        first = await here.connect()
        first.send(photo(255))
        await first.answer()
        os.kill(os.getpid(), signal.SIGTERM)
        while here.service.ready:
            await asyncio.sleep(0)
        first.send(photo(255))
        answer = await first.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        probe = await here.connect()
        probe.writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await probe.answer()).code == "not_ready"
        await here.task


@wherever_http_is_spoken
async def test_what_the_drain_timeout_finds_is_answered_too(listening: Any, engine: FakeEngine, photo: Photo) -> None:
    async with listening(drain_timeout_s=0.1) as here:
        engine.gates[1].clear()
        line = await here.connect()
        line.send(photo(255), path="/classify?timeout_ms=30000")
        await asyncio.to_thread(engine.began.acquire)
        os.kill(os.getpid(), signal.SIGTERM)
        answer = await line.answer()
        assert (answer.status, answer.code) == (503, "draining")
        engine.open_gates()
        await here.task


@wherever_http_is_spoken
async def test_when_the_batch_loop_dies_the_waiters_are_answered_and_the_server_ends_as_failed(
    listening: Any, engine: FakeEngine, photo: Photo
) -> None:
    run = engine.run

    def short(batch: StageBatch) -> StageOutput:
        """Breaks the contract of engines: fewer rows than it was asked for."""
        output = run(batch)
        return StageOutput(output.probabilities, output.confidence[:0], output.slots)

    async with listening() as here:
        engine.run = short  # type: ignore[method-assign]
        line = await here.connect()
        line.send(photo(255))
        assert (await line.answer()).code == "engine_failed"
        await here.task
        assert here.server.failed


def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1 port {port}"):
            address.bind(Settings(port=port))


def test_only_one_of_two_that_start_at_once_gets_the_port() -> None:
    with address.bind(Settings(port=0)) as first:  # it does not listen yet
        port = first.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0", "localhost"):
            with pytest.raises(SettingsError, match=f"cannot listen on {host} port {port}: Address already in use"):
                address.bind(Settings(host=host, port=port, open_control=True))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


async def test_a_port_is_free_again_as_soon_as_its_server_has_stopped_and_goes_to_one_of_two(
    listening: Any, bundle: Bundle
) -> None:
    async with listening() as here:
        line = await here.connect()
        line.writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await line.answer()
        assert await line.ended()  # the server closed first: its end of the connection lingers
        port = here.port
    settings = Settings(port=port, state_dir=None, profile_seconds=0)
    with address.bind(settings) as one, address.bind(settings) as other:
        servers = [
            listener.make_server(create_app(settings, bundle, FakeEngine(num_classes=10)), settings) for _ in range(2)
        ]
        first = asyncio.create_task(servers[0].serve([one]))
        while not servers[0].started:
            await asyncio.sleep(0)
        await servers[1].serve([other])  # ends by itself
        assert servers[1].address_taken
        servers[0].should_exit = True
        await first
        assert not servers[0].address_taken


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("no-such-host.invalid", "Name or service not known|Temporary failure in name resolution|No address"),
        ("[::1]", "Name or service not known|Temporary failure in name resolution|No address"),
        ("a" * 300, ".*no host name"),
        ("a..b", ".*no host name"),
        ("nul\0", ".*no host name|Name or service not known"),
        ("198.51.100.1", "Cannot assign requested address"),
        ("fe80::1", "Invalid argument|Cannot assign requested address"),
    ],
)
def test_an_address_that_cannot_be_had_is_said_in_one_line(host: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=rf"\Acannot listen on .*: ({reason})[^\n]*\Z"):
        address.bind(Settings(host=host, port=0, open_control=True))


def test_an_ipv6_socket_for_all_addresses_has_the_port_for_ipv4_too() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match="Address already in use"):
            address.bind(Settings(port=port))


def test_a_name_with_several_addresses_is_the_first_ipv4_one() -> None:
    with address.bind(Settings(host="localhost", port=0)) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


SERVER = textwrap.dedent(
    """
    import sys, time
    from server.frontend import address, listener
    from server.app import create_app
    from server.bundle.manifest import Bundle
    from server.engines.fake import FakeEngine
    from server.settings import Settings

    class Slow(FakeEngine):
        def run(self, batch):
            time.sleep(0.003)
            return super().run(batch)

    settings = Settings(port=0, state_dir=None, executors=2, decode_threads=2, profile_seconds=0)
    bound = address.bind(settings)
    app = create_app(settings, Bundle.load(sys.argv[1]), Slow(num_classes=10))
    sys.exit(not listener.run(app, settings, bound, lambda: print(bound.getsockname()[1], flush=True)))
    """
)


async def test_sigterm_under_load_leaves_no_accepted_request_without_an_answer(
    bundle: Bundle, photo: Photo, dial: Any
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(bundle.path), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    statuses: list[int] = []
    unanswered = 0

    async def client() -> None:
        """Sends one request after another, on one connection for as long as it is kept, until refused."""
        nonlocal unanswered
        while True:
            try:
                line = await dial(port)
            except OSError:  # nobody listens any more
                return
            try:
                closing = False
                while not closing:
                    line.send(photo(10, 10, 255))
                    answer = await line.answer()
                    statuses.append(answer.status)
                    if answer.status == 503:
                        return
                    closing = answer.headers.get("connection") == "close"
            except (asyncio.IncompleteReadError, ConnectionError):
                unanswered += 1
                return
            finally:
                line.close()

    clients = [asyncio.create_task(client()) for _ in range(24)]
    while len(statuses) < 100:
        await asyncio.wait(clients, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
    process.send_signal(signal.SIGTERM)
    await asyncio.gather(*clients)
    assert await process.wait() == 0
    assert unanswered == 0
    assert set(statuses) == {200, 503}
