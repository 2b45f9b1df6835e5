"""What docs/connection.md promises, byte by byte, on asyncio's event loop and on uvloop, which servers run on."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.app import create_app
from server.engines.fake import FakeEngine
from server.frontend import connection as module
from server.frontend.answer_time import TICK_S
from server.frontend.connection import Connections
from server.frontend.framing import MAX_HEADERS
from server.settings import Settings, SettingsError

Photo = Callable[..., bytes]
HOST = b"Host: localhost\r\n"
GET = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"


def post(body: bytes, *fields: bytes, path: bytes = b"/classify", length: bool = True) -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: localhost", b"Content-Type: image/png", *fields]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


INNER = (
    b"PUT /budget HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n"
    b'{"gmacs": 0.001}'
)


class TestFraming:
    @pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"anything/1.0"])
    @pytest.mark.parametrize("together", [True, False])
    async def test_an_offer_to_upgrade_is_ignored_and_the_body_is_no_request(
        self, listening: Any, photo: Photo, offer: bytes, together: bool
    ) -> None:
        async with listening() as here:
            line = await here.connect()
            version = here.service.budget.point.version
            for body, status in ((photo(255, klass=3), 200), (INNER, 400)):
                whole = post(body, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + offer)
                head = whole[: -len(body)]
                line.writer.write(whole if together else head)
                if not together:
                    await line.writer.drain()
                    await here.turn()
                    line.writer.write(body)
                assert (await line.answer()).status == status
            line.writer.write(GET)
            assert (await line.answer()).status == 200
            assert here.service.budget.point.version == version

    async def test_trailers_never_become_headers(self, listening: Any, token: Any) -> None:
        async with listening(control_token_file=token) as here:
            line = await here.connect()
            head = b"PUT /budget HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            line.writer.write(
                head + b"Transfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n"
                + chunk(b'{"gmacs": 0.03}') + b"0\r\nAuthorization: Bearer secret\r\nX-Y: z\r\n\r\n" + GET
            )  # fmt: skip
            assert (await line.answer()).status == 401
            assert (await line.answer()).status == 200

    async def test_trailers_without_end_are_refused(self, listening: Any) -> None:
        async with listening(max_header_bytes=2048) as here:
            line = await here.connect()
            line.writer.write(post(b"", b"Transfer-Encoding: chunked", length=False) + chunk(b"data") + b"0\r\n")
            for _ in range(50):
                line.writer.write(b"X-Trailer: " + b"x" * 100 + b"\r\n")
            assert (await line.answer()).code == "request_header_too_large"
            assert await line.ended()

    @pytest.mark.parametrize("trailer", [b"X: " + b"v" * 100_000, b"x" * 100_000])
    async def test_nor_is_a_trailer_without_end_kept(self, listening: Any, trailer: bytes) -> None:
        async with listening(max_header_bytes=2048) as here:
            line = await here.connect()
            line.writer.write(
                post(b"", b"Transfer-Encoding: chunked", length=False) + chunk(b"data") + b"0\r\n" + trailer
            )
            assert (await line.answer()).code == "request_header_too_large"

    @pytest.mark.parametrize(
        "rest",
        [
            b"zz\r\ndata\r\n",
            b"-5\r\n",
            b"5 \r\nab\r\n",
            b"0x5\r\nabcde\r\n",
            b"\r\n",
            b"4\r\ndata4\r\ndata\r\n",
            b"4\ndata\n",
        ],
    )
    async def test_a_malformed_chunk_is_refused_at_once(self, listening: Any, rest: bytes) -> None:
        async with listening(body_timeout_s=3600) as here:
            line = await here.connect()
            line.writer.write(
                post(b"", b"Transfer-Encoding: chunked", length=False) + chunk(b"data") + rest + b"\r\n\r\n"
            )
            assert (await line.answer()).code == "bad_request"
            assert await line.ended()
            await here.service.intake.wait_idle()

    @pytest.mark.parametrize(
        "field",
        [b"Transfer-Encoding: gzip", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: xchunked",
         b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
         b"Transfer-Encoding: chunked\r\nContent-Length: 4",
         b"Content-Length: 4\r\nContent-Length: 5", b"Content-Length: +4", b"Content-Length: 4_0",
         b"Content-Length: -1", "Content-Length: ٤".encode(), b"Content-Length: 0x4", b"Content-Length : 4",
         b"X-A\tB: c", b"X-A: b\x00c", b"X-A: b\rc", b": empty", b"no colon", b"X-A: b\n", b" folded: first"],
        ids=repr,
    )  # fmt: skip
    async def test_what_two_readers_might_read_differently_is_refused(self, listening: Any, field: bytes) -> None:
        async with listening() as here:
            line = await here.connect()
            line.writer.write(
                b"POST /classify HTTP/1.1\r\n"
                + (field + b"\r\n" + HOST if b" folded" in field else HOST + field + b"\r\n")
                + b"\r\ndata"
            )
            assert (await line.answer()).code == "bad_request"
            assert await line.ended()

    async def test_chunks_that_cost_more_than_they_bring_are_refused(self, listening: Any) -> None:
        async with listening() as here:
            line = await here.connect()
            line.writer.write(post(b"", b"Transfer-Encoding: chunked", length=False) + chunk(b"x") * 5000)
            answer = await line.answer()
            assert (answer.status, answer.code) == (400, "bad_request")

    @pytest.mark.parametrize(
        "lines",
        [
            b"GET /livez HTTP/1.1\r\nHost: localhost\r\nA:%b\x0b\r\n\r\n",
            post(b"", b"Transfer-Encoding: chunked", length=False) + b"4;%b\n\r\n",
            post(b"", b"Transfer-Encoding: chunked", length=False) + b"0\r\nA:%b\x0b\r\n\r\n",
        ],
        ids=["header", "chunk", "trailer"],
    )
    async def test_lines_of_blanks_cost_no_more_than_others(self, listening: Any, lines: bytes) -> None:
        async with listening() as here, asyncio.timeout(10):
            line = await here.connect()
            line.writer.write(lines % (b" " * 60_000))
            assert (await line.answer()).code == "bad_request"

    async def test_a_header_has_no_control_characters(self, listening: Any) -> None:
        async with listening() as here:
            for character in (*range(9), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F):
                line = await here.connect()
                line.writer.write(b"GET /livez HTTP/1.1\r\n" + HOST + b"A: b%cc\r\n\r\n" % character)
                assert (await line.answer()).code == "bad_request", hex(character)

    async def test_a_body_in_chunks_is_the_body_and_extensions_are_dropped(self, listening: Any, photo: Photo) -> None:
        image = photo(255, klass=7)
        async with listening() as here:
            line = await here.connect()
            pieces = [image[at : at + 9] for at in range(0, len(image), 9)]
            body = b"".join(b"%x;name=value\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
            line.writer.write(post(b"", b"Transfer-Encoding: chunked", length=False) + body)
            answer = await line.answer()
            assert json.loads(answer.body)["results"][0]["predictions"][0]["class_id"] == 7

    async def test_a_body_without_a_request_is_refused_where_it_is_asked_for(
        self, listening: Any, photo: Photo
    ) -> None:
        async with listening() as here:
            line = await here.connect()
            line.writer.write(post(photo(255), b"Expect: 100-continue")[: -len(photo(255))])
            assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            line.writer.write(photo(255))
            assert (await line.answer()).status == 200

    async def test_what_can_be_refused_by_its_header_is_refused_without_its_body(self, listening: Any) -> None:
        async with listening(max_body_bytes=1000) as here:
            line = await here.connect()
            line.writer.write(
                b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 5000\r\n"
                b"Expect: 100-continue\r\n\r\n"
            )
            assert (await line.answer()).code == "body_too_large"
            assert await line.ended()

    async def test_other_expectations_are_not_met(self, listening: Any) -> None:
        async with listening() as here:
            line = await here.connect()
            line.writer.write(b"GET /livez HTTP/1.1\r\n" + HOST + b"Expect: a-miracle\r\n\r\n")
            assert (await line.answer()).code == "expectation_failed"


class TestHeaders:
    @pytest.mark.parametrize("pieces", [1, 7])
    async def test_too_large_a_header_is_refused_however_it_comes(self, listening: Any, pieces: int) -> None:
        async with listening(max_header_bytes=2048) as here:
            line = await here.connect()
            data = b"GET /livez HTTP/1.1\r\n" + HOST + b"X-Padding: " + b"x" * 2048 + b"\r\n\r\n"
            size = len(data) // pieces + 1
            for at in range(0, len(data), size):
                line.writer.write(data[at : at + size])
                await line.writer.drain()
            assert (await line.answer()).code == "request_header_too_large"
            assert await line.ended()

    async def test_so_are_too_many_fields(self, listening: Any) -> None:
        async with listening() as here:
            line = await here.connect()
            line.writer.write(b"GET /livez HTTP/1.1\r\n" + HOST + b"A: b\r\n" * (MAX_HEADERS + 1) + b"\r\n")
            assert (await line.answer()).code == "request_header_too_large"

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"GET /livez HTTP/1.1\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: user@localhost\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: localhost:http\r\n\r\n", 400),
            (b"GET /livez#part HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"GET livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"GET  /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
            (b"GET /livez\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
            (b"GET /livez HTTP/1.1\nHost: localhost\n", 400),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
            (b"GET /livez HTTP/3.0\r\nHost: localhost\r\n", 505),
            (b"get /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
            (b"GET /livez HTTP/1.0\r\n\r\n", 200),
            (b"GET http://localhost:1/livez HTTP/1.1\r\nHost: elsewhere\r\n\r\n", 200),
            (b"GET http://elsewhere/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 403),
            (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 204),
            (b"\r\n\r\nGET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        ],
        ids=lambda value: repr(value)[2:40] if isinstance(value, bytes) else None,
    )
    async def test_a_request_is_answered_at_once_with(self, listening: Any, request_: bytes, status: int) -> None:
        async with listening() as here:
            line = await here.connect()
            line.writer.write(request_)
            assert (await line.answer()).status == status

    async def test_head_is_get_without_a_body(self, listening: Any) -> None:
        async with listening() as here:
            line = await here.connect()
            for path in (b"/livez", b"/budget", b"/model", b"/metrics", b"/docs", b"/openapi.json"):
                line.writer.write(b"HEAD " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
                head = await line.reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ")
                assert b"\r\ncontent-length: 0\r\n" not in head
            line.writer.write(GET)
            assert (await line.answer()).status == 200

    @pytest.mark.parametrize("path", [b"/budget", b"/classify"])
    async def test_options_and_a_405_name_what_a_path_takes(self, listening: Any, path: bytes) -> None:
        async with listening() as here:
            line = await here.connect()
            for method, status in ((b"OPTIONS", 204), (b"DELETE", 405)):
                line.writer.write(method + b" " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
                answer = await line.answer()
                allow = {b"/budget": "GET, HEAD, PUT, OPTIONS", b"/classify": "POST, OPTIONS"}[path]
                assert (answer.status, answer.headers["allow"]) == (status, allow)


class TestTime:
    async def test_empty_lines_keep_no_connection_alive(self, listening: Any) -> None:
        async with listening(keep_alive_timeout_s=0.3, header_timeout_s=60) as here:
            line = await here.connect()
            line.writer.write(GET)
            await line.answer()
            feeding = asyncio.create_task(_feed(line, b"\r\n"))
            assert await line.ended()
            feeding.cancel()

    async def test_a_header_that_trickles_after_an_answer_has_a_headers_time(self, listening: Any) -> None:
        async with listening(keep_alive_timeout_s=60, header_timeout_s=0.1) as here:
            line = await here.connect()
            line.writer.write(GET)
            await line.answer()
            line.writer.write(b"GET /livez")
            assert (await line.answer()).code == "request_timeout"

    async def test_a_body_must_come_at_a_rate(
        self, listening: Any, photo: Photo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BODY_WINDOW_S", 0.1)
        async with listening(body_timeout_s=3600, min_body_bytes_per_s=1000) as here:
            line = await here.connect()
            line.send(photo(255), cut=-30)
            feeding = asyncio.create_task(_feed(line, b"x"))
            answer = await line.answer()
            assert (answer.status, answer.code) == (408, "request_timeout")
            feeding.cancel()

    async def test_who_does_not_take_answers_gets_no_more_and_is_dropped(self, listening: Any) -> None:
        async with listening(send_timeout_s=0.2) as here:
            with socket.create_connection(("127.0.0.1", here.port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                sent = 0
                try:
                    while sent < 50_000_000:
                        sent += await asyncio.wait_for(_send_some(client, GET * 1000), 1)
                except (ConnectionError, TimeoutError):
                    pass
                while here.service.connections.open:
                    await asyncio.sleep(0.01)

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a client has not taken")
    async def test_who_leaves_its_answers_lying_is_reset_when_its_time_is_over(self, listening: Any) -> None:
        async with listening(keep_alive_timeout_s=0.2) as here:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                client.connect(("127.0.0.1", here.port))
                client.sendall(GET * 100)
                await _all_have_left(here)
                while client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != errno.ECONNRESET:
                    await asyncio.sleep(0.01)

    async def test_a_slow_sender_takes_no_requests_place(self, listening: Any, photo: Photo) -> None:
        async with listening(max_requests=1) as here:
            slow = [await here.connect() for _ in range(8)]
            for line in slow:
                line.send(photo(255), cut=-1)
            while here.service.connections.open < 8:
                await asyncio.sleep(0)
            line = await here.connect()
            line.send(photo(255))
            assert (await line.answer()).status == 200


async def _feed(line: Any, data: bytes) -> None:
    while True:
        line.writer.write(data)
        await asyncio.sleep(0.02)


async def _send_some(client: socket.socket, data: bytes) -> int:
    await asyncio.get_running_loop().sock_sendall(client, data)
    return len(data)


class TestNumber:
    async def test_a_newcomer_takes_the_place_of_who_has_owed_bytes_the_longest(
        self, listening: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with listening(max_connections=3) as here:
            engine.gates[1].clear()
            busy, silent, slow = [await here.connect() for _ in range(3)]
            busy.send(photo(255))
            slow.writer.write(b"POST /classify HTTP/1.1\r\nHost:")
            await asyncio.to_thread(engine.began.acquire)
            newcomers = []
            for given_up in (silent, slow):
                newcomers.append(await here.connect())
                newcomers[-1].writer.write(GET)
                assert (await newcomers[-1].answer()).status == 200
                assert await given_up.ended()
            assert here.service.connections.open == 3
            engine.open_gates()
            assert (await busy.answer()).status == 200

    async def test_where_nobody_owes_anything_the_newcomer_is_refused(
        self, listening: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with listening(max_connections=1) as here:
            engine.gates[1].clear()
            busy = await here.connect()
            busy.send(photo(255))
            await asyncio.to_thread(engine.began.acquire)
            refused = await here.connect()
            answer = await refused.answer()
            assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "overloaded", "1")
            assert await refused.ended()
            engine.open_gates()
            assert (await busy.answer()).status == 200

    async def test_who_sends_empty_lines_behind_a_request_may_go_on(
        self, listening: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with listening(max_header_bytes=1024) as here:
            engine.gates[1].clear()
            line = await here.connect()
            line.send(photo(255))
            await asyncio.to_thread(engine.began.acquire)
            line.writer.write(b"\r\n" * 1000)
            await here.turn()
            engine.open_gates()
            assert (await line.answer()).status == 200
            line.writer.write(GET)
            assert (await asyncio.wait_for(line.answer(), 5)).status == 200

    async def test_a_turn_that_fails_ends_no_others(self) -> None:
        failed: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context["exception"]))
        connections, came = Connections(LIMITS, lambda _: None), asyncio.Event()
        connections.in_turn(lambda: 1 // 0)
        connections.in_turn(came.set)
        await asyncio.wait_for(came.wait(), 5)
        assert [type(error) for error in failed] == [ZeroDivisionError]

    async def test_pipelined_requests_are_answered_in_order_however_many(self, listening: Any) -> None:
        async with listening() as here:
            line = await here.connect()
            many = b"".join(
                b"GET /livez HTTP/1.1\r\n" + HOST + b"X-Request-ID: %d\r\n\r\n" % number for number in range(2000)
            )
            line.writer.write(many)
            for number in range(2000):
                assert (await line.answer()).headers["x-request-id"] == str(number)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long bytes have waited")
class TestTheWayIn:
    """A client's time begins when it asks. The loop stands still on purpose: what comes waits in the kernel."""

    async def test_a_request_that_waited_to_be_read_has_less_time_left(
        self, listening: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with listening() as here:
            engine.gates[2].clear()
            with socket.create_connection(("127.0.0.1", here.port)) as client:
                await here.turn()
                client.sendall(post(photo(10, 10, 255), path=b"/classify?timeout_ms=2000"))
                asked = here.service.clock()
                time.sleep(0.2)
                while (deadline := here.service.scheduler.next_deadline()) is None:
                    await asyncio.sleep(0)
                assert deadline <= asked + 2.0 + TICK_S
                engine.open_gates()

    async def test_one_whose_time_is_over_costs_nothing(self, listening: Any, engine: FakeEngine, photo: Photo) -> None:
        async with listening() as here:
            line = await here.connect()
            with socket.create_connection(("127.0.0.1", here.port)) as client:
                await here.turn()
                client.sendall(post(photo(255), path=b"/classify?timeout_ms=100"))
                time.sleep(0.2)
                line.writer.write(GET)
                await line.answer()
                client.setblocking(False)
                head = await asyncio.get_running_loop().sock_recv(client, 4096)
            assert head.startswith(b"HTTP/1.1 504")
            assert b'"deadline_exceeded"' in head
            assert not engine.batches

    async def test_who_pipelines_has_its_time_from_its_turn_on(
        self, listening: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with listening() as here:
            engine.gates[1].clear()
            line = await here.connect()
            line.writer.write(post(photo(255)) + post(photo(255), path=b"/classify?timeout_ms=500"))
            await line.writer.drain()
            await asyncio.to_thread(engine.began.acquire)
            time.sleep(0.6)
            engine.open_gates()
            assert [(await line.answer()).status for _ in range(2)] == [200, 200]


class TestHangUps:
    async def test_who_shuts_the_sending_side_down_gets_every_answer(self, listening: Any, photo: Photo) -> None:
        async with listening() as here:
            line = await here.connect()
            for klass in (1, 2, 3):
                line.send(photo(255, klass=klass))
            line.writer.write_eof()
            for klass in (1, 2, 3):
                assert json.loads((await line.answer()).body)["results"][0]["predictions"][0]["class_id"] == klass
            assert await line.ended()

    async def test_also_where_the_answer_takes_long_behind_interim_ones(
        self, listening: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with listening() as here:
            engine.gates[1].clear()
            line = await here.connect()
            line.send(photo(255))
            line.writer.write_eof()
            assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            engine.open_gates()
            while (answer := await line.answer()).status == 100:
                pass
            assert answer.status == 200
            assert await line.ended()

    @pytest.mark.parametrize("cut", [-1, 30])
    async def test_half_a_request_is_not_answered(self, listening: Any, photo: Photo, cut: int) -> None:
        async with listening() as here:
            line = await here.connect()
            line.send(photo(255), cut=cut)
            line.writer.write_eof()
            assert await line.ended()
            await here.service.intake.wait_idle()

    @pytest.mark.parametrize("behind", [1, 200])
    async def test_who_hangs_up_behind_pipelined_requests_costs_nothing_more(
        self, listening: Any, engine: FakeEngine, photo: Photo, behind: int
    ) -> None:
        """With one behind it, the client's end can be read; with many it waits behind what is not read yet."""
        async with listening(max_header_bytes=1024) as here:
            engine.gates[1].clear()
            line = await here.connect()
            for _ in range(1 + behind):
                line.send(photo(255))
            await line.writer.drain()
            await asyncio.to_thread(engine.began.acquire)
            line.close()
            while here.service.connections.open:
                await asyncio.sleep(0.01)
            await here.service.intake.wait_idle()
            engine.open_gates()
        assert sum(len(batch.pixels) for batch in engine.batches) == 1

    async def test_also_behind_a_quick_answer(self, listening: Any, engine: FakeEngine, photo: Photo) -> None:
        async with listening(max_header_bytes=1024) as here:
            engine.gates[1].clear()
            line = await here.connect()
            line.writer.write(GET + b"".join(post(photo(255)) for _ in range(200)))
            await line.writer.drain()
            await asyncio.to_thread(engine.began.acquire)
            line.close()
            await _all_have_left(here)
            engine.open_gates()

    async def test_the_end_is_looked_for_behind_a_body_that_came_faster_than_it_was_read(self) -> None:
        transport = _Transport()
        line = _line(_refusing_nothing, transport)
        line.data_received(post(bytes(300_000)))
        assert not transport.paused
        line.connection_lost(None)

    async def test_many_chunks_behind_another_request_are_a_whole_one(
        self, listening: Any, engine: FakeEngine, photo: Photo
    ) -> None:
        async with listening() as here:
            engine.gates[1].clear()
            line = await here.connect()
            line.send(photo(255, klass=1))
            image = photo(255, klass=2)
            size = max(1, len(image) // 400)
            chunks = b"".join(chunk(image[at : at + size]) for at in range(0, len(image), size)) + b"0\r\n\r\n"
            line.writer.write(post(b"", b"Transfer-Encoding: chunked", length=False) + chunks)
            line.writer.write_eof()
            assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            engine.open_gates()
            for klass in (1, 2):
                while (answer := await line.answer()).status == 100:
                    pass
                assert json.loads(answer.body)["results"][0]["predictions"][0]["class_id"] == klass
            assert await line.ended()

    @pytest.mark.parametrize("half", [b"GET /li", post(b"data")[:-1]])
    async def test_who_takes_no_answer_and_ends_amid_a_request_is_dropped(self, half: bytes) -> None:
        transport = _Transport(unsent=100)
        line = _line(_refusing_nothing, transport)
        line.data_received(half)
        if not line.eof_received():
            transport.close()
        await asyncio.wait_for(transport.ended.wait(), 5)
        line.connection_lost(None)

    async def test_a_linger_is_no_longer_for_who_took_the_answer_late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "LINGER_S", 0.01)
        transport = _Transport()
        line = _line(_refusing_nothing, transport)
        line.data_received(b"junk\r\n")
        line.pause_writing()
        line.resume_writing()
        await asyncio.wait_for(transport.ended.wait(), 5)
        line.connection_lost(None)


async def _all_have_left(here: Any) -> None:
    async with asyncio.timeout(5):
        while here.service.connections.open:
            await asyncio.sleep(0.01)


async def _refusing_nothing(_: Any, receive: Any, __: Any) -> None:
    """An application that waits for the client."""
    while (await receive())["type"] != "http.disconnect":
        pass


class TestWhoMayAsk:
    @pytest.mark.parametrize(
        ("host", "status"),
        [("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1", 200), ("127.1.2.3:80", 200), ("[::1]:8000", 200),
         ("app.localhost", 200), ("localhost.", 200), ("evil.example", 403), ("localhost.evil.example", 403),
         ("10.0.0.1", 403), ("[::2]", 403), ("", 200), ("127.0.0.1.evil.example", 403)],
    )  # fmt: skip
    async def test_on_loopback_only_local_names_count(self, listening: Any, host: str, status: int) -> None:
        async with listening() as here:
            line = await here.connect()
            line.writer.write(b"GET /budget HTTP/1.1\r\nHost: " + host.encode() + b"\r\n\r\n")
            assert (await line.answer()).status == status

    async def test_others_are_named_by_a_setting(self, listening: Any) -> None:
        async with listening(allowed_hosts="dvt.example,*.internal,10.0.0.0/8") as here:
            line = await here.connect()
            for host, status in (
                (b"dvt.example", 200),
                (b"a.b.internal:80", 200),
                (b"10.2.3.4", 200),
                (b"localhost", 403),
            ):
                line.writer.write(b"GET /budget HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
                assert (await line.answer()).status == status

    @pytest.mark.parametrize(
        ("fields", "allowed"),
        [(b"", True), (b"Origin: http://localhost\r\n", True), (b"Origin: http://localhost:3000\r\n", False),
         (b"Origin: https://evil.example\r\n", False), (b"Origin: null\r\n", False),
         (b"Sec-Fetch-Site: same-origin\r\nOrigin: https://dvt.example\r\n", True), (b"Sec-Fetch-Site: none\r\n", True),
         (b"Sec-Fetch-Site: cross-site\r\n", False), (b"Sec-Fetch-Site: same-site\r\n", False)],
    )  # fmt: skip
    async def test_a_page_of_another_origin_may_not_change_the_budget(
        self, listening: Any, fields: bytes, allowed: bool
    ) -> None:
        async with listening() as here:
            version = here.service.budget.point.version
            line = await here.connect()
            line.writer.write(
                b"PUT /budget HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 15\r\n" + HOST + fields
                + b'\r\n{"gmacs": 0.03}'
            )  # fmt: skip
            answer = await line.answer()
            assert answer.status == 200 if allowed else answer.code == "foreign_origin"
            assert here.service.budget.point.version == version + allowed


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret")
    return path


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_however_the_bytes_are_cut_the_requests_are_the_same(data: st.DataObject) -> None:
    """Requests of every framing, cut anywhere, against a recording application on a transport in memory."""
    bodies = data.draw(st.lists(st.binary(max_size=400), min_size=1, max_size=6))
    stream = b""
    for body in bodies:
        if data.draw(st.booleans()):
            pieces = data.draw(st.lists(st.integers(1, 20), max_size=3))
            framed, at = b"", 0
            for size in pieces:
                if body[at : at + size]:
                    framed += chunk(body[at : at + size])
                at += size
            framed += (chunk(body[at:]) if body[at:] else b"") + b"0\r\nX-Trailer: 1\r\n\r\n"
            stream += post(b"", b"Transfer-Encoding: chunked", length=False) + framed
        else:
            stream += post(body)
        stream += data.draw(st.sampled_from([b"", b"\r\n"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    seen, answers = asyncio.run(_replay(stream, [*cuts, len(stream)]))
    assert seen == bodies
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == len(bodies)


PARTS = [GET, b"\r\n", b" ", b"\x00", b"HTTP/1.1", b"POST ", b"5\r\n", HOST, b"Transfer-Encoding: chunked\r\n"]


@given(stream=st.binary(max_size=200) | st.lists(st.sampled_from(PARTS)).map(b"".join))
@settings(max_examples=200, deadline=None)
def test_whatever_comes_the_connection_survives_it(stream: bytes) -> None:
    _, answers = asyncio.run(_replay(stream, [len(stream)]))
    assert answers == b"" or answers.startswith(b"HTTP/1.1 ")


class _Transport(asyncio.Transport):
    """A socket in memory that takes everything, but for `unsent` bytes that hold its end up."""

    def __init__(self, unsent: int = 0) -> None:
        super().__init__({})
        self.sent = b""
        self.closed = self.paused = False
        self.unsent = unsent
        self.ended = asyncio.Event()

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def write_eof(self) -> None: ...

    def close(self) -> None:
        self.closed = True
        if not self.unsent:
            self.ended.set()

    def abort(self) -> None:
        self.closed = True
        self.ended.set()

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return self.unsent


LIMITS = module.ConnectionLimits(4, 300, 10.0, 10.0, 10.0, 0.0, 0.05)


def _line(app: Any, transport: _Transport) -> module.Connection:
    class Config:
        loaded_app = staticmethod(app)

    class State:
        def __init__(self) -> None:
            self.connections: set[Any] = set()
            self.tasks: set[Any] = set()
            self.default_headers: list[Any] = []
            self.total_requests = 0

    line = module.Connection(Connections(LIMITS, lambda _: None), Config(), State(), {})  # type: ignore[arg-type]
    line.connection_made(transport)
    return line


async def _replay(stream: bytes, cuts: list[int]) -> tuple[list[bytes], bytes]:
    """The bodies that the application saw, and the bytes that went back."""
    seen: list[bytes] = []

    async def app(_: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        seen.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    transport = _Transport()
    line = _line(app, transport)
    at = 0
    for cut in cuts:
        for _ in range(200):
            if not transport.paused:
                break
            await asyncio.sleep(0)
        assert not transport.paused, "reading stops until what has come is needed, no longer"
        if cut > at and not transport.closed:
            line.data_received(stream[at:cut])
        at = cut
        await asyncio.sleep(0)
    for _ in range(200):
        await asyncio.sleep(0)
    line.connection_lost(None)
    await asyncio.sleep(0)
    return seen, transport.sent


def test_hosts_that_are_none_stop_the_start_by_name(bundle: Any, engine: FakeEngine) -> None:
    for hosts in ("http://a", "a b", "a,b/c"):
        with pytest.raises(SettingsError, match="DVT_ALLOWED_HOSTS"):
            create_app(Settings(state_dir=None, allowed_hosts=hosts), bundle, engine)
