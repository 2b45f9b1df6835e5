"""One file in base64 as people write it, decoded while it comes in.

Taken are what the living standard of the web calls forgiving base64 (blanks and line breaks anywhere, padding or none),
the URL-safe alphabet beside the standard one (RFC 4648, 5), and `data:` URLs. `binascii` holds the interpreter's lock,
in whatever thread it runs: decoding a piece at a time is what keeps the event loop from standing still, and spares the
memory of the text.
"""

from __future__ import annotations

import io
import re
from binascii import Error as BinasciiError
from binascii import a2b_base64

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BLANKS = b" \t\n\r\f"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_FOREIGN = re.compile(rb"[^A-Za-z0-9+/\-_= \t\n\r\f]")
_INK = re.compile(rb"[^ \t\n\r\f]")
_PADDING = (0, 0, 2, 1)  # `=` that may follow so many characters beyond whole groups of four

_SCHEME = b"data:"
_MAX_HEAD = 256  # characters of a data URL before its comma


class Base64Error(Exception):
    """It is no base64. The message completes "images[3] ...", and names the position, from 0, where there is one."""


class Base64Text:
    """Fed with pieces of the text, cut anywhere; `finish` gives the file. Raises Base64Error."""

    def __init__(self) -> None:
        self._file = io.BytesIO()  # grows in place, and gives its bytes away without a copy
        self._media_type: str | None = None
        self._head: bytes | None = b""  # while it may be that of a data URL
        self._at = 0  # characters before the next piece
        self._group = b""  # up to three characters that wait for the rest of their four
        self._padding: int | None = None  # `=` that may still come, once there was one

    def feed_plain(self, text: bytes) -> bool:
        """Take a piece of nothing but base64 as it should be; any other is not taken, and False."""
        if self._head is not None and (self._head or len(text) <= len(_SCHEME) or text[4:5] == b":"):
            return False  # it may be a data URL
        if self._padding is not None:
            return not text
        sextets = self._group + text
        whole = len(sextets) & ~3
        rest = sextets[whole:]
        try:
            octets = a2b_base64(memoryview(sextets)[:whole], strict_mode=True)
        except BinasciiError:
            return False
        padded = sextets[whole - 1 : whole] == b"="
        if rest and (padded or rest.strip(_ALPHABET)):
            return False
        self._file.write(octets)
        self._head = None
        self._group = rest
        self._at += len(text)
        if padded:
            self._padding = 0
        return True

    def feed(self, text: bytes) -> None:
        """Take a piece, whatever it looks like."""
        if self._head is None:
            if not self.feed_plain(text):
                self._feed_base64(text)
            return
        if not self._head:  # blanks before it count, but are not kept
            ink = text.lstrip(_BLANKS)
            self._at += len(text) - len(ink)
            text = ink
        head = self._head + text
        if _SCHEME.startswith(head[: len(_SCHEME)].lower()) and len(head) < len(_SCHEME):
            self._head = head
        elif head[: len(_SCHEME)].lower() != _SCHEME:
            self._head = None
            self.feed(head)
        elif (comma := head.find(b",", 0, _MAX_HEAD)) >= 0:
            self._media_type = _media_type(head[len(_SCHEME) : comma])
            self._head = None
            self._at += comma + 1
            self.feed(head[comma + 1 :])
        elif len(head) >= _MAX_HEAD:
            raise Base64Error(f"is a data URL without a comma in its first {_MAX_HEAD} characters")
        else:
            self._head = head

    def finish(self) -> tuple[bytes, str | None]:
        """The file, and the media type that a data URL states for it."""
        if self._head:
            if len(self._head) >= len(_SCHEME):
                raise Base64Error("is a data URL without a comma")
            head, self._head = self._head, None
            self.feed(head)
        if len(self._group) == 1:
            raise Base64Error("is not valid base64: its last character begins a byte that does not end")
        if self._group:
            self._file.write(a2b_base64(self._group + b"=" * (4 - len(self._group))))
        return self._file.getvalue(), self._media_type

    def _feed_base64(self, text: bytes) -> None:
        """With blanks, of the other alphabet, with padding; or with something wrong."""
        data = text.partition(b"=")[0] if self._padding is None else b""
        if found := _FOREIGN.search(data):
            self._refuse(text, found.start())
        sextets = self._group + data.translate(_STANDARD, _BLANKS)
        whole = len(sextets) & ~3
        self._file.write(a2b_base64(memoryview(sextets)[:whole]))
        self._group = sextets[whole:]
        if len(data) < len(text):
            if self._padding is None:
                self._padding = _PADDING[len(self._group)]
            for found in _INK.finditer(text, len(data)):  # ends at the third at the latest
                if found.group() != b"=" or self._padding == 0:
                    self._refuse(text, found.start())
                self._padding -= 1
        self._at += len(text)

    def _refuse(self, text: bytes, at: int) -> None:
        character = text[at : at + 1]
        shown = repr(character.decode("ascii")) if 0x20 <= character[0] < 0x7F else "a character"
        raise Base64Error(f"is not valid base64: {shown} at position {self._at + at}")


def _media_type(head: bytes) -> str | None:
    """Of `image/png;base64`, what stands between `data:` and the comma."""
    if not head.isascii():
        raise Base64Error("is a data URL with a media type beyond ASCII")
    media_type, *parameters = head.decode("ascii").split(";")
    if not parameters or parameters[-1].strip().lower() != "base64":
        raise Base64Error("is a data URL, but not one in base64 (data:image/png;base64,...)")
    return media_type.strip().lower() or None
