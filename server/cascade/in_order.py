"""A list that is in order at all times: what waits, the least first.

`bisect` on a plain list is as fast as it gets until the list is so long that to make room in it takes longer than all
else. So a long one is in parts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from itertools import chain
from typing import Generic, TypeVar

T = TypeVar("T", bound=tuple[object, ...])

_PART = 2048  # entries: 16 KiB to move at most


class InOrder(Generic[T]):
    """Tuples, no two of them equal. A shorter tuple that one begins with goes before it, as a place to look from."""

    def __init__(self) -> None:
        self._parts: list[list[T]] = [[]]  # none is empty, but for an only one
        self._bounds: list[T] = []  # of the second part and so on: nothing in it is less, all before it is

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self._parts)

    def __reversed__(self) -> Iterator[T]:
        return chain.from_iterable(map(reversed, reversed(self._parts)))

    @property
    def first(self) -> T | None:
        part = self._parts[0]
        return part[0] if part else None

    def add(self, entry: T) -> None:
        at = bisect_right(self._bounds, entry)
        part = self._parts[at]
        insort(part, entry)
        if len(part) > _PART:
            later = part[_PART // 2 :]
            del part[_PART // 2 :]
            self._parts.insert(at + 1, later)
            self._bounds.insert(at, later[0])

    def remove(self, entry: T) -> None:
        """Take this one out; it is there."""
        at = bisect_right(self._bounds, entry)
        part = self._parts[at]
        del part[bisect_left(part, entry)]
        if not part:
            self._drop(at)

    def take(self, count: int) -> list[T]:
        """Take out the first ones, so many or all."""
        taken: list[T] = []
        while len(taken) < count and (part := self._parts[0]):
            more = part[: count - len(taken)]
            taken += more
            del part[: len(more)]
            if not part:
                self._drop(0)
        return taken

    def seek(self, key: tuple[object, ...]) -> tuple[int, T | None]:
        """How many are less than this, and the first that is not."""
        at = bisect_left(self._bounds, key)
        part = self._parts[at]
        within = bisect_left(part, key)
        if within < len(part):
            first: T | None = part[within]
        else:
            first = self._parts[at + 1][0] if at + 1 < len(self._parts) else None
        return sum(map(len, self._parts[:at])) + within, first

    def _drop(self, at: int) -> None:
        """A part has become empty. What comes there goes to the part before it, or to the first."""
        if self._bounds:
            del self._parts[at]
            del self._bounds[max(0, at - 1)]
