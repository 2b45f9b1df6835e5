"""What the bytes of HTTP/1.1 must look like. No I/O, no clock.

A request's header is read by `Head.of`, a body in chunks by `Chunked`, an answer's header is written by `head_of`. Not
by a library: general parsers forgive what would have to be looked for again, and the one that is strict, h11, takes ten
times as long, for every request. The tests hold `Head` against it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from server.errors import BadRequest, HeaderTooLarge, HttpVersionNotSupported

MAX_HEADERS = 128

_REQUEST_LINE = re.compile(rb"[!-~]+ [!-~]+ HTTP/([0-9]\.[0-9])\r\n")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # of a method or a header: RFC 9110's token
_LENGTH = re.compile(rb"[0-9]{1,20}")
_ALONE = frozenset((b"host", b"content-length", b"transfer-encoding"))  # what two headers must not say twice
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)")
_CHUNK_HEADER = re.compile(rb"([0-9A-Fa-f]{1,16})[\t ]*(?:;[\t -~\x80-\xff]*)?\r\n")
_TRAILERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*\r\n")
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus if status >= 200
}


@dataclass(slots=True)
class Head:
    """The header of a request."""

    method: bytes
    target: bytes
    version: bytes  # 1.0 or 1.1
    headers: list[tuple[bytes, bytes]]  # as they came; names in lower case, values without the blanks around them
    given: dict[bytes, bytes]  # the same by name; of one that came several times the last
    length: int | None  # bytes of the body; None where it comes in chunks

    @classmethod
    def of(cls, lines: bytes) -> Head:
        """From the first byte to the empty line. Raises ServeError for what is not valid, or leaves open where the
        request ends."""
        check_lines(lines)
        first, *fields = lines[:-4].split(b"\r\n")
        method, target, version = first.split(b" ")
        if not _NAME.fullmatch(method):
            raise BadRequest("The header is not valid: the method is none")
        headers = []
        for field in fields:
            name, colon, value = field.partition(b":")
            if not colon or not _NAME.fullmatch(name):  # a line that goes on from the one before has no name either
                raise BadRequest("The header is not valid: a line is no `name: value`")
            headers.append((name.lower(), value.strip(b" \t")))
        given = dict(headers)
        if len(given) < len(headers):
            for name in _ALONE & given.keys():
                if sum(found == name for found, _ in headers) > 1:
                    raise BadRequest(f"The header is not valid: {name.decode()} is there twice")
        version = version[5:]
        if b"host" not in given and version == b"1.1":
            raise BadRequest("The header is not valid: there is no Host")
        return cls(method, target, version, headers, given, _length(given, version))


def _length(given: dict[bytes, bytes], version: bytes) -> int | None:
    coding, stated = given.get(b"transfer-encoding"), given.get(b"content-length")
    if coding is not None:
        if stated is not None or version == b"1.0":
            raise BadRequest("A body has a Content-Length or, in HTTP/1.1, a Transfer-Encoding; not both")
        if coding.lower() != b"chunked":
            raise BadRequest("The header is not valid: there is no Transfer-Encoding but chunked")
        return None
    if stated is None:
        return 0
    if not _LENGTH.fullmatch(stated):
        raise BadRequest("The header is not valid: the Content-Length is no number")
    return int(stated)


class Chunked:
    """A body in chunks (RFC 9112, 7.1), whose trailers are dropped: nobody has a use for them.

    Not h11's, whose expressions look at every blank of a line as often as there are blanks.
    """

    def __init__(self, most: int) -> None:
        """`most`: bytes of a chunk's header, and of all trailers."""
        self.count = 0  # chunks that began
        self._most = most
        self._buffer = bytearray()
        self._searched = 0  # so many bytes of it were looked at, and do not end what is to come
        self._left = 0  # bytes of the chunk that are to come
        self._in_chunk = self._in_trailers = False

    def feed(self, data: bytes) -> None:
        self._buffer += data

    @property
    def rest(self) -> bytes:
        """What came behind the body, once it has ended."""
        return bytes(self._buffer)

    def next(self) -> bytes | None:
        """Bytes of the body, none where it ends; None where more must come. Raises BadRequest, HeaderTooLarge."""
        if self._in_chunk and not self._left:
            if len(self._buffer) < 2:
                return None
            if self._cut(2) != b"\r\n":
                raise BadRequest("The body is not valid: a chunk is longer than its header says")
            self._in_chunk = False
        if not self._in_chunk and not self._in_trailers:
            line = self._until(b"\r\n")
            if line is None:
                return None
            header = _CHUNK_HEADER.fullmatch(line)
            if header is None:
                raise BadRequest("The body is not valid: a chunk's header is none")
            self.count += 1
            self._left = int(header[1], 16)
            self._in_chunk = self._left > 0
            self._in_trailers = not self._in_chunk
        if self._in_trailers:
            lines = self._cut(2) if self._buffer.startswith(b"\r\n") else self._until(b"\r\n\r\n")
            if lines is not None and not _TRAILERS.fullmatch(lines):
                raise BadRequest("The body is not valid: its trailers are none")
            return None if lines is None else b""
        data = self._cut(min(self._left, len(self._buffer)))
        self._left -= len(data)
        return data or None

    def _until(self, end: bytes) -> bytes | None:
        found = self._buffer.find(end, max(0, self._searched - len(end) + 1))
        self._searched = len(self._buffer) if found < 0 else 0
        if (len(self._buffer) if found < 0 else found + len(end)) > self._most:
            raise HeaderTooLarge("The header of a chunk, or the trailers, are larger than a header may be")
        return None if found < 0 else self._cut(found + len(end))

    def _cut(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


def check_lines(lines: bytes) -> None:
    """What no header may have: bare LFs, control characters, too many lines, no request line at its head, versions
    that there are not. Raises ServeError.

    `lines` may end anywhere: what can never become a request is refused before it is there.
    """
    ends = lines.count(b"\r\n")
    if lines.count(b"\n") != ends:
        raise BadRequest("A line of the header ends in a bare line feed")
    if _CONTROL.search(lines):
        raise BadRequest("The header has a control character")
    if ends > MAX_HEADERS + 2:
        raise HeaderTooLarge(f"There are more than {MAX_HEADERS} headers")
    if ends:
        line = _REQUEST_LINE.match(lines)
        if line is None:
            raise BadRequest("The first line is no request line of HTTP/1.1")
        if line[1] not in (b"1.0", b"1.1"):
            raise HttpVersionNotSupported(f"HTTP/{line[1].decode()} is not spoken here: use HTTP/1.1")


def head_of(status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    parts = [_STATUS_LINES[status]]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n")
    head = b"".join(parts)
    assert head.count(b"\n") == len(headers) + 2, "a header is one line"
    return head
