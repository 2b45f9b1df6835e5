"""What is in order, beside a plain list that is sorted again and again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.cascade import in_order
from server.cascade.in_order import InOrder

Entry = tuple[int, float, int]


class Beside(RuleBasedStateMachine):
    """Many entries at once, so that a few steps fill several parts."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: InOrder[Entry] = InOrder()
        self.plain: list[Entry] = []
        self.orders = itertools.count()

    @rule(priority=st.integers(0, 2), first=st.integers(-3, 3), step=st.integers(-2, 2), count=st.integers(1, 3000))
    def add(self, priority: int, first: int, step: int, count: int) -> None:
        for number in range(count):
            entry = priority, float(first + step * number), next(self.orders)
            self.kept.add(entry)
            self.plain.append(entry)
        self.plain.sort()

    @rule(which=st.floats(0, 1), count=st.integers(1, 3000), data=st.randoms(use_true_random=False))
    def remove(self, which: float, count: int, data) -> None:  # type: ignore[no-untyped-def]
        """Those that stand together, in any order: parts become empty, also the first."""
        at = int(which * len(self.plain))
        gone = self.plain[at : at + count]
        del self.plain[at : at + count]
        data.shuffle(gone)
        for entry in gone:
            self.kept.remove(entry)

    @rule(count=st.integers(0, 5000))
    def take(self, count: int) -> None:
        assert self.kept.take(count) == self.plain[:count]
        del self.plain[:count]

    @rule(priority=st.integers(-1, 3), deadline=st.integers(-10, 3000))
    def seek(self, priority: int, deadline: int) -> None:
        for key in ((priority,), (priority, float(deadline)), (priority, float(deadline), float("inf"))):
            less = [entry for entry in self.plain if entry < key]
            rest = self.plain[len(less) :]
            assert self.kept.seek(key) == (len(less), rest[0] if rest else None)

    @invariant()
    def is_the_same(self) -> None:
        assert list(self.kept) == self.plain
        assert list(reversed(self.kept)) == self.plain[::-1]
        assert self.kept.first == (self.plain[0] if self.plain else None)


TestBeside = Beside.TestCase
TestBeside.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("step", [1, -1, 7919])
def test_no_part_is_long_and_none_is_empty_however_entries_come_and_go(step: int) -> None:
    kept: InOrder[tuple[int]] = InOrder()
    most = 20 * in_order._PART + 1
    for number in range(most):
        kept.add((number * step % most,))
    for number in range(0, most, 3):
        kept.remove((number,))
    kept.take(most // 4)
    lengths = [len(part) for part in kept._parts]
    assert max(lengths) <= in_order._PART
    assert min(lengths) > 0
    kept.take(most)
    assert (list(kept), kept.first, kept.seek((0,))) == ([], None, (0, None))
    kept.add((1,))
    assert list(kept) == [(1,)]
