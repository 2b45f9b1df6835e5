"""Files that somebody else may have written: read with a bound, parsed without surprises, refused in one line.

orjson refuses what Python's own parser would make of a document: NaN and numbers beyond a double, more than 1,024
levels, lone surrogates. `shown` is for error messages: the repr of a value of a document may be as long and as deep as
the document.
"""

from __future__ import annotations

import os
import reprlib
import stat
from pathlib import Path
from typing import Any

import orjson

SOUND_INTEGER = 2**53  # beyond it JSON's numbers are no longer whole for everybody
"""Versions and counts are below it."""


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; links are followed. Raises OSError, or ValueError with the
    cause in one line."""
    # A FIFO that nobody writes to would block: neither opening nor reading may wait.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is not a regular file")
        with open(descriptor, "rb", closefd=False) as stream:
            content = stream.read(most + 1)
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise ValueError(f"is larger than {most} bytes")
    return content


def parse_json(content: bytes) -> Any:
    """Raises ValueError with the cause in one line."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not readable as JSON ({error})") from None


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 160, 60


def shown(value: object) -> str:
    """The repr of a value, cut where it is long or deep."""
    return _SHORT.repr(value)


def cause(error: OSError | ValueError) -> str:
    """Why a file could not be read, in a few words."""
    return (error.strerror or type(error).__name__).lower() if isinstance(error, OSError) else str(error)
