"""Who holds which state: `SlotTable`, in the host's memory, and `SlotPool`, rows on a device, promise the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core import Slot
from server.engines.gpu.pool import SlotPool, SlotsExhausted
from server.engines.slots import SlotTable


class Books(Protocol):
    """What an engine does with either. A state is a number."""

    def swap(self, given_back: Sequence[Slot], survives: Sequence[bool]) -> list[Slot | None]: ...

    def free(self, slots: Sequence[Slot]) -> None: ...

    def __len__(self) -> int: ...


class Table(SlotTable[int]):
    def swap(self, given_back: Sequence[Slot], survives: Sequence[bool]) -> list[Slot | None]:  # type: ignore[override]
        return super().swap(given_back, [1 if one else None for one in survives])


class Pool(SlotPool):
    """Of two boundaries; whoever gives something back is at the second stage."""

    def __init__(self) -> None:
        super().__init__(boundaries=2, rows=20)

    def swap(self, given_back: Sequence[Slot], survives: Sequence[bool]) -> list[Slot | None]:
        return self.settle(self.lend(2 if given_back else 1, given_back, len(survives)), survives)


@pytest.fixture(params=[Table, Pool])
def books(request: pytest.FixtureRequest) -> Books:
    made: Books = request.param()
    return made


def kept(slots: Sequence[Slot | None]) -> list[Slot]:
    return [slot for slot in slots if slot is not None]


def test_survivors_have_slots_and_the_others_none(books: Books) -> None:
    assert [slot is not None for slot in books.swap([], [True, False, True])] == [True, False, True]
    assert len(books) == 2


def test_a_slot_is_never_given_twice(books: Books) -> None:
    seen: list[Slot] = []
    for _ in range(50):
        slots = kept(books.swap([], [True] * 3))
        seen += slots
        books.free(slots)
    assert len(set(seen)) == 150


def test_what_a_batch_was_handed_is_given_back(books: Books) -> None:
    first = kept(books.swap([], [True] * 4))
    second = kept(books.swap(first[:2], [True, False]))
    assert len(books) == 3
    books.free([*first[2:], *second])
    assert len(books) == 0


def test_a_slot_that_is_not_in_use_is_a_key_error_and_changes_nothing(books: Books) -> None:
    slots = kept(books.swap([], [True] * 3))
    books.free(slots[:1])
    for wrong in ([slots[0]], [slots[1], slots[0]], [slots[1], slots[1]], [Slot(1000)]):
        with pytest.raises(KeyError):
            books.free(wrong)
        with pytest.raises(KeyError):
            books.swap(wrong, [True] * len(wrong))
    assert len(books) == 2
    books.free(slots[1:])


# -- rows only


def test_a_slot_in_a_run_is_nobody_elses() -> None:
    pool = SlotPool(boundaries=2, rows=4)
    slots = kept(pool.settle(pool.lend(1, [], 2), [True, True]))
    loan = pool.lend(2, slots[:1], 1)
    with pytest.raises(KeyError):
        pool.free(slots[:1])
    with pytest.raises(KeyError):
        pool.lend(2, slots, 2)
    assert len(pool) == 2
    pool.abandon(loan)
    pool.free(slots)
    assert len(pool) == 0


def test_a_slot_of_another_stage_is_a_key_error() -> None:
    pool = SlotPool(boundaries=2, rows=4)
    slots = kept(pool.settle(pool.lend(1, [], 1), [True]))
    for stage in (1, 3):
        with pytest.raises(KeyError):
            pool.lend(stage, slots, 1)
    assert kept(pool.settle(pool.lend(2, slots, 1), [False])) == []


def test_no_more_than_there_are_rows_and_a_refusal_changes_nothing() -> None:
    pool = SlotPool(boundaries=2, rows=3)
    slots = kept(pool.settle(pool.lend(1, [], 2), [True, True]))
    with pytest.raises(SlotsExhausted):
        pool.lend(1, [], 2)
    deeper = kept(pool.settle(pool.lend(2, slots, 2), [True, True]))
    assert len(pool.lend(1, [], 3).reserved) == 3, "the rows of each boundary are its own"
    with pytest.raises(SlotsExhausted):
        pool.lend(1, [], 1)
    assert pool.lend(3, deeper, 2).reserved == (), "the last stage leaves nothing"


@given(data=st.data())
def test_no_row_is_anybodys_twice_and_none_is_lost(data: st.DataObject) -> None:
    boundaries, rows = 2, data.draw(st.integers(1, 6))
    pool = SlotPool(boundaries, rows)
    held: dict[Slot, tuple[int, int]] = {}  # boundary, row
    loans = []
    for _ in range(data.draw(st.integers(1, 25))):
        move = data.draw(st.sampled_from(["lend", "lend", "settle", "abandon", "free"]))
        if move == "lend":
            stage = data.draw(st.integers(1, boundaries + 1))
            size = data.draw(st.integers(1, 3))
            here = [slot for slot, (boundary, _) in held.items() if boundary == stage - 1]
            slots = here[:size] if stage > 1 else []
            if stage > 1 and len(slots) < size:
                continue
            try:
                loan = pool.lend(stage, slots, size)
            except SlotsExhausted:
                continue
            assert loan.sources == tuple(held[slot][1] for slot in slots)
            loans.append((loan, size, {slot: held.pop(slot) for slot in slots}))
        elif move in ("settle", "abandon") and loans:
            loan, size, lent = loans.pop(data.draw(st.integers(0, len(loans) - 1)))
            if move == "abandon":
                pool.abandon(loan)
                held |= lent
                continue
            survives = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
            taken = pool.settle(loan, survives)
            for at, slot in enumerate(taken):
                assert (slot is not None) == (survives[at] and bool(loan.reserved))
                if slot is not None:
                    assert slot not in held
                    held[slot] = loan.boundary, loan.reserved[at]
        elif move == "free" and held:
            gone = data.draw(st.sampled_from(sorted(held)))
            pool.free([gone])
            del held[gone]
        used = [*held.values(), *(place for *_, lent in loans for place in lent.values())]
        used += [(loan.boundary, row) for loan, *_ in loans for row in loan.reserved]
        assert len(set(used)) == len(used), "a row that is in use is given to nobody"
        free = [(boundary, row) for boundary, rest in enumerate(pool._free, start=1) for row in rest]
        assert sorted([*used, *free]) == [(b, r) for b in range(1, boundaries + 1) for r in range(rows)]
        assert len(pool) == len(held) + sum(len(lent) for *_, lent in loans)
