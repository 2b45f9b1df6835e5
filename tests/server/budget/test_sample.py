"""However few can be audited, and whenever: what is found speaks of all that were chosen."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.budget.sample import Sample


def drained(sample: Sample[int]) -> list[tuple[int, int]]:
    """(item, what it stands for) of all that wait, in order."""
    found = []
    while (kept := sample.take()) is not None:
        found.append((kept.item, kept.stands_for))
    return found


def sample_of(most: int, seed: int = 0) -> Sample[int]:
    return Sample(most, 1, random.Random(seed))


def test_as_long_as_there_is_room_each_stands_for_itself_in_order() -> None:
    sample = sample_of(4)
    assert [sample.add(item, 1) for item in range(4)] == [0] * 4
    assert drained(sample) == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_what_has_no_room_is_stood_for_and_all_of_what_waits_is_thinned_evenly() -> None:
    sample = sample_of(16)
    added = [sample.add(item, 1) for item in range(1000)]
    assert added == [0] * 16 + [1] * 984
    found = drained(sample)
    assert sum(stands_for for _, stands_for in found) == 1000
    assert max(stands_for for _, stands_for in found) <= 4 * min(stands_for for _, stands_for in found)
    assert [item for item, _ in found] == sorted(item for item, _ in found)


def test_where_there_is_no_room_some_is_made_at_once() -> None:
    """Not every newcomer is to cost a look at all that wait."""
    sample = sample_of(256)
    added = [sample.add(item, 1) for item in range(10_000)]
    assert {made for made in added if made} == {16}
    assert len(sample) == 10_000 - sum(added)
    weights = sorted(stands_for for _, stands_for in drained(sample))
    assert sum(weights) == 10_000
    assert weights[-1] <= 4 * weights[len(weights) // 6], "but for the newest, all of what waits is thinned evenly"


def test_each_is_a_uniform_draw_of_those_that_it_stands_for() -> None:
    """So every one of a hundred is as likely to be counted, weighted by what the one that is counted stands for."""
    weights = np.zeros(100)
    for seed in range(4000):
        sample = sample_of(5, seed)
        for item in range(100):
            sample.add(item, 1)
            if item == 50:
                kept = sample.take()  # an audit in between
                assert kept is not None
                weights[kept.item] += kept.stands_for
        for item, stands_for in drained(sample):
            weights[item] += stands_for
    assert weights.sum() == 4000 * 100
    assert np.abs(weights / 4000 - 1).max() < 5 * np.sqrt(32 / 4000)  # of a weight of at most 32


steps = st.lists(st.sampled_from(["add", "late", "take", "retune"]), max_size=120)


@given(st.integers(3, 6), steps, st.integers(0, 2**32))
def test_nobody_is_stood_for_twice_or_not_at_all_nor_by_another_version(
    most: int, moves: Sequence[str], seed: int
) -> None:
    sample = sample_of(most, seed)
    version, added, late = 1, 0, 0
    counted = {"all": 0, "of version": 0}
    for move in [*moves, *["take"] * most]:
        if move == "retune":
            version, late, added, counted["of version"] = version + 1, late + added, 0, 0
            sample.retune(version)
        elif move == "take":
            if (kept := sample.take()) is not None:
                sample.count(kept, 1.0, 0.0)
                counted["all"] += kept.stands_for
                counted["of version"] += kept.stands_for * (kept.version == version)
        elif move == "add":
            sample.add(0, version)
            added += 1
        else:
            sample.add(0, 0)
            late += 1
        assert len(sample) <= most
        now, ever = sample.of_version(), sample.since_start()
        assert (now.chosen, ever.chosen) == (added, added + late)
        assert now.images <= now.represented <= now.chosen
        assert ever.represented == counted["all"]
    assert counted == {"all": added + late, "of version": added}


@pytest.mark.parametrize("slow", [1, 3, 30])
def test_the_truth_is_enclosed_at_every_look_however_the_load_goes(slow: int) -> None:
    """A busy half, whose answers are worse and of which one in `slow` can be audited, and a quiet one."""
    missed = 0
    for seed in range(24):
        lots = random.Random(seed)
        sample: Sample[float] = Sample(16, 1, lots)
        means, spoken, covered, at, whole = [], 0.0, 0, 0, True
        for turn in range(1200):
            busy = turn // 300 % 2 == 0
            means.append(0.7 if busy else 0.95)
            sample.add(float(lots.random() < means[-1]), 1)
            for _ in range(turn % slow == 0 if busy else 2):
                if (kept := sample.take()) is None:
                    break
                sample.count(kept, kept.item, 0.0)
                while at < covered + kept.stands_for:
                    spoken += means[at]
                    at += 1
                covered = at
                found = sample.of_version().agreement
                assert found.low is not None
                assert found.high is not None
                whole &= found.low <= spoken / covered <= found.high
        missed += not whole
    assert missed <= 1
