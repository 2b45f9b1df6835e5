"""What is told of an image: the most probable classes, as one sort of all would give them. And what headers mean."""

from __future__ import annotations

import asyncio

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bundle.manifest import Bundle
from server.core import Answer, ImageResult, OperatingPoint
from server.errors import InvalidRequest
from server.frontend.routes import _if_match, predictions, shape_answer


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0]), min_size=1, max_size=40), st.integers(1, 50))
def test_the_most_probable_classes_come_first_and_equal_ones_by_class_id(values: list[float], top_k: int):
    result = ImageResult(np.array(values, dtype=np.float32), 1, max(values), False, 0.0, 0.0, (max(values),))
    told = predictions(result, [f"class {i}" for i in range(len(values))], top_k)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
    assert [p["class_id"] for p in told] == expected
    assert [p["label"] for p in told] == [f"class {i}" for i in expected]
    assert [p["probability"] for p in told] == [round(float(np.float32(values[i])), 6) for i in expected]


async def test_the_event_loop_has_turns_while_a_long_answer_is_shaped(bundle: Bundle) -> None:
    labels = tuple(f"class {number}" for number in range(1000))
    manifest = bundle.manifest.model_copy(update={"labels": labels})
    probabilities = np.random.default_rng(0).random(1000, dtype=np.float32)
    result = ImageResult(probabilities, 2, 0.9, False, 0.0, 0.0, (0.9, 0.9))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    for images, top_k, least in ((64, 1_000_000, 63), (64, 100, 6), (1, 1000, 0), (64, 5, 0)):
        answer = Answer(OperatingPoint(1, (0.5, 0.5, 0.0)), (result,) * images, 0.0)
        beside, turns = asyncio.create_task(others()), 0
        shaped = orjson.loads(orjson.dumps(await shape_answer(manifest, (1.0, 2.0, 3.0), answer, top_k, 0.001, 0.002)))
        beside.cancel()
        assert turns == least
        assert len(shaped["results"]) == images
        assert {len(one["predictions"]) for one in shaped["results"]} == {min(top_k, 1000)}


@pytest.mark.parametrize(
    "lines",
    [
        ['"7"'], ['"1","7"'], ['"1" ,\t"7" '], ['"1,7", W/"7", "7"'], ['"1"', '"7"'], ["", '"7"'], [',, "7",'],
        ['"\xe9", "7"'], ['"", "7"'],
    ],
)  # fmt: skip
def test_a_list_of_tags_matches_by_any_of_them(lines: list[str]) -> None:
    assert 7 in _if_match(lines)


@pytest.mark.parametrize("lines", [['"1"'], ['W/"7"'], ['"1,7"'], ['"1,"', '",7"'], ['"07"'], [""], [","], ['"*"']])
def test_a_list_without_ours_does_not_match(lines: list[str]) -> None:
    named = _if_match(lines)
    assert isinstance(named, frozenset)
    assert 7 not in named


@pytest.mark.parametrize(
    "lines",
    [
        ["7"], ['"7'], ['7"'], ['"7" "8"'], ['"7", *'], ["*, *"], ["*", "*"], ['w/"7"'], ['"a b"'], ['"7";'],
        [" " * 60_000 + "x"],
    ],
)  # fmt: skip
def test_what_is_no_list_of_tags_is_refused_and_not_taken_for_another_version(lines: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _if_match(lines)
    assert caught.value.extra["field"] == "If-Match"


def test_a_star_matches_whatever_there_is_and_no_header_asks_for_nothing() -> None:
    assert _if_match([" * "]) == "*"
    assert _if_match([]) is None
