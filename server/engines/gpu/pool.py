"""Who holds which row of the reuse state that lies on the device: the book-keeping, nothing of the device itself.

There is one store for each boundary between stages: boundary s holds what stage s leaves for stage s + 1. A store has a
fixed number of rows. A run reserves a row for everything that it may leave before anything is launched, so that what
survives finds its place on the device, without asking the host; what did not survive gives its row back.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from server.core import Slot


class SlotsExhausted(Exception):
    """More states than there are rows. Whoever runs batches sees to it that this does not happen: `max_slots`."""


@dataclass(frozen=True, slots=True, eq=False)
class Loan:
    """What a run was lent: the slots it reads, with their rows, and the rows it may write."""

    slots: tuple[Slot, ...]
    sources: tuple[int, ...]  # rows at the boundary before the stage; empty for the first
    boundary: int  # after the stage
    reserved: tuple[int, ...]  # rows there; empty for the last


class SlotPool:
    """Rows by slot. A slot is never given twice; a row is, once nobody reads it any more. Safe to call from several
    threads. While a run reads a slot, nobody else can have it or free it."""

    def __init__(self, boundaries: int, rows: int) -> None:
        self.rows = rows  # at each boundary
        self._held: dict[Slot, tuple[int, int]] = {}  # boundary, row
        self._lent: dict[Slot, tuple[int, int]] = {}
        # Stacks: a row that was just freed is likely to be in the device's cache.
        self._free = [list(reversed(range(rows))) for _ in range(boundaries)]
        self._lock = threading.Lock()
        self._numbers = count()

    def __len__(self) -> int:
        with self._lock:
            return len(self._held) + len(self._lent)

    def lend(self, stage: int, slots: Sequence[Slot], size: int) -> Loan:
        """For a batch of `size` rows of `stage`, from 1.

        Raises KeyError for a slot that is not in use, in another run or of another stage, and SlotsExhausted; changes
        nothing then.
        """
        with self._lock:
            self._check(slots, boundary=stage - 1)
            last = stage > len(self._free)
            free = [] if last else self._free[stage - 1]
            if not last and len(free) < size:
                raise SlotsExhausted(f"stage {stage} may leave {size} states, {len(free)} of {self.rows} rows are free")
            reserved = () if last else tuple(free.pop() for _ in range(size))
            for slot in slots:
                self._lent[slot] = self._held.pop(slot)
            return Loan(tuple(slots), tuple(self._lent[slot][1] for slot in slots), stage, reserved)

    def settle(self, loan: Loan, survives: Sequence[bool]) -> list[Slot | None]:
        """The run is over: what it read is given back, and the survivors have slots; the rest of its rows are free."""
        taken: list[Slot | None] = []
        with self._lock:
            for slot in loan.slots:
                boundary, row = self._lent.pop(slot)
                self._free[boundary - 1].append(row)
            if not loan.reserved:
                return [None] * len(survives)
            for row, survived in zip(loan.reserved, survives, strict=True):
                if survived:
                    slot = Slot(next(self._numbers))
                    self._held[slot] = loan.boundary, row
                    taken.append(slot)
                else:
                    self._free[loan.boundary - 1].append(row)
                    taken.append(None)
        return taken

    def abandon(self, loan: Loan) -> None:
        """The run failed: it has left nothing, and what it was to read is held as before."""
        with self._lock:
            for slot in loan.slots:
                self._held[slot] = self._lent.pop(slot)
            if loan.reserved:
                self._free[loan.boundary - 1].extend(reversed(loan.reserved))

    def free(self, slots: Sequence[Slot]) -> None:
        """Raises KeyError, and changes nothing, for a slot that is not in use, or in a run."""
        with self._lock:
            self._check(slots)
            for slot in slots:
                boundary, row = self._held.pop(slot)
                self._free[boundary - 1].append(row)

    def _check(self, slots: Sequence[Slot], boundary: int | None = None) -> None:
        if missing := [slot for slot in slots if slot not in self._held]:
            raise KeyError(f"not in use, or in a run: {missing}")
        if len(set(slots)) < len(slots):
            raise KeyError(f"twice in one call: {list(slots)}")
        if boundary is not None and (other := [slot for slot in slots if self._held[slot][0] != boundary]):
            raise KeyError(f"of another stage: {other}")
