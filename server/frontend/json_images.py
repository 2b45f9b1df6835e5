"""`{"images": ["<base64>", ...]}`, read while it comes in.

A JSON parser builds whatever a stranger writes before anybody can say no: millions of lists, seconds of the
interpreter's lock, a gigabyte. Here the grammar is fixed. The first thing that is none of it is refused there and then,
and nothing is kept but the images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from server.errors import InvalidRequest, TooManyImages
from server.frontend.base64_text import Base64Error, Base64Text
from server.frontend.images import EncodedImage

_SHAPE = 'The body must be {"images": ["<base64>", ...]} and nothing else'
_BLANKS = re.compile(rb"[ \t\n\r]*+")
_VALUE = b'{["-0123456789tfn'  # what a value may begin with

_KEY = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_MAX_KEY = len('"images"') + 5 * len("images")  # with every letter as \u0069
_ESCAPED = re.compile(rb'(?:[^"\\\x00-\x1f\x80-\xff]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
_BEGUN = re.compile(rb"\\(?:u[0-9a-fA-F]{0,3})?\Z")  # an escape that the next chunk ends
_CONTROL = re.compile(rb"[\x00-\x1f]")


class JsonImages:
    """Fed with the body, cut anywhere; `finish` gives the images. Raises InvalidRequest and TooManyImages."""

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._images: list[EncodedImage] = []
        self._text = Base64Text()  # of the image that is read
        self._state: Callable[[bytes, int], int] = self._object  # takes what is at that place, and says how far
        self._before = 0  # bytes before this chunk
        self._cut = b""  # the end of the last chunk, where it cannot be told without the next; a few bytes

    def feed(self, chunk: bytes) -> None:
        if self._cut:
            self._before -= len(self._cut)
            chunk, self._cut = self._cut + chunk, b""
        at = 0
        while at < len(chunk):
            if self._state != self._string and (found := _BLANKS.match(chunk, at)):
                at = found.end()
            if at < len(chunk):
                at = self._state(chunk, at)
        self._before += len(chunk)

    def finish(self) -> list[EncodedImage]:
        if self._state != self._nothing:
            raise InvalidRequest(f"The body is not valid JSON: it ends too early, after {self._before} bytes")
        return self._images

    # The states, in the order of the document. Each is called with something there that is not blank.

    def _object(self, chunk: bytes, at: int) -> int:
        self._expect(b"{", chunk, at, _SHAPE)
        self._state = self._key
        return at + 1

    def _key(self, chunk: bytes, at: int) -> int:
        if chunk[at : at + 1] == b"}":
            raise InvalidRequest(_SHAPE, field="images")
        if chunk[at : at + 1] != b'"':
            raise self._invalid(at)
        found = _KEY.match(chunk, at, at + _MAX_KEY)
        if found is None:
            if len(chunk) - at >= _MAX_KEY:
                raise InvalidRequest(_SHAPE, field="images")
            self._cut = chunk[at:]
            return len(chunk)
        try:
            key = json.loads(found.group().decode())
        except ValueError:  # a UnicodeDecodeError is one
            raise self._invalid(at) from None
        if key != "images":
            raise InvalidRequest(_SHAPE, field="images")
        self._state = self._colon
        return found.end()

    def _colon(self, chunk: bytes, at: int) -> int:
        if chunk[at : at + 1] != b":":
            raise self._invalid(at)
        self._state = self._list
        return at + 1

    def _list(self, chunk: bytes, at: int) -> int:
        self._expect(b"[", chunk, at, "`images` must be a list with at least one image")
        self._state = self._first
        return at + 1

    def _first(self, chunk: bytes, at: int) -> int:
        if chunk[at : at + 1] == b"]":
            raise InvalidRequest("`images` must be a list with at least one image", field="images")
        return self._image(chunk, at)

    def _image(self, chunk: bytes, at: int) -> int:
        index = len(self._images)
        if index == self._max_images and chunk[at] in _VALUE:
            raise TooManyImages(f"More than {self._max_images} images", max_images=self._max_images)
        self._expect(b'"', chunk, at, f"images[{index}] is not a string", index=index)
        self._text = Base64Text()
        self._state = self._string
        return at + 1

    def _string(self, chunk: bytes, at: int) -> int:
        try:
            at = self._read_string(chunk, at)
            if chunk[at : at + 1] == b'"':
                self._images.append(self._text.finish())
                self._state = self._after_image
                at += 1
        except Base64Error as error:
            index = len(self._images)
            raise InvalidRequest(f"images[{index}] {error}", field="images", index=index) from None
        return at

    def _after_image(self, chunk: bytes, at: int) -> int:
        if chunk[at : at + 1] == b",":
            self._state = self._image
        elif chunk[at : at + 1] == b"]":
            self._state = self._end
        else:
            raise self._invalid(at)
        return at + 1

    def _end(self, chunk: bytes, at: int) -> int:
        if chunk[at : at + 1] == b",":
            raise InvalidRequest(_SHAPE, field="images")
        if chunk[at : at + 1] != b"}":
            raise self._invalid(at)
        self._state = self._nothing
        return at + 1

    def _nothing(self, chunk: bytes, at: int) -> int:  # noqa: ARG002 - a state
        raise self._invalid(at)

    def _read_string(self, chunk: bytes, at: int) -> int:
        """Take the text of an image as far as it goes, to its quotation mark or the end of the chunk."""
        end = chunk.find(b'"', at)
        if end < 0:
            end = len(chunk)
        if chunk.find(b"\\", at, end) < 0:
            text = chunk[at:end]
            if not self._text.feed_plain(text):
                found = _CONTROL.search(text)
                self._text.feed(text[: found.start()] if found else text)
                if found:
                    raise self._invalid(at + found.start())
            return end
        found = _ESCAPED.match(chunk, at)
        end = at if found is None else found.end()
        self._text.feed(json.loads(f'"{chunk[at:end].decode("ascii")}"').encode("utf-8", "surrogatepass"))
        if end == len(chunk) or chunk[end] == ord('"'):
            return end
        if _BEGUN.match(chunk, end):
            self._cut = chunk[end:]
            return len(chunk)
        if chunk[end] < 0x80:  # an escape that is none, or a bare control character
            raise self._invalid(end)
        self._text.feed(chunk[end : end + 1])
        return end + 1

    # What is wrong

    def _expect(self, character: bytes, chunk: bytes, at: int, otherwise: str, **extra: int) -> None:
        if chunk[at : at + 1] == character:
            return
        if chunk[at] in _VALUE:
            raise InvalidRequest(otherwise, field="images", **extra)
        raise self._invalid(at)

    def _invalid(self, at: int) -> InvalidRequest:
        return InvalidRequest(f"The body is not valid JSON: byte {self._before + at} should not be there")
