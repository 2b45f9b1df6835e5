"""Where an id is hashed to: evenly, for every retry alike, and where no client can know."""

from __future__ import annotations

import random

import numpy as np
import pytest

from server.budget.places import Places
from server.frontend.edge import new_request_id


def test_ids_are_hashed_evenly():
    source = random.Random(0)
    places = Places(b"a key")
    for ids in (
        [new_request_id() for _ in range(20_000)],
        [str(number) for number in range(20_000)],
        [f"{source.getrandbits(128):032x}" for _ in range(20_000)],
    ):
        found = np.array([places.of(one) for one in ids])
        assert found.min() >= 0
        assert found.max() < 1
        for share in (0.05, 0.37, 0.9):
            assert np.mean(found < share) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(ids)))


def test_a_retry_falls_where_the_request_fell():
    places = Places()
    assert places.of("retry-1") == places.of("retry-1")


def test_where_an_id_falls_in_one_process_tells_nothing_of_another():
    ids = [str(number) for number in range(20_000)]
    found = [[places.of(one) for one in ids] for places in (Places(), Places())]
    assert abs(np.corrcoef(found)[0, 1]) < 5 / np.sqrt(len(ids))
