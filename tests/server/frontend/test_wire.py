"""HTTP/1.1 as RFC 9110 and 9112 have it, byte for byte, over a socket to a server in a process of its own.

Every time limit of the server is longer than what a test waits: an answer that comes was not waited for. In the rows of
the table INNER is a request that would change the budget; wherever it stands it is part of something else, so the
budget must not change.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
from PIL import Image

GUARD_S = 5.0  # far above what any answer takes, and below every limit of the server
LIMITS = {"header_timeout_s": 60, "body_timeout_s": 60, "keep_alive_timeout_s": 60, "max_header_bytes": 8192}
TOKEN = "open-sesame"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """One connection, with nothing between the test and the bytes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), GUARD_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def answer(self, head: bool = False) -> Answer | None:
        """The next answer, of a HEAD request without its body; None where the connection ends before it."""
        try:
            lines = self._head()
        except ConnectionError:
            return None
        if not lines:
            return None
        fields = (line.partition(":") for line in lines[1:])
        headers = {name.lower(): value.strip() for name, _, value in fields}
        status = int(lines[0].split()[1])
        bodiless = head or status < 200 or status in (204, 304)
        return Answer(status, headers, b"" if bodiless else self._file.read(int(headers["content-length"])))

    def _head(self) -> list[str]:
        lines: list[str] = []
        while line := self._file.readline():
            if line == b"\r\n":
                return lines
            lines.append(line.decode("latin-1").rstrip("\r\n"))
        assert not lines, f"the connection ended amid a header: {lines}"
        return []

    def stop(self) -> None:
        """Say that nothing more will be sent."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def ended(self) -> bool:
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True


class Served:
    def __init__(self, port: int) -> None:
        self.port = port
        self._beside = Wire(port)

    def ask(self, request: bytes) -> Answer:
        """On a connection of its own that stays. The server has one event loop, so it has read what came before."""
        self._beside.socket.sendall(request)
        answer = self._beside.answer()
        assert answer is not None
        return answer

    def budget(self) -> int:
        version: int = json.loads(self.ask(get("/budget")).body)["version"]
        return version

    def close(self) -> None:
        self._beside.__exit__()


@contextmanager
def running(**settings: object) -> Iterator[Served]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVT_")}
    values = {"state_dir": "", "profile_seconds": 0, "executors": 1, "allowed_hosts": "*", **settings}
    environment |= {f"DVT_{name.upper()}": str(value) for name, value in values.items()}
    command = [sys.executable, "-m", "server", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        ports = (re.search(r"Listening on http://[^:]+:(\d+)", line) for line in process.stdout)
        port = next(filter(None, ports), None)
        assert port, "the server ended before it listened"
        served = Served(int(port[1]))
        try:
            yield served
        finally:
            served.close()
            process.terminate()
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    with running(control_token_file=token, **LIMITS) as found:
        yield found


def get(path: str, *headers: str, method: str = "GET", version: str = "HTTP/1.1", host: str = "Host: dvt") -> bytes:
    lines = [f"{method} {path} {version}", *filter(None, [host]), *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def post(
    body: bytes,
    *headers: str,
    length: str | None = "",
    path: str = "/budget/preview",
    media_type: str = "application/json",
    **more: str,
) -> bytes:
    """`length` as it is to be stated; by default it is right, and None states none."""
    stated = [] if length is None else [f"Content-Length: {length or len(body)}"]
    return get(path, f"Content-Type: {media_type}", *stated, *headers, **{"method": "POST", **more}) + body


def chunked(body: bytes, *headers: str, coding: str = "chunked", **more: str) -> bytes:
    """A POST with these bytes as its chunks."""
    return post(body, f"Transfer-Encoding: {coding}", *headers, length=None, **more)


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


JSON = b'{"gmacs": 0.03}'  # 15 bytes, f in hexadecimal
CHUNK = b"f\r\n" + JSON + b"\r\n"
LAST = b"0\r\n\r\n"
INNER = post(b'{"thresholds": [1, 1]}', f"Authorization: Bearer {TOKEN}", path="/budget", method="PUT")
LIVE = get("/livez")
MUCH = b"x" * 100_000

# What follows the answers: the connection serves on; it is closed; the server may choose.
OPEN, CLOSED, EITHER = "open", "closed", "either"

Statuses = int | set[int]
Row = tuple[str, bytes | list[bytes], list[Statuses], str]
BAD: list[Statuses] = [400]
UNKNOWN: list[Statuses] = [{400, 501}]
NOWHERE: list[Statuses] = [{400, 404}]


def refused(name: str, *requests: bytes) -> list[Row]:
    """Each of these is no HTTP: 400, at once, and what follows is not read as a request."""
    return [(f"{name} {number}" if number else name, request, BAD, CLOSED) for number, request in enumerate(requests)]


ROWS: list[Row] = [
    # Upgrades that nobody takes: the request is what it is, its body is its body (RFC 9110, 7.8).
    *[
        (f"upgrade to {protocol}, body {where}", pieces, [422], OPEN)
        for protocol in ("h2c", "websocket", "x")
        for whole in [post(INNER, "Connection: Upgrade", f"Upgrade: {protocol}", "HTTP2-Settings: AAMA")]
        for where, pieces in (
            ("in the same packet", [whole]),
            ("in a later packet", [whole[: -len(INNER)], INNER]),
            ("in two packets", [whole[:-20], whole[-20:]]),
        )
    ],
    ("upgrade of a GET", get("/livez", "Connection: Upgrade", "Upgrade: h2c"), [200], OPEN),
    ("upgrade of a chunked POST", chunked(CHUNK + LAST, "Connection: Upgrade", "Upgrade: x"), [200], OPEN),
    # Chunked bodies (RFC 9112, 7.1).
    ("chunks", chunked(CHUNK + LAST), [200], OPEN),
    ("chunks, byte by byte", cut(chunked(CHUNK + LAST), 1), [200], OPEN),
    ("chunk size in capitals and with zeros", chunked(b"00F\r\n" + JSON + b"\r\n000\r\n\r\n"), [200], OPEN),
    ("the coding's name in capitals", chunked(CHUNK + LAST, coding="Chunked"), [200], OPEN),
    ("a chunked request as body of a chunked one", chunked(b"%x\r\n%b\r\n" % (len(INNER), INNER) + LAST), [422], OPEN),
    ("trailers", chunked(CHUNK + b"0\r\nX-Sum: 1\r\nX-Other: 2\r\n\r\n"), [200], OPEN),
    ("a trailer that would frame", chunked(CHUNK + b"0\r\nContent-Length: 99\r\n\r\n"), [{200, 400}], EITHER),
    (
        "a token in a trailer",
        chunked(CHUNK + b"0\r\nAuthorization: Bearer %b\r\n\r\n" % TOKEN.encode(), path="/budget", method="PUT"),
        [401],
        EITHER,
    ),
    ("trailers without end", chunked(CHUNK + b"0\r\n" + b"X-T: 1\r\n" * 20_000), [431], CLOSED),
    ("a trailer without end", chunked(CHUNK + b"0\r\nX-T: " + MUCH), [431], CLOSED),
    ("a chunk extension", chunked(b"f;a=b;c\r\n" + JSON + b"\r\n0;d\r\n\r\n"), [200], OPEN),
    ("a quoted chunk extension", chunked(b'f;a="b; c"\r\n' + JSON + b"\r\n" + LAST), [200], OPEN),
    ("a chunk extension without end", chunked(b"f;a=" + MUCH), [{400, 413, 431}], CLOSED),
    *[
        (f"chunk size {size!r}", chunked(size + b"\r\n" + JSON), BAD, CLOSED)
        for size in (b"x", b"-f", b"+f", b"0xf", b"1_5", b"", b" f", b"f g", b"\xef\xbc\xa6", b"f\x00")
    ],
    ("a chunk size beyond all bounds", chunked(b"f" * 21 + b"\r\n" + JSON), BAD, CLOSED),
    ("a chunk longer than its size", chunked(b"f\r\n" + JSON + b"more\r\n"), BAD, CLOSED),
    ("a chunk line without CR", chunked(b"f\n" + JSON + b"\r\n0\r\n\r\n"), BAD, CLOSED),
    # Framing that two readers could take two ways (RFC 9112, 6).
    *[
        (f"Transfer-Encoding: {coding!r}", chunked(LAST + INNER, coding=coding), UNKNOWN, CLOSED)
        for coding in (
            *("gzip", "gzip, chunked", "chunked, gzip", "chunked, chunked", "xchunked", "identity", '"chunked"'),
            *("", "chunked;a=b", "\x0bchunked"),
        )
    ],
    ("Transfer-Encoding twice", chunked(LAST + INNER, "Transfer-Encoding: identity"), UNKNOWN, CLOSED),
    ("Transfer-Encoding in HTTP/1.0", chunked(LAST + INNER, version="HTTP/1.0"), UNKNOWN, CLOSED),
    ("Transfer-Encoding and Content-Length", post(LAST + INNER, "Transfer-Encoding: chunked"), BAD, CLOSED),
    ("Content-Length and Transfer-Encoding", chunked(LAST + INNER, "Content-Length: 5"), BAD, CLOSED),
    ("two Content-Lengths", post(JSON + INNER, "Content-Length: 99", length="15"), BAD, CLOSED),
    ("the same Content-Length twice", post(JSON, "Content-Length: 15"), [{200, 400}], EITHER),
    *[
        (f"Content-Length: {length!r}", post(JSON + INNER, length=length), BAD, CLOSED)
        for length in (
            *("+15", "-15", "1_5", "0xf", "15 15", "15, 16", "15;", "1e1", " ", "\xb2", "\xd9\xa1\xd9\xa5", "\x0b15"),
        )
    ],
    ("a Content-Length beyond 64 bits", post(JSON, length="9" * 30), [{400, 413}], CLOSED),
    ("a GET with a body", get("/livez", f"Content-Length: {len(INNER)}") + INNER, [200], EITHER),
    ("a GET with a body, later", [get("/livez", f"Content-Length: {len(INNER)}"), INNER], [200], EITHER),
    ("an unread body of a 404", post(INNER, path="/nowhere"), [404], EITHER),
    ("an unread body of a 405", post(INNER, path="/budget", method="DELETE"), [405], EITHER),
    ("an unread body of a 415", post(INNER, "Content-Encoding: gzip"), [415], EITHER),
    ("an unread chunked body of a 404", chunked(LAST, path="/nowhere"), [404], EITHER),
    ("what follows Connection: close", get("/livez", "Connection: close") + INNER, [200], CLOSED),
    ("what follows Connection: x, Close", get("/livez", "Connection: x, Close") + INNER, [200], CLOSED),
    ("what follows HTTP/1.0", get("/livez", version="HTTP/1.0") + INNER, [200], CLOSED),
    # Fields (RFC 9112, 5; RFC 9110, 5).
    *[
        (f"header {line!r}", get("/livez", line) + INNER, BAD, CLOSED)
        for line in (
            *("A: b\rc", "A: b\r", "A: \x00", "A\x00: b", "A : b", "A\t: b", "A b: c", "A(: b", "\xe9: b", ": b", "A"),
            *("Transfer-Encoding : chunked", "A: b\r\n\nC: d"),
        )
    ],
    ("a space before the first header", get("/livez", " A: b", host="") + INNER, BAD, CLOSED),
    ("a folded line", get("/livez", "A: b", " c"), [{200, 400}], EITHER),
    ("a folded length", post(JSON + INNER, length="1\r\n 5"), BAD, CLOSED),
    ("control characters in a value", get("/livez", "A: b\x0b\x7f"), [{200, 400}], EITHER),
    ("other than ASCII in a value", get("/livez", "A: \xe9\xff"), [{200, 400}], EITHER),
    ("an empty value", get("/livez", "A:"), [200], OPEN),
    ("a hundred headers", get("/livez", *[f"A{number}: b" for number in range(100)]), [200], OPEN),
    ("thousands of headers", get("/livez", *["A:"] * 20_000), [431], CLOSED),
    ("headers beyond the limit, in one piece", get("/livez", f"A: {'x' * 100_000}") + INNER, [431], CLOSED),
    ("headers just beyond the limit", get("/livez", f"A: {'x' * 8192}") + INNER, [431], CLOSED),
    ("headers without end", b"GET /livez HTTP/1.1\r\nHost: dvt\r\nA: " + MUCH, [431], CLOSED),
    ("headers beyond the limit, of a second request", [LIVE, get("/livez", f"A: {'x' * 8192}")], [200, 431], CLOSED),
    ("a long request line", get("/" + "x" * 100_000), [{414, 431}], CLOSED),
    ("a long query", get("/livez?" + "x" * 100_000), [{414, 431}], CLOSED),
    # Host (RFC 9112, 3.2).
    ("no Host", get("/livez", host="") + INNER, BAD, CLOSED),
    ("no Host in HTTP/1.0", get("/livez", host="", version="HTTP/1.0"), [200], CLOSED),
    ("two Hosts", get("/livez", "Host: dvt") + INNER, BAD, CLOSED),
    *[
        (f"Host: {host!r}", get("/livez", host=f"Host: {host}"), BAD, CLOSED)
        for host in ("a b", "a/b", "a@b", "a?b", "a#b", "[::1", "dvt:x", "dvt:-1", "http://dvt", "a\\b", "\xe9")
    ],
    *[
        (f"Host: {host!r}", get("/livez", host=f"Host: {host}"), [200], OPEN)
        for host in ("dvt:80", "127.0.0.1:8000", "[::1]:80", "a_b.c-d", "DVT:", "a%20b,c")
    ],
    # Versions (RFC 9110, 2.5) and the request line (RFC 9112, 3).
    ("HTTP/0.9", b"GET /livez\r\n", BAD, CLOSED),
    ("HTTP/0.9 of the root", b"GET /\r\n", BAD, CLOSED),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", [{400, 505}], CLOSED),
    *[
        (f"version {version}", get("/livez", version=version) + INNER, [{400, 505}], CLOSED)
        for version in (
            *("HTTP/0.9", "HTTP/2.0", "HTTP/3.0", "HTTP/1.10", "HTTP/01.1", "HTTP/1.", "HTTP/11", "HTTP/1.1.1"),
        )
    ],
    *[
        (f"version {version!r}", get("/livez", version=version), [{400, 505}], CLOSED)
        for version in ("http/1.1", "HTTPS/1.1", "ICY/1.1", "HTTP/a.b", "HTTP 1.1", "HTTP/1,1")
    ],
    ("HTTP/1.7", get("/livez", version="HTTP/1.7"), [{200, 400, 505}], EITHER),
    ("empty lines before a request", b"\r\n\r\n" + LIVE, [200], OPEN),
    ("empty lines between requests", [LIVE, b"\r\n\r\n", LIVE], [200, 200], OPEN),
    ("two spaces", get(" /livez"), [{200, 400}], EITHER),
    ("a space at the end of the line", get("/livez", version="HTTP/1.1 "), [{200, 400}], EITHER),
    ("a line end without CR", b"GET /livez HTTP/1.1\nHost: dvt\n\n", [{200, 400}], EITHER),
    ("a line end without LF", b"GET /livez HTTP/1.1\rHost: dvt\r\r" + INNER, BAD, CLOSED),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)), BAD, CLOSED),
    # Targets (RFC 9112, 3.2) and methods (RFC 9110, 9.1).
    ("absolute form", get("http://dvt/livez"), [200], OPEN),
    ("absolute form, of another host", get("http://other:81/livez?a=b"), [200], OPEN),
    ("absolute form without a path", get("http://dvt"), [{200, 404}], OPEN),
    ("asterisk form", get("*", method="OPTIONS"), [{200, 204, 404, 405}], OPEN),
    ("asterisk form of a GET", get("*"), NOWHERE, EITHER),
    ("CONNECT", get("dvt:80", method="CONNECT"), [{400, 404, 405, 501}], EITHER),
    ("CONNECT to a path", get("/livez", method="CONNECT"), [{400, 404, 405, 501}], EITHER),
    ("TRACE", get("/livez", method="TRACE"), [{405, 501}], EITHER),
    ("an encoded path", get("/%6Civez"), [200], OPEN),
    ("a fragment", get("/livez#x"), [{200, 400, 404}], EITHER),
    *[
        (f"path {path!r}", get(path), NOWHERE, EITHER)
        for path in (
            *("//livez", "/livez/", "/LIVEZ", "/livez%00", "/livez%", "/%zz", "/livez%2f", "/livez;a", "livez", "?a"),
            *("/docs/assets/../../../../etc/passwd", "/docs/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd"),
            *("/docs/assets/..%2f..%2f..%2fetc%2fpasswd", "/docs/assets/..\\..\\etc", "/docs/assets//etc/passwd"),
            *("/docs/assets/%00", "/docs/assets/%ff", "/docs/assets/", "/docs/assets/" + "a" * 300),
            *("/\xc3\xa9", "/\xff"),
        )
    ],
    ("a dot segment", get("/x/../livez"), [{200, 400, 404}], EITHER),
    *refused("a space in the target", get("/a b") + INNER),
    *refused("a control character in the target", get("/a\x01") + INNER, get("/a\x7f") + INNER, get("/a\x00") + INNER),
    *[
        (f"method {method!r}", get("/livez", method=method), [{400, 405, 501}], EITHER)
        for method in ("get", "Get", "FOO", "!#$%&'*+-.^_`|~", "G" * 200, "PRI", "M-SEARCH")
    ],
    *refused("method", get("/", method="G(T") + INNER, get("/", method="\xe9") + INNER, get("/", method="") + INNER),
    # Expectations (RFC 9110, 10.1.1).
    ("Expect, and the body on 100", [post(b"", "Expect: 100-continue", length="15")], [100], "body"),
    ("Expect in capitals", [post(b"", "Expect: 100-Continue", length="15")], [100], "body"),
    ("Expect, and the body at once", post(JSON, "Expect: 100-continue"), [200], OPEN),
    ("Expect of a GET", get("/livez", "Expect: 100-continue"), [200], OPEN),
    ("Expect in HTTP/1.0", post(JSON, "Expect: 100-continue", version="HTTP/1.0"), [200], CLOSED),
    ("Expect, too large", post(b"", "Expect: 100-continue", length="99999999"), [413], CLOSED),
    ("Expect, in an encoding", post(b"", "Expect: 100-continue", "Content-Encoding: gzip", length="15"), [415], CLOSED),
    ("Expect, for nothing", post(b"", "Expect: 100-continue", length="15", path="/nowhere"), [404], CLOSED),
    ("another expectation", post(JSON, "Expect: something"), [{200, 417}], EITHER),
    # Many at once.
    ("pipelined", LIVE + post(JSON) + get("/x") + post(INNER) + LIVE, [200, 200, 404, 422, 200], OPEN),
    *[
        (f"pipelined, cut by {size}", cut(LIVE + post(JSON) + chunked(CHUNK + LAST) + LIVE, size), [200] * 4, OPEN)
        for size in (7, 37, 101)
    ],
    ("pipelined, with an error amid", LIVE + get("/livez", "A : b") + INNER, [200, 400], CLOSED),
    ("pipelined, many", LIVE * 200, [200] * 200, OPEN),
]  # fmt: skip
COUNT = itertools.count()


@pytest.mark.parametrize(("sent", "answers", "then"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bytes_get_their_answers(served: Served, sent: bytes | list[bytes], answers: list[Statuses], then: str) -> None:
    before = served.budget()
    with Wire(served.port) as wire:
        for piece in [sent] if isinstance(sent, bytes) else sent:
            try:
                wire.socket.sendall(piece)
            except ConnectionError:  # refused already
                break
            if isinstance(sent, list):
                served.ask(LIVE)
        for number, allowed in enumerate(answers):
            wanted = {allowed} if isinstance(allowed, int) else allowed
            answer = wire.answer()
            while answer is not None and answer.status == 100 and 100 not in wanted:
                answer = wire.answer()
            assert answer is not None, f"answer {number}: the connection ended"
            assert answer.status in wanted, f"answer {number}: {answer}"
            if answer.status >= 400:
                assert answer.headers["content-type"] == "application/problem+json"
                assert json.loads(answer.body)["status"] == answer.status
        if then == "body":
            wire.socket.sendall(JSON)
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 200
        if then in (OPEN, "body"):
            probe = f"probe-{next(COUNT)}"
            wire.socket.sendall(get("/livez", f"X-Request-ID: {probe}"))
            answer = wire.answer()
            assert answer is not None, "the connection does not serve on"
            assert (answer.status, answer.headers["x-request-id"]) == (200, probe)
        elif then == CLOSED:
            if "close" in answer.headers.get("connection", "").lower():  # then it need not wait for what is on its way
                wire.stop()
            assert wire.ended()
    assert served.budget() == before, "the inner request took effect"


def test_the_inner_request_would_take_effect_by_itself(served: Served) -> None:
    before = served.budget()
    with Wire(served.port) as wire:
        wire.socket.sendall(INNER)
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 200
    assert served.budget() == before + 1


@pytest.mark.parametrize("request_", [LIVE, get("/nowhere"), get("/livez", "A : b"), get("/" + "x" * 10_000)], ids=len)
def test_every_answer_has_a_date(served: Served, request_: bytes) -> None:
    with Wire(served.port) as wire:
        wire.socket.sendall(request_)
        answer = wire.answer()
    assert answer is not None
    assert answer.headers["date"].endswith(" GMT")


def test_pipelined_requests_are_answered_in_their_order(served: Served) -> None:
    ids = [f"id-{number}" for number in range(60)]
    with Wire(served.port) as wire:
        for start in range(0, 60, 3):
            slow, quick, none = ids[start : start + 3]
            wire.socket.sendall(
                post(_photo(), f"X-Request-ID: {slow}", path="/classify", media_type="image/jpeg")
                + get("/livez", f"X-Request-ID: {quick}")
                + get("/nowhere", f"X-Request-ID: {none}")
            )
        answers = [wire.answer() for _ in ids]
    assert [answer and answer.headers["x-request-id"] for answer in answers] == ids
    assert [answer and answer.status for answer in answers] == [200, 200, 404] * 20


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/model", "/frontier", "/docs", "/openapi.json", "/nowhere"])
def test_head_is_get_without_a_body(served: Served, path: str) -> None:
    with Wire(served.port) as wire:
        wire.socket.sendall(get(path, method="HEAD") + get(path) + get("/livez", "X-Request-ID: after"))
        bare, full, after = wire.answer(head=True), wire.answer(), wire.answer()
    assert bare is not None
    assert full is not None
    assert after is not None
    assert after.headers["x-request-id"] == "after"
    assert bare.status == full.status
    for name in ("content-type", "content-length"):
        assert bare.headers.get(name) == full.headers[name]


def test_head_of_a_refused_body_has_none_either(served: Served) -> None:
    with Wire(served.port) as wire:
        wire.socket.sendall(get("/livez", f"Content-Length: {len(INNER)}", method="HEAD") + INNER)
        answer = wire.answer(head=True)
        assert answer is not None
        assert answer.status == 200
        wire.stop()
        assert wire.ended(), "a body, or an answer to what was one"


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/budget", {"GET", "HEAD", "PUT", "OPTIONS"}),
        ("/classify", {"POST", "OPTIONS"}),
        ("/livez", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_a_path_says_what_it_takes(served: Served, path: str, methods: set[str]) -> None:
    with Wire(served.port) as wire:
        for method, status in (("OPTIONS", 204), ("DELETE", 405)):
            wire.socket.sendall(get(path, method=method))
            answer = wire.answer()
            assert answer is not None
            assert answer.status == status
            assert {name.strip() for name in answer.headers["allow"].split(",")} == methods


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (LIVE, 200),
        (post(JSON), 200),
        (chunked(CHUNK + LAST), 200),
        (get("/livez")[:-2], None),
        (get("/livez")[:9], None),
        (b"", None),
        (post(JSON)[:-3], None),
        (chunked(CHUNK), None),
        (chunked(CHUNK + b"0\r\nX: "), None),
    ],
    ids=repr,
)
def test_a_client_that_has_said_all_may_say_so(served: Served, sent: bytes, status: int | None) -> None:
    """Half-closed after a whole request it is answered; amid one there is nothing to answer, or 400."""
    with Wire(served.port) as wire:
        wire.socket.sendall(sent)
        wire.stop()
        answer = wire.answer()
        if status is None:
            assert answer is None or answer.status == 400
        else:
            assert answer is not None
            assert answer.status == status
        assert wire.ended()


def test_an_image_is_classified_for_a_client_that_has_said_all(served: Served) -> None:
    with Wire(served.port) as wire:
        wire.socket.sendall(post(_photo(), path="/classify", media_type="image/jpeg"))
        wire.stop()
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 200
        assert wire.ended()


def test_empty_lines_do_not_keep_a_connection_open() -> None:
    """Two connections with an answer each; one of them goes on to send empty lines."""

    def closed(wire: Wire) -> bool:
        wire.socket.settimeout(0.05)
        try:
            return wire.socket.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    with running(keep_alive_timeout_s=1) as served, Wire(served.port) as quiet, Wire(served.port) as fidgety:
        for wire in (quiet, fidgety):
            wire.socket.sendall(LIVE)
            assert wire.answer() is not None
        still_open = [quiet, fidgety]
        until = time.monotonic() + GUARD_S
        while still_open and time.monotonic() < until:
            with suppress(ConnectionError):
                fidgety.socket.sendall(b"\r\n")
            still_open = [wire for wire in still_open if not closed(wire)]
        assert quiet not in still_open
        assert fidgety not in still_open


def _photo() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(stream, "JPEG")
    return stream.getvalue()
