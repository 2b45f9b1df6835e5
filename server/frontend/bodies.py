"""From the body of a request to the bytes of its images: streamed, counted, bounded in size, number and time.

Nothing here decodes an image, and nothing trusts a length that a client states: bytes are counted as they come. A
stated Content-Length that is already too large is refused before anything is read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from server.errors import BodyTooLarge, InvalidRequest, Overloaded, TooManyImages, UnsupportedMediaType
from server.frontend.edge import ClientLeft

MULTIPART = "multipart/form-data"
JSON = "application/json"
PART = "image"  # the name of every part

_MAX_PART_HEADERS = 16

Headers = Mapping[bytes, bytes]  # names in lower case, as ASGI has them
EncodedImage = tuple[bytes, str | None]  # the file, and the media type that the client states for it


@dataclass(frozen=True, slots=True)
class BodyLimits:
    max_bytes: int
    max_images: int


class Intake:
    """Owns the count of requests in the server and of body bytes in memory. Full means refused.

    A request counts when its body is there: who sends slowly takes a connection, and no request's place.
    """

    def __init__(self, max_requests: int, max_held_bytes: int) -> None:
        self.requests = 0
        self.held_bytes = 0
        self._visits = 0  # requests, and those whose body is on its way
        self._max_requests = max_requests
        self._max_held_bytes = max_held_bytes
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> Visit:
        """A request whose header is there. Use it as a context manager."""
        self._visits += 1
        self._idle.clear()
        return Visit(self)

    async def wait_idle(self) -> None:
        """Until no request is in the server, nor on its way into it."""
        await self._idle.wait()

    def _begin(self) -> None:
        if self.requests >= self._max_requests:
            raise Overloaded(f"{self.requests} requests are in the server already", retry_after_s=1)
        self.requests += 1

    def _take(self, size: int) -> None:
        if self.held_bytes + size > self._max_held_bytes:
            raise Overloaded("request bodies fill the memory that is set aside for them", retry_after_s=1)
        self.held_bytes += size

    def _leave(self, held: int, began: bool) -> None:
        self.held_bytes -= held
        self.requests -= began
        self._visits -= 1
        if self._visits == 0:
            self._idle.set()


class Visit:
    """One request's share of the intake."""

    __slots__ = ("_began", "_held", "_intake")

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._held = 0
        self._began = False

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *error: object) -> None:
        self._intake._leave(self._held, self._began)

    def hold(self, size: int) -> None:
        """Raises Overloaded where the memory set aside for bodies is full."""
        self._intake._take(size)
        self._held += size

    def begin(self) -> None:
        """The body is there. Raises Overloaded where as many requests as may be are in the server."""
        self._intake._begin()
        self._began = True


async def read_images(
    headers: Headers,
    receive: Receive,
    limits: BodyLimits,
    hold: Callable[[int], None],
    in_thread: Callable[..., Awaitable[Any]],
) -> list[EncodedImage]:
    """The images of a request, in order, from any of the three body forms.

    `hold` is told of every byte that stays in memory. `in_thread(function, *arguments)` runs what would block.
    Raises UnsupportedMediaType, BodyTooLarge, TooManyImages, Overloaded, InvalidRequest or ClientLeft, and what
    `connection.Exchange.receive` raises.
    """
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == MULTIPART:
        parts = _Parts(content_type, limits.max_images)
        await _read(headers, receive, limits, hold, parts.feed)
        return parts.finish()
    chunks: list[bytes] = []
    if media_type == JSON:
        await _read(headers, receive, limits, hold, chunks.append)
        images: list[EncodedImage] = await in_thread(_images_of_json, b"".join(chunks), limits.max_images)
        return images
    if not media_type.startswith("image/") and media_type != "application/octet-stream":
        raise UnsupportedMediaType(
            f"{media_type[:60]!r} is not taken: send an image, {MULTIPART} or {JSON}"
            if media_type
            else f"There is no Content-Type: send an image, {MULTIPART} or {JSON}"
        )
    await _read(headers, receive, limits, hold, chunks.append)
    return [(chunks[0] if len(chunks) == 1 else b"".join(chunks), media_type)]


