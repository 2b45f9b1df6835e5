"""The memory that a front end shares with the engine's process: counts, and slots of one image's pixels each.

It is made by the engine's process, has no name, and is given to the front end as a descriptor (memfd_create of Linux):
nothing is left behind, however either of them ends. Its size is sealed, so that no front end can take away what the
engine reads. What lies in it counts for that front end's own requests alone. It lives as long as an array of it does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from server.core import Pixels

_PAGE = mmap.PAGESIZE


class SharedMemory:
    def __init__(self, descriptor: int, *, cells: int, slots: int, input_size: tuple[int, int]) -> None:
        """What the descriptor stands for, as `create_memory` made it. The descriptor stays the caller's."""
        counts, size = _layout(cells, slots, input_size)
        mapped = mmap.mmap(descriptor, counts + size)
        self.cells = memoryview(mapped)[: 8 * cells].cast("d")
        self.pixels: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8, size, counts).reshape(slots, *input_size, 3)


def create_memory(*, cells: int, slots: int, input_size: tuple[int, int]) -> int:
    """A descriptor of such memory, all zero; pages that nobody has written to take no room."""
    descriptor = os.memfd_create("dvt-frontend", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, sum(_layout(cells, slots, input_size)))
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def _layout(cells: int, slots: int, input_size: tuple[int, int]) -> tuple[int, int]:
    """Bytes of the counts, in whole pages, and of the pixels."""
    return -(-8 * cells // _PAGE) * _PAGE, slots * input_size[0] * input_size[1] * 3


class FreeSlots:
    """The front end's list. The last one that came back goes first: its memory is in use, and in a cache."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots - 1, -1, -1))
        self._out: set[int] = set()

    def __len__(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """None where there are not so many: then nothing is taken."""
        if count > len(self._free):
            return None
        taken = self._free[-count:]
        del self._free[-count:]
        self._out.update(taken)
        return taken

    def give_back(self, slots: Iterable[int]) -> None:
        """Raises KeyError for one that is not out."""
        for slot in slots:
            self._out.remove(slot)
            self._free.append(slot)


def put(memory: SharedMemory, slots: Iterable[int], images: Iterable[Pixels]) -> None:
    for slot, pixels in zip(slots, images, strict=True):
        memory.pixels[slot] = pixels
