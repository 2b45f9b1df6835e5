"""Which files a command line means: those that it names, and the images below the folders that it names."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from server.documents import cause
from server.frontend.images import SUFFIXES


class FolderError(Exception):
    """A folder that cannot be looked through. The message, one line, names it."""


def image_files(named: Sequence[str]) -> Iterator[str]:
    """A file that is named is taken whatever it is, and whether or not it is there: that is its reader's to say. Of a
    folder those that are called like images, in order of their names; what begins with a dot is left out, links are
    followed. No list is made, so that a folder may hold any number. Raises FolderError."""
    for name in named:
        try:
            status = os.stat(name)
        except (OSError, ValueError):
            yield name
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _below(name, [(status.st_dev, status.st_ino)])
        else:
            yield name


def _below(folder: str, within: list[tuple[int, int]]) -> Iterator[str]:
    """`within`: this folder and those above it. A link back to one of these leads nowhere new."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(entry.name for entry in found if not entry.name.startswith("."))
    except OSError as error:
        raise FolderError(f"{folder}: {cause(error)}") from None
    for name in entries:
        path = os.path.join(folder, name)
        if os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.isdir(path):
            yield path
            continue
        try:
            status = os.stat(path)
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) and (status.st_dev, status.st_ino) not in within:
            yield from _below(path, [*within, (status.st_dev, status.st_ino)])
