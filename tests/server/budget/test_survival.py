"""What is known of images that a deadline cut short is counted, and what is not known is not made up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.budget.survival import ExitCounts, foretold, remaining


def counts(*images: tuple[int, bool], exits: int = 3) -> ExitCounts:
    found = ExitCounts(exits)
    for exit_, cut_short in images:
        found.add(exit_, cut_short)
    return found


some_fractions = st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any).map(lambda n: np.array(n) / sum(n))


@given(some_fractions, st.data())
def test_the_estimate_is_a_share_of_all_images_at_each_exit(expected: NDArray[np.float64], data: st.DataObject) -> None:
    exits = len(expected)
    one = st.tuples(st.integers(1, exits), st.booleans())
    found = counts(*data.draw(st.lists(one, max_size=50)), exits=exits).fractions(expected)
    assert found.shape == (exits,)
    assert np.all(found >= -1e-12)
    assert found.sum() == pytest.approx(1)


@given(some_fractions)
def test_before_the_first_image_it_is_what_calibration_says(expected: NDArray[np.float64]) -> None:
    assert ExitCounts(len(expected)).fractions(expected) == pytest.approx(expected)


def test_without_deadlines_it_is_the_share_that_left() -> None:
    found = counts(*[(1, False)] * 6000, *[(2, False)] * 3000, *[(3, False)] * 1000).fractions((0.2, 0.3, 0.5))
    assert found == pytest.approx((0.6, 0.3, 0.1), abs=0.001)


@pytest.mark.parametrize("cut", [(0.5, 0.0), (0.0, 0.5), (0.4, 0.4)])
def test_whoever_is_cut_short_it_is_where_images_would_have_left(cut: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    truth = (0.5, 0.3, 0.2)
    leaves = rng.choice(3, 50_000, p=truth) + 1
    deadline = np.where(rng.random(50_000) < cut[0], 1, np.where(rng.random(50_000) < cut[1], 2, 3))
    images = zip(np.minimum(leaves, deadline).tolist(), (deadline < leaves).tolist(), strict=True)
    assert counts(*images).fractions((1 / 3, 1 / 3, 1 / 3)) == pytest.approx(truth, abs=0.01)


def test_of_an_exit_that_nobody_came_to_calibration_speaks() -> None:
    found = counts(*[(1, False)] * 5000, *[(1, True)] * 5000).fractions((0.2, 0.6, 0.2))
    assert found == pytest.approx((0.5, 0.375, 0.125), abs=0.001)


def test_a_single_image_does_not_make_a_certainty() -> None:
    found = counts(*[(1, False)] * 500, *[(1, True)] * 500, (3, False)).fractions((0.2, 0.6, 0.2))
    assert found[2] == pytest.approx(0.5 * (1 - 0.75 / 2), abs=0.01)


@given(some_fractions, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_what_is_foretold_is_on_average_what_is_expected_whoever_is_cut_short(
    fractions: NDArray[np.float64], chances: list[float]
) -> None:
    """Chance by chance, not drawn: an image that passes exit k is cut short there with chance chances[k]."""
    table, reach = foretold(fractions), remaining(fractions)
    exits = len(fractions)
    mean, goes_on = np.zeros(exits), 1.0
    for k in range(exits):
        beyond = reach[k + 1] if k + 1 < exits else 0.0
        mean += goes_on * (fractions[k] * table[0, k] + chances[k] * beyond * table[1, k])
        goes_on *= 1 - chances[k]
    assert mean == pytest.approx(fractions)
    assert table.sum(axis=2) == pytest.approx(1)
