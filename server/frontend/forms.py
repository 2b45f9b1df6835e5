"""The files of a `multipart/form-data` body (RFC 7578, RFC 2046), gathered while they stream in.

By hand, as python-multipart takes neither a preamble nor blanks behind the first boundary, logs what clients do wrong,
and walks byte by byte through lines that begin like a boundary: six seconds for 30 MiB of them. Here the body is only
ever searched. What is kept beside the files is at most the headers of one part.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from python_multipart.multipart import parse_options_header

from server.errors import InvalidRequest, TooManyImages, UnsupportedMediaType
from server.frontend.images import EncodedImage

PART = "image"  # the documented name; others are taken

_MAX_BOUNDARY = 256  # bytes; 70 by the book
_MAX_PADDING = 256  # blanks between a boundary and the end of its line
_MAX_PART_HEADERS = 16
_MAX_HEADER_BYTES = 8192  # of all headers of a part
_PADDING = re.compile(rb"[ \t]*+")
_AS_IT_IS = (b"", b"7bit", b"8bit", b"binary")  # Content-Transfer-Encoding, which browsers do not send at all
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")


class FormFiles:
    """Fed with the body, cut anywhere; `finish` gives the files, in order.

    Raises InvalidRequest, TooManyImages and UnsupportedMediaType.
    """

    def __init__(self, content_type: str, max_images: int) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise InvalidRequest("The multipart Content-Type names no boundary")
        if len(boundary) > _MAX_BOUNDARY:
            raise InvalidRequest(f"The multipart boundary is longer than {_MAX_BOUNDARY} bytes")
        self._delimiter = b"\r\n--" + boundary
        self._max_images = max_images
        self._files: list[EncodedImage] = []
        self._file: io.BytesIO | None = None  # that of the part; none in the preamble
        self._media_type: str | None = None
        # Read, and not yet told apart from `_at` on; begun with what makes the first line one that may be a boundary.
        self._kept, self._at = b"\r\n", 0
        self._state: Callable[[], bool] = self._content  # says whether it can be asked again before the next chunk

    def feed(self, chunk: bytes) -> None:
        rest = self._kept[self._at :]
        self._kept, self._at = rest + chunk if rest else chunk, 0
        while self._state():
            pass

    def finish(self) -> list[EncodedImage]:
        if self._state != self._epilogue:
            raise InvalidRequest("The multipart body ends before its last boundary")
        if not self._files:
            raise InvalidRequest(f"The multipart body has no file; the documented name of a part is `{PART}`")
        return self._files

    # The states. A boundary is the delimiter at the beginning of a line, whatever follows on it.

    def _content(self) -> bool:
        """Of a part, or the preamble."""
        found = self._kept.find(self._delimiter, self._at)
        end = found
        if found < 0:  # but its beginning may be there
            end = self._kept.find(b"\r", max(self._at, len(self._kept) - len(self._delimiter) + 1))
            end = end if end >= 0 else len(self._kept)
        if self._file is not None:
            self._file.write(memoryview(self._kept)[self._at : end])
        self._at = end
        if found < 0:
            return False
        if self._file is not None:
            self._files.append((self._file.getvalue(), self._media_type))
            self._file = None
        self._at += len(self._delimiter)
        self._state = self._boundary
        return True

    def _boundary(self) -> bool:
        """Behind the delimiter: two dashes end the body, the end of the line begins a part."""
        if self._kept.startswith(b"--", self._at):
            self._state = self._epilogue
            return True
        found = _PADDING.match(self._kept, self._at)
        end = self._at if found is None else found.end()
        if end - self._at > _MAX_PADDING:
            raise InvalidRequest(f"More than {_MAX_PADDING} blanks follow a multipart boundary")
        if len(self._kept) - end < 2:
            return False
        if not self._kept.startswith(b"\r\n", end):
            raise InvalidRequest("A line of the multipart body begins with the boundary, but goes on")
        if len(self._files) == self._max_images:
            raise TooManyImages(f"More than {self._max_images} images", max_images=self._max_images)
        self._at = end  # with the line end, which the empty line may follow at once
        self._state = self._headers
        return True

    def _headers(self) -> bool:
        end = self._kept.find(b"\r\n\r\n", self._at, self._at + _MAX_HEADER_BYTES)
        if end < 0:
            if len(self._kept) - self._at >= _MAX_HEADER_BYTES:
                raise InvalidRequest(f"The headers of a part are longer than {_MAX_HEADER_BYTES} bytes")
            return False
        self._media_type = _media_type_of(_parse_headers(self._kept[self._at + 2 : end]))
        self._file = io.BytesIO()  # grows in place, and gives its bytes away without a copy
        self._at = end + 4
        self._state = self._content
        return True

    def _epilogue(self) -> bool:
        self._at = len(self._kept)
        return False


def _parse_headers(lines: bytes) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for number, line in enumerate(lines.split(b"\r\n") if lines else ()):
        if number == _MAX_PART_HEADERS:
            raise InvalidRequest(f"A part has more than {_MAX_PART_HEADERS} headers")
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.match(name):
            raise InvalidRequest(f"A header of a part is not valid: {_shown(line)}")
        headers[name.lower()] = value.strip(b" \t")
    return headers


def _media_type_of(headers: dict[bytes, bytes]) -> str | None:
    """What the headers of a part state for its file. Raises InvalidRequest for a part that is no file."""
    disposition = headers.get(b"content-disposition", b"")
    options = parse_options_header(disposition)[1]
    name = options.get(b"name", b"")
    media_type = headers.get(b"content-type", b"").decode("latin-1")
    told = media_type.partition(";")[0].strip().lower()
    is_file = (
        name == PART.encode()
        or b"filename" in options
        or b"filename*=" in disposition.lower()  # which the standard forbids, and older clients send
        or told.startswith("image/")
        or told == "application/octet-stream"
    )
    if not is_file:
        raise InvalidRequest(
            f"Every part must be an image file; {_shown(name)} is a text field" if name else "A part has no name",
            field=name[:40].decode("utf-8", "replace"),
        )
    encoding = headers.get(b"content-transfer-encoding", b"").lower()
    if encoding not in _AS_IT_IS:
        raise UnsupportedMediaType(f"Content-Transfer-Encoding {_shown(encoding)} is not taken: send files as they are")
    return media_type or None


def _shown(text: bytes) -> str:
    return repr(text[:40].decode("utf-8", "replace"))
