"""From the body of a request to the bytes of its images: streamed, counted, bounded in size, number and time.

Nothing here decodes an image, and nothing trusts a length that a client states: bytes are counted as they come. A
stated Content-Length that is already too large is refused before anything is read.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Receive

from server.errors import BodyTooLarge, InvalidRequest, Overloaded, UnsupportedMediaType
from server.frontend.edge import ClientLeft
from server.frontend.forms import FormFiles
from server.frontend.images import EncodedImage
from server.frontend.json_images import JsonImages

MULTIPART = "multipart/form-data"
JSON = "application/json"

Headers = Mapping[bytes, bytes]  # names in lower case, as ASGI has them


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
    headers: Headers, receive: Receive, limits: BodyLimits, hold: Callable[[int], None]
) -> list[EncodedImage]:
    """The images of a request, in order, from any of the three body forms.

    `hold` is told of every byte that stays in memory. Raises UnsupportedMediaType, BodyTooLarge, TooManyImages,
    Overloaded, InvalidRequest or ClientLeft, and what `connection.Exchange.receive` raises.
    """
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in (MULTIPART, JSON):
        form = FormFiles(content_type, limits.max_images) if media_type == MULTIPART else JsonImages(limits.max_images)
        await _read(headers, receive, limits, hold, form.feed)
        return form.finish()
    if not media_type.startswith("image/") and media_type != "application/octet-stream":
        raise UnsupportedMediaType(
            f"{media_type[:60]!r} is not taken: send an image, {MULTIPART} or {JSON}"
            if media_type
            else f"There is no Content-Type: send an image, {MULTIPART} or {JSON}"
        )
    return [(await _read_whole(headers, receive, limits, hold), media_type)]


async def read_json(headers: Headers, receive: Receive, limits: BodyLimits) -> Any:
    """A small JSON document. Raises what `read_images` raises for a body."""
    media_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if media_type != JSON:
        raise UnsupportedMediaType(f"Content-Type must be {JSON}")
    body = await _read_whole(headers, receive, limits, lambda _: None)
    try:
        return orjson.loads(body)  # bounds the depth (1,024) by itself, and takes no NaN
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None


async def _read_whole(headers: Headers, receive: Receive, limits: BodyLimits, hold: Callable[[int], None]) -> bytes:
    body = io.BytesIO()  # a list of chunks would cost a client's single bytes forty times their size
    await _read(headers, receive, limits, hold, body.write)
    return body.getvalue()


async def _read(
    headers: Headers,
    receive: Receive,
    limits: BodyLimits,
    hold: Callable[[int], None],
    take: Callable[[bytes], object],
) -> None:
    """Give the body to `take` as it comes: at most `max_bytes`, never in an encoding. How long it may take is the
    connection's to say."""
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType(f"Content-Encoding {encoding[:40]!r} is not taken: send the body as it is")
    stated = headers.get(b"content-length", b"").decode("latin-1")
    if _is_above(stated, limits.max_bytes):
        raise BodyTooLarge(f"More than {limits.max_bytes} bytes are stated", max_bytes=limits.max_bytes)
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


def _is_above(stated: str, limit: int) -> bool:
    """Whether a Content-Length states more. Not with `int` alone: it takes other scripts, and not 5,000 digits."""
    digits = stated.lstrip("0")
    return bool(re.fullmatch(r"[0-9]+", digits)) and (len(digits) > 18 or int(digits) > limit)
