"""Where an id is hashed to: evenly, the same on every replica and in every release."""

from __future__ import annotations

import random

import numpy as np
import pytest

from server.budget.places import place_of
from server.frontend.edge import new_request_id


def test_ids_are_hashed_evenly_and_for_ever_alike():
    assert place_of("retry-1", "mix") == 0.5571644449605415
    assert place_of("retry-1", "audit") == 0.1328781901544751
    source = random.Random(0)
    for ids in (
        [new_request_id() for _ in range(20_000)],
        [str(number) for number in range(20_000)],
        [f"{source.getrandbits(128):032x}" for _ in range(20_000)],
    ):
        places = np.array([place_of(one, "mix") for one in ids])
        assert places.min() >= 0
        assert places.max() < 1
        for share in (0.05, 0.37, 0.9):
            assert np.mean(places < share) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(ids)))


def test_choices_for_different_purposes_are_independent():
    ids = [str(number) for number in range(20_000)]
    places = np.array([[place_of(one, purpose) for one in ids] for purpose in ("mix", "audit")])
    assert abs(np.corrcoef(places)[0, 1]) < 4 / np.sqrt(len(ids))
