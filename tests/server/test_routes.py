"""What is told of an image: the most probable classes, as one sort of all would give them. Where an id is hashed to."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core import ImageResult
from server.edge import new_request_id
from server.routes import place_of, predictions


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0]), min_size=1, max_size=40), st.integers(1, 50))
def test_the_most_probable_classes_come_first_and_equal_ones_by_class_id(values: list[float], top_k: int):
    result = ImageResult(np.array(values, dtype=np.float32), 1, max(values), False, 0.0, 0.0)
    told = predictions(result, [f"class {i}" for i in range(len(values))], top_k)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
    assert [p["class_id"] for p in told] == expected
    assert [p["label"] for p in told] == [f"class {i}" for i in expected]
    assert [p["probability"] for p in told] == [round(float(np.float32(values[i])), 6) for i in expected]


def test_ids_are_hashed_evenly_and_for_ever_alike():
    assert place_of("retry-1") == 0.45125564885183067
    source = random.Random(0)
    for ids in (
        [new_request_id() for _ in range(20_000)],
        [str(number) for number in range(20_000)],
        [f"{source.getrandbits(128):032x}" for _ in range(20_000)],
    ):
        places = np.array([place_of(one) for one in ids])
        assert places.min() >= 0
        assert places.max() < 1
        for share in (0.05, 0.37, 0.9):
            assert np.mean(places < share) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(ids)))