async def read_json(headers: Headers, receive: Receive, limits: BodyLimits) -> Any:
    """A small JSON document. Raises what `read_images` raises for a body."""
    media_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if media_type != JSON:
        raise UnsupportedMediaType(f"Content-Type must be {JSON}")
    chunks: list[bytes] = []
    await _read(headers, receive, limits, lambda _: None, chunks.append)
    return _parse_json(b"".join(chunks))


async def _read(
    headers: Headers,
    receive: Receive,
    limits: BodyLimits,
    hold: Callable[[int], None],
    take: Callable[[bytes], None],
) -> None:
    """Give the body to `take` as it comes: at most `max_bytes`, never in an encoding. How long it may take is the
    connection's to say."""
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType(f"Content-Encoding {encoding[:40]!r} is not taken: send the body as it is")
    stated = headers.get(b"content-length", b"").decode("latin-1")
    if stated.isdecimal() and int(stated) > limits.max_bytes:
        raise BodyTooLarge(f"{stated} bytes are stated, {limits.max_bytes} are allowed", max_bytes=limits.max_bytes)
    received = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunk: bytes = message.get("body", b"")
        received += len(chunk)
        if received > limits.max_bytes:
            raise BodyTooLarge(f"More than {limits.max_bytes} bytes", max_bytes=limits.max_bytes)
        if chunk:
            hold(len(chunk))
            take(chunk)
        if not message.get("more_body", False):
            return


class _Parts:
    """The files of a multipart body, gathered while they stream in.

    Starlette's own form parser would spool every file through a temporary file; images are short, and bounded.
    """

    def __init__(self, content_type: str, max_images: int) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise InvalidRequest("The multipart Content-Type names no boundary")
        self._max_images = max_images
        self._images: list[EncodedImage] = []
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._finished,
                },
            )
        except FormParserError as error:
            raise InvalidRequest(f"The multipart boundary is not valid: {error}") from None

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart body is not valid: {error}") from None

    def finish(self) -> list[EncodedImage]:
        if not self._ended:
            raise InvalidRequest("The multipart body ends before its last boundary")
        if not self._images:
            raise InvalidRequest(f"The multipart body has no part named `{PART}`")
        return self._images

    # The parser's callbacks; data comes in slices of the chunk.

    def _begin(self) -> None:
        if len(self._images) == self._max_images:
            raise TooManyImages(f"More than {self._max_images} images", max_images=self._max_images)
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._file: list[bytes] = []

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if len(self._headers) >= _MAX_PART_HEADERS:
            raise InvalidRequest(f"A part has more than {_MAX_PART_HEADERS} headers")
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _headers_end(self) -> None:
        name = parse_options_header(self._headers.get(b"content-disposition", b""))[1].get(b"name", b"")
        if name != PART.encode():
            shown = name[:40].decode("ascii", "replace")
            raise InvalidRequest(f"Every part must be named `{PART}`; one is named {shown!r}")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._file.append(data[start:end])

    def _end(self) -> None:
        media_type = self._headers.get(b"content-type", b"").decode("latin-1") or None
        self._images.append((b"".join(self._file), media_type))

    def _finished(self) -> None:
        self._ended = True


def _images_of_json(body: bytes, max_images: int) -> list[EncodedImage]:
    """`{"images": ["<base64>", ...]}`."""
    document = _parse_json(body)
    if not isinstance(document, dict) or document.keys() != {"images"}:
        raise InvalidRequest('The body must be {"images": ["<base64>", ...]} and nothing else', field="images")
    texts = document["images"]
    if not isinstance(texts, list) or not texts:
        raise InvalidRequest("`images` must be a list with at least one image", field="images")
    if len(texts) > max_images:
        raise TooManyImages(f"{len(texts)} images, {max_images} are allowed", max_images=max_images)
    images: list[EncodedImage] = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequest(f"images[{index}] is not a string", field="images", index=index)
        try:
            images.append((base64.b64decode(text, validate=True), None))
        except (binascii.Error, ValueError):
            raise InvalidRequest(f"images[{index}] is not valid base64", field="images", index=index) from None
    return images


def _parse_json(body: bytes) -> Any:
    """orjson bounds the depth (1,024) by itself, and takes no NaN."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
