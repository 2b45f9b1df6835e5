"""What is told of an image: the most probable classes, as one sort of all would give them. And what headers mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core import ImageResult
from server.errors import InvalidRequest, VersionMismatch
from server.frontend.routes import _if_match, predictions


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0]), min_size=1, max_size=40), st.integers(1, 50))
def test_the_most_probable_classes_come_first_and_equal_ones_by_class_id(values: list[float], top_k: int):
    result = ImageResult(np.array(values, dtype=np.float32), 1, max(values), False, 0.0, 0.0, (max(values),))
    told = predictions(result, [f"class {i}" for i in range(len(values))], top_k)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
    assert [p["class_id"] for p in told] == expected
    assert [p["label"] for p in told] == [f"class {i}" for i in expected]
    assert [p["probability"] for p in told] == [round(float(np.float32(values[i])), 6) for i in expected]


@pytest.mark.parametrize(
    "lines",
    [
        ['"7"'], ['"1","7"'], ['"1" ,\t"7" '], ['"1,7", W/"7", "7"'], ['"1"', '"7"'], ["", '"7"'], [',, "7",'],
        ['"\xe9", "7"'], ['"", "7"'],
    ],
)  # fmt: skip
def test_a_list_of_tags_matches_by_any_of_them(lines: list[str]) -> None:
    assert _if_match(lines, 7) == 7


@pytest.mark.parametrize("lines", [['"1"'], ['W/"7"'], ['"1,7"'], ['"1,"', '",7"'], ['"07"'], [""], [","], ['"*"']])
def test_a_list_without_ours_does_not_match(lines: list[str]) -> None:
    with pytest.raises(VersionMismatch):
        _if_match(lines, 7)


@pytest.mark.parametrize(
    "lines",
    [
        ["7"], ['"7'], ['7"'], ['"7" "8"'], ['"7", *'], ["*, *"], ["*", "*"], ['w/"7"'], ['"a b"'], ['"7";'],
        [" " * 60_000 + "x"],
    ],
)  # fmt: skip
def test_what_is_no_list_of_tags_is_refused_and_not_taken_for_another_version(lines: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _if_match(lines, 7)
    assert caught.value.extra["field"] == "If-Match"


def test_a_star_matches_whatever_there_is_and_no_header_asks_for_nothing() -> None:
    assert _if_match([" * "], 7) == "*"
    assert _if_match([], 7) is None
