"""A bounded sample that stands for all, however unevenly it can be worked off. Plain code: no clock, no I/O.

Requests that are chosen for an audit come at the rate of the traffic, and audits are made at the rate that the load
leaves. To drop what finds no room would be to ask the quiet hours alone, and overloaded servers answer otherwise: by
cheaper exits, by deadlines. So nothing is dropped without somebody to stand for it:

- Everything in the sample stands for some chosen requests, of which it is a uniform draw; at first for itself.
- Where there is one too many, two neighbours are merged: one of them, by a lot in proportion to what they stand for,
  stays and stands for both. Those that stand for the fewest go first, so that all of what waits is thinned evenly.
- What is taken out, in order, is counted with the weight of what it stands for. The weights of all that was counted add
  up to the number of the chosen requests that they speak of, no more and no less.

Which two are merged, and when, is decided by numbers and order, never by what is in a request; and what is about to be
audited is merged no more. So, given what came before, the result that is counted next is expected to be the mean over
those that it stands for: that is all that `ConfidenceSequence` asks for.

Two questions are answered at once: what is true of the budget version in force, and of all since the start. What was
judged by another version counts for the second alone, and is merged only with its like.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Generic, TypeVar

from server.budget.confidence_sequence import ConfidenceSequence, Interval

T = TypeVar("T")

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the audits say of some answers."""

    chosen: int  # requests; one image of each
    images: int  # that were audited
    represented: int  # of the chosen: those that the audited stand for; the others wait, or their audit failed
    audited_ratio: float | None  # of the chosen; None before the first
    agreement: Interval  # share of images to which the last exit gives the class that was answered
    accuracy_gap: Interval


@dataclass(slots=True, eq=False)
class Kept(Generic[T]):
    """One of the sample."""

    item: T
    version: int  # of the budget that judged it
    stands_for: int = 1  # chosen requests


@dataclass(slots=True)
class _Counts:
    chosen: int = 0
    images: int = 0
    represented: int = 0
    agreement: ConfidenceSequence = field(default_factory=lambda: ConfidenceSequence(CONFIDENCE))
    gap: ConfidenceSequence = field(default_factory=lambda: ConfidenceSequence(CONFIDENCE))

    def estimate(self) -> Estimate:
        ratio = round(self.images / self.chosen, 6) if self.chosen else None
        return Estimate(
            self.chosen, self.images, self.represented, ratio, self.agreement.interval(), self.gap.interval()
        )


class Sample(Generic[T]):
    """Owns the chosen requests that wait, at most `most` of them, and what was found out of the others."""

    def __init__(self, most: int, version: int, lots: Random) -> None:
        """`most`: at least 2, so that of those and a newcomer two are alike. `version`: of the budget in force."""
        self._most = most
        self._lots = lots
        self._version = version
        self._waiting: list[Kept[T]] = []  # in order of the answers
        self._of_version = _Counts()
        self._since_start = _Counts()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T, version: int) -> int:
        """A request is chosen, and was judged by this version. Gives how many of the sample made room: others stand for
        them from now on."""
        self._since_start.chosen += 1
        if version == self._version:
            self._of_version.chosen += 1
        self._waiting.append(Kept(item, version))
        return self._thin() if len(self._waiting) > self._most else 0

    def take(self) -> Kept[T] | None:
        """The next one to be audited. It will be merged no more."""
        return self._waiting.pop(0) if self._waiting else None

    def count(self, kept: Kept[T], agreement: float, gap: float) -> None:
        """What was found of one that was taken, each between 0 and 1. In the order of taking."""
        for counts in [self._since_start, *([self._of_version] if kept.version == self._version else [])]:
            counts.images += 1
            counts.represented += kept.stands_for
            counts.agreement.observe(agreement, kept.stands_for)
            counts.gap.observe(gap, kept.stands_for)

    def retune(self, version: int) -> None:
        """This budget version is in force. Versions never come back."""
        if version != self._version:
            self._version = version
            self._of_version = _Counts()

    def of_version(self) -> Estimate:
        return self._of_version.estimate()

    def since_start(self) -> Estimate:
        return self._since_start.estimate()

    def clear(self) -> None:
        self._waiting.clear()

    def _thin(self) -> int:
        """Merge the pairs that stand for the fewest, of equal ones the earlier, until there is some room: a sixteenth,
        so that not every newcomer costs a look at all."""
        gone: set[int] = set()
        merged: set[int] = set()
        for _, first, second in sorted(self._pairs()):
            if first not in merged and second not in merged:
                self._merge(first, second)
                merged |= {first, second}
                gone.add(second)
                if len(gone) * 16 >= self._most:
                    break
        self._waiting = [kept for at, kept in enumerate(self._waiting) if at not in gone]
        return len(gone)

    def _pairs(self) -> Iterator[tuple[int, int, int]]:
        """Neighbours among their like: what they stand for together, the place of the first, of the second."""
        before: dict[bool, int] = {}
        for at, kept in enumerate(self._waiting):
            current = kept.version == self._version
            if (other := before.get(current)) is not None:
                yield self._waiting[other].stands_for + kept.stands_for, other, at
            before[current] = at

    def _merge(self, first: int, second: int) -> None:
        """The place of the first is that of both."""
        one, other = self._waiting[first], self._waiting[second]
        together = one.stands_for + other.stands_for
        survivor = one if self._lots.randrange(together) < one.stands_for else other
        survivor.stands_for = together
        self._waiting[first] = survivor
