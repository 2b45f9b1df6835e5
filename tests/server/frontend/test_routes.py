"""What is told of an image: the most probable classes, as one sort of all would give them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server.core import ImageResult
from server.frontend.routes import predictions


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0]), min_size=1, max_size=40), st.integers(1, 50))
def test_the_most_probable_classes_come_first_and_equal_ones_by_class_id(values: list[float], top_k: int):
    result = ImageResult(np.array(values, dtype=np.float32), 1, max(values), False, 0.0, 0.0, (max(values),))
    told = predictions(result, [f"class {i}" for i in range(len(values))], top_k)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
    assert [p["class_id"] for p in told] == expected
    assert [p["label"] for p in told] == [f"class {i}" for i in expected]
    assert [p["probability"] for p in told] == [round(float(np.float32(values[i])), 6) for i in expected]
