"""The memory that a front end shares with the engine's process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from server.frontend.remote.counts import CELLS, CountsRead, SharedCounts
from server.frontend.remote.memory import FreeSlots, SharedMemory, create_memory, put
from server.metrics import SECONDS, Metrics

SIZE = (4, 6)


@pytest.fixture
def descriptor() -> Iterator[int]:
    descriptor = create_memory(cells=CELLS, slots=5, input_size=SIZE)
    yield descriptor
    os.close(descriptor)


def memory(descriptor: int) -> SharedMemory:
    return SharedMemory(descriptor, cells=CELLS, slots=5, input_size=SIZE)


def test_what_one_writes_the_other_reads(descriptor: int) -> None:
    here, there = memory(descriptor), memory(descriptor)
    image = np.arange(72, dtype=np.uint8).reshape(*SIZE, 3)
    put(here, [4], [image])
    assert (there.pixels[4] == image).all()
    assert not there.pixels[:4].any()


def test_nobody_can_take_it_away(descriptor: int) -> None:
    for size in (0, 10 * mmap.PAGESIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)


def test_an_array_outlives_the_descriptor_and_all_else_of_the_memory(descriptor: int) -> None:
    there = memory(descriptor)
    there.pixels[2] = 7
    kept = there.pixels[2]
    del there
    assert (kept == 7).all()


def test_slots_are_taken_all_or_none_and_only_given_back_once() -> None:
    slots = FreeSlots(3)
    assert slots.take(4) is None
    taken = slots.take(2)
    assert taken is not None
    assert slots.take(2) is None
    slots.give_back(taken)
    assert len(slots) == 3
    for wrong in (taken[:1], [9]):
        with pytest.raises(KeyError):
            slots.give_back(wrong)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(model="m", version="v", release="r", stage_gmacs=(1.0, 2.0))


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_counts_are_added_once(descriptor: int, metrics: Metrics) -> None:
    counts, reads = SharedCounts(memory(descriptor).cells), CountsRead(memory(descriptor).cells)
    for _ in range(2):
        counts.request_finished("/classify", 200, 0.003, "high", "true")
        counts.answered("high", 0.002)
        counts.request_finished("other", 403, 100.0)
        counts.request_refused("foreign_host")
        counts.decoded(0.0005)
        metrics.add(reads.take())
        metrics.add(reads.take())
    assert sample(metrics, "dvt_requests_total", route="/classify", status="200", priority="high", hurried="true") == 2
    assert sample(metrics, "dvt_answer_seconds_count", priority="high") == 2
    assert sample(metrics, "dvt_requests_total", route="other", status="403", priority="", hurried="") == 2
    assert sample(metrics, "dvt_refused_total", code="foreign_host") == 2
    assert sample(metrics, "dvt_request_seconds_count", route="other") == 2
    assert sample(metrics, "dvt_request_seconds_bucket", route="other", le=f"{SECONDS[-1]}") == 0
    assert sample(metrics, "dvt_request_seconds_sum", route="/classify") == pytest.approx(0.006)
    assert sample(metrics, "dvt_decode_seconds_sum") == pytest.approx(0.001)


def test_what_no_count_can_be_is_not_believed(descriptor: int, metrics: Metrics) -> None:
    cells, reads = memory(descriptor).cells, CountsRead(memory(descriptor).cells)
    for wrong in (float("nan"), float("inf"), -5.0, 1e300):
        for at in range(CELLS):
            cells[at] = wrong
        counted = reads.take()
        assert (counted.requests, counted.refused, counted.seconds) == ({}, {}, {})
        metrics.add(counted)
