"""Who holds which reuse state: the table behind an engine's slots."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import count
from typing import Generic, TypeVar

from server.core import Slot

State = TypeVar("State")


class SlotTable(Generic[State]):
    """States by slot. A slot is never given twice. Safe to call from several threads."""

    def __init__(self) -> None:
        self._states: dict[Slot, State] = {}
        self._lock = threading.Lock()
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._states)

    def read(self, slots: Sequence[Slot]) -> list[State]:
        """Raises KeyError for a slot that is not in use."""
        with self._lock:
            return [self._states[slot] for slot in slots]

    def swap(self, given_back: Sequence[Slot], states: Sequence[State | None]) -> list[Slot | None]:
        """Free the slots of a batch and take new ones for what it leaves, in one step; None keeps nothing.

        Raises KeyError, and changes nothing, for a slot that is not in use.
        """
        with self._lock:
            self._remove(given_back)
            taken: list[Slot | None] = []
            for state in states:
                if state is None:
                    taken.append(None)
                    continue
                slot = Slot(next(self._numbers))
                self._states[slot] = state
                taken.append(slot)
            return taken

    def free(self, slots: Sequence[Slot]) -> None:
        """Raises KeyError, and changes nothing, for a slot that is not in use."""
        with self._lock:
            self._remove(slots)

    def clear(self) -> None:
        with self._lock:
            self._states.clear()

    def _remove(self, slots: Sequence[Slot]) -> None:
        if missing := [slot for slot in slots if slot not in self._states]:
            raise KeyError(f"not in use: {missing}")
        if len(set(slots)) < len(slots):
            raise KeyError(f"twice in one call: {list(slots)}")
        for slot in slots:
            del self._states[slot]
