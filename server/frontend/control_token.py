"""The bearer token of control routes, from a file that may change while the server runs."""

from __future__ import annotations

import hmac
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from server.documents import cause, read_file
from server.errors import Forbidden, Unauthorized

log = logging.getLogger(__name__)

_MOST = 4096
_Signature = tuple[int, int, int, int] | None
_TOKEN = re.compile(rb"[A-Za-z0-9\-._~+/]+=*")  # RFC 6750, 2.1


class ControlToken:
    """Read anew when the file is another one (its number, size or times): secrets are rotated by a new file or link.

    While the new one cannot be used the old token counts, and the log says so once.
    """

    def __init__(self, file: Path | None) -> None:
        """Without a file no token is asked for. Raises ValueError, in one line, for a file that cannot be used."""
        self._file = file
        self._seen: _Signature = None  # of the file that was read
        self._warned: _Signature = None  # of one that could not be
        self._token = b""
        if file is not None:
            self._seen, self._token = _signature(file), _read(file)

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises Unauthorized, Forbidden."""
        if self._file is None:
            return
        self._follow(self._file)
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not given.strip():
            raise Unauthorized("This route asks for a bearer token")
        if not hmac.compare_digest(given.strip(), self._token):
            raise Forbidden("The bearer token is not the one that is set")

    def _follow(self, file: Path) -> None:
        signature = _signature(file)
        if signature == self._seen:
            return
        try:
            self._token = _read(file)
        except ValueError as error:
            if signature != self._warned:
                log.warning("the control token stays as it was: %s: %s", file, error)
            self._warned = signature
        else:
            self._seen = signature
            log.info("the control token was read anew")


def _signature(file: Path) -> _Signature:
    """What tells one file from another at a path, links followed; None where there is none."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(file: Path) -> bytes:
    """Raises ValueError with the cause in one line; never with what stands in the file."""
    try:
        token = read_file(file, _MOST).strip()
    except OSError as error:
        raise ValueError(cause(error)) from None
    if not token:
        raise ValueError("the file is empty")
    if not _TOKEN.fullmatch(token):
        raise ValueError("a token is one line of ASCII letters, digits and -._~+/, with = at its end at most")
    return token
