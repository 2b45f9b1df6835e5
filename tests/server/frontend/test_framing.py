"""A request's header, held against h11: what is taken means the same to both, and what h11 refuses is refused."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.errors import BadRequest, ServeError
from server.frontend.framing import Head

names = st.sampled_from(
    [b"Host", b"host", b"Content-Length", b"content-length", b"Transfer-Encoding", b"X-A", b"A-", b"", b"a b", b"x\t",
     b"\xe9"]
) | st.binary(max_size=3)  # fmt: skip
values = st.sampled_from(
    [b"dvt", b"5", b"05", b"+5", b"-1", b"5, 5", b"5 5", b"chunked", b"Chunked", b"gzip", b"a, chunked", b"", b" ",
     b"\t b \t", b"\xff"]
) | st.binary(max_size=4)  # fmt: skip
fields = st.builds(b"".join, st.tuples(names, st.sampled_from([b":", b": ", b":\t", b" :", b"", b"::"]), values))
first_lines = st.sampled_from(
    [b"GET / HTTP/1.1", b"POST /classify?a=b HTTP/1.1", b"GET / HTTP/1.0", b"G@T / HTTP/1.1", b"GET  / HTTP/1.1",
     b"G\xc9T / HTTP/1.1", b"GET /\xe9 HTTP/1.1", b"GET / HTTP/1.2", b"GET / http/1.1", b" GET / HTTP/1.1", b"GET /",
     b"OPTIONS * HTTP/1.1"]
)  # fmt: skip
lines = st.builds(
    lambda first, host, rest: b"\r\n".join([first, *host, *rest]) + b"\r\n\r\n",
    first_lines,
    st.sampled_from([[b"Host: dvt"], [], [b"Host: dvt", b"Host: dvt"]]),
    st.lists(fields, max_size=4),
)


def by_h11(header: bytes) -> h11.Request | None:
    parser = h11.Connection(h11.SERVER, 2**16)
    parser.receive_data(header)
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError:
        return None
    return event if isinstance(event, h11.Request) and parser.trailing_data[0] == b"" else None


def by_us(header: bytes) -> Head | None:
    try:
        return Head.of(header)
    except ServeError:
        return None


@given(lines)
@example(b"GET / HTTP/1.1\r\nHost: dvt\r\nA:b:c \t\r\nA: d\r\n\r\n")
def test_what_is_taken_is_what_h11_reads(header: bytes) -> None:
    if header.find(b"\r\n\r\n") != len(header) - 4:
        return  # the connection cuts it where it ends first
    ours, theirs = by_us(header), by_h11(header)
    if ours is None:
        return
    assert theirs is not None
    assert (ours.method, ours.target, ours.version) == (theirs.method, theirs.target, theirs.http_version)
    assert ours.headers == list(theirs.headers)
    stated = dict(theirs.headers)
    assert ours.length == (None if b"transfer-encoding" in stated else int(stated.get(b"content-length", 0)))


tokens = st.text("abcXYZ-09!#~", min_size=1, max_size=8).map(str.encode)
visible = "".join(map(chr, (*range(0x21, 0x7F), *range(0xA0, 0x100))))
plain = st.text(visible, max_size=8).map(lambda text: text.encode("latin-1"))
parts = st.tuples(tokens, st.sampled_from([b"", b" ", b"\t"]), plain, st.sampled_from([b"", b" "]))


@given(tokens, st.lists(parts, max_size=5))
def test_what_is_valid_is_taken(method: bytes, given_: list[tuple[bytes, bytes, bytes, bytes]]) -> None:
    fields = b"".join(b"%b:%b%b%b\r\n" % field for field in given_)
    head = Head.of(b"%b /a?b HTTP/1.1\r\nHost: dvt\r\n%b\r\n" % (method, fields))
    assert head.headers == [(b"host", b"dvt"), *((name.lower(), value) for name, _, value, _ in given_)]
    assert (head.method, head.target, head.version, head.length) == (method, b"/a?b", b"1.1", 0)


@pytest.mark.parametrize(
    "field",
    [b"Content-Length: 5, 5", b"Content-Length: 5\r\nContent-Length: 5", b"Content-Length: 5\r\ncontent-length: 5",
     b"A: b\r\n c", b"host: dvt", b"Content-Length: " + b"9" * 21],
)  # fmt: skip
def test_what_says_a_thing_twice_is_refused_even_where_both_say_the_same(field: bytes) -> None:
    with pytest.raises(BadRequest):
        Head.of(b"POST / HTTP/1.1\r\nHost: dvt\r\n" + field + b"\r\n\r\n")
