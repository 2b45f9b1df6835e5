"""Drift alarms speak when the traffic is another one, and are silent when only the thresholds are."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.budget.drift import ENOUGH, POINTS, WINDOW, Drift, DriftState, bins_of, quantile_edges
from server.budget.loops import CostLoop
from server.bundle.frontier import Frontier, FrontierRow, Records
from server.calibration.sweep import sweep
from server.core import Answer, Floats, ImageResult, OperatingPoint

GMACS = (0.5, 1.0, 2.0)
NOTHING = np.zeros(0, np.float32)


def traffic(count: int, seed: int, harder: float = 0.0) -> tuple[Floats, NDArray[np.bool_]]:
    """Confidences (3, N) and correctness (3, N) of a cascade that is surer, and right, the deeper an image goes."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=count) - harder
    noise = rng.normal(size=(3, count)) * 0.5
    confidence = (1 / (1 + np.exp(-(ease + noise + [[0.5], [1.0], [1.5]])))).astype(np.float32)
    return confidence, rng.random((3, count)) < confidence


@pytest.fixture(scope="module")
def frontier() -> Frontier:
    confidence, correct = traffic(5000, seed=0)
    return sweep(confidence[:2], correct, GMACS)


class Watch:
    """A Drift over a frontier, with a row of it in force."""

    def __init__(self, frontier: Frontier, row: int | None = None) -> None:
        self.frontier = frontier
        self.row: FrontierRow | None = frontier.rows[len(frontier.rows) // 2 if row is None else row]
        self.point = OperatingPoint(1, self.row.thresholds)
        self.drift = Drift(frontier.records, frontier.samples, lambda: self.row and self.row.exit_fractions, self.point)

    def move_to(self, row: int) -> None:
        self.row = self.frontier.rows[row]
        self.point = OperatingPoint(1, self.row.thresholds)
        self.drift.retune(self.point)

    def serve(self, confidence: Floats, point: OperatingPoint | None = None, **how: bool) -> list[int]:
        point, exits = point or self.point, []
        for image in confidence.T.tolist():
            exit_ = next(k for k, c in enumerate(image, start=1) if c >= point.thresholds[k - 1])
            self.drift.observe(answer(point, image[:exit_]), how.get("steered", False))
            exits.append(exit_)
        return exits


def answer(point: OperatingPoint, confidences: Sequence[float], degraded: bool = False) -> Answer:
    result = ImageResult(NOTHING, len(confidences), confidences[-1], degraded, 0.0, 0.0, tuple(confidences))
    return Answer(point, (result,), 0.0)


def test_traffic_like_the_calibration_images_does_not_alarm(frontier: Frontier) -> None:
    for seed in range(1, 6):
        watch = Watch(frontier)
        watch.serve(traffic(3000, seed)[0])
        state = watch.drift.state()
        assert (state.images, state.alarm, state.reasons) == (3000, False, ())
        assert state.psi is not None
        assert state.psi < 0.02
        assert state.z is not None
        assert max(map(abs, state.z)) < 4


@pytest.mark.parametrize("harder", [1.0, -1.0])
def test_harder_and_easier_traffic_alarms_for_both_reasons(frontier: Frontier, harder: float) -> None:
    watch = Watch(frontier)
    watch.serve(traffic(2000, 1, harder)[0])
    state = watch.drift.state()
    assert (state.alarm, state.reasons) == (True, ("psi", "exit_fractions"))
    assert state.z is not None
    assert state.z[0] * harder < 0, "fewer leave first of harder traffic"


def test_nothing_is_said_before_there_are_images_enough(frontier: Frontier) -> None:
    watch = Watch(frontier)
    watch.serve(traffic(ENOUGH - 1, 1, harder=3.0)[0])
    state = watch.drift.state()
    assert (state.images, state.psi, state.z, state.alarm) == (ENOUGH - 1, None, None, False)
    watch.serve(traffic(1, 1, harder=3.0)[0])
    assert watch.drift.state().alarm


def test_another_operating_point_changes_what_is_expected_and_not_what_was_seen(frontier: Frontier) -> None:
    watch = Watch(frontier)
    watch.serve(traffic(1000, 1)[0])
    before = watch.drift.state()
    assert before.z is not None
    watch.move_to(10)
    assert watch.drift.state() == before
    watch.serve(traffic(1000, 2)[0])
    state = watch.drift.state()
    assert state.z is not None
    assert not state.alarm, "each image is compared with what is expected of the row that judged it"


@pytest.mark.parametrize(("harder", "alarms"), [(0.0, False), (0.3, True), (-0.3, True)])
def test_the_exits_tell_while_the_cost_loop_walks(frontier: Frontier, harder: float, alarms: bool) -> None:
    """It moves on before one operating point has seen images enough, and the cost is the wanted one throughout."""
    for seed in range(1, 6):
        loop = CostLoop(frontier.rows, GMACS, 0.8)
        watch = Watch(frontier, loop.row)
        moves, spent = 0, 0.0
        for images in np.array_split(traffic(12_000, seed, harder)[0], 40, axis=1):
            for exit_ in watch.serve(images):
                spent += GMACS[exit_ - 1]
                loop.observe(exit_)
            if frontier.rows[loop.row] != watch.row:
                watch.move_to(loop.row)
                moves += 1
            state = watch.drift.state()
            assert (state.z is None) == (state.images < ENOUGH)
            assert alarms or not state.alarm
        assert moves > 15
        assert spent / 12_000 == pytest.approx(0.8, rel=0.03)
        assert state.reasons == ("exit_fractions",) * alarms, "a shift too small for the histogram"


def test_rows_that_lie_far_apart_are_no_change(frontier: Frontier) -> None:
    population = dataclasses.replace(frontier, samples=10**9)  # its records are no sample of another one
    images, rng, found = traffic(5000, seed=0)[0], np.random.default_rng(0), []
    for _ in range(100):
        watch = Watch(population)
        for number in range(8):
            watch.move_to(200 if number % 2 else 40)
            watch.serve(images[:, rng.integers(0, 5000, 250)])
        found.append(watch.drift.state().z)
    assert np.mean(found, axis=0) == pytest.approx(0, abs=0.5)
    assert np.all(np.std(found, axis=0) < 1.5)
    assert np.max(np.abs(found)) < 5


def test_steered_images_say_nothing_of_the_exits(frontier: Frontier) -> None:
    watch = Watch(frontier)
    watch.serve(traffic(1000, 1)[0], steered=True)
    state = watch.drift.state()
    assert state.psi is not None
    assert state.z is None


@pytest.mark.parametrize("harder", [0.0, 1.0])
@pytest.mark.parametrize("cut", [(0.5, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_images_that_a_deadline_cut_short_count_as_far_as_they_went(
    frontier: Frontier, cut: tuple[float, float], harder: float
) -> None:
    """By chance, or every image that goes beyond some exit. Left out, the others would seem to leave early."""
    watch = Watch(frontier)
    rng = np.random.default_rng(0)
    for image in traffic(5000, 1, harder)[0].T.tolist():
        exit_ = next(k for k, c in enumerate(image, start=1) if c >= watch.point.thresholds[k - 1])
        reached = next((k for k in range(1, exit_) if rng.random() < cut[k - 1]), exit_)
        watch.drift.observe(answer(watch.point, image[:reached], degraded=reached < exit_), steered=False)
    assert ("exit_fractions" in watch.drift.state().reasons) == (harder > 0)


@pytest.mark.parametrize("correlation", [0.9, 0.98])
def test_images_in_runs_are_no_drift(frontier: Frontier, correlation: float) -> None:
    """As hard as those of the calibration, one by one; but the next is as hard as the last."""
    for seed in range(3):
        rng, state, ease = np.random.default_rng(seed), 0.0, []
        for noise in rng.normal(size=20_000).tolist():
            state = correlation * state + math.sqrt(1 - correlation**2) * noise
            ease.append(state)
        certainty = np.array(ease) + rng.normal(size=(3, 20_000)) * 0.5 + [[0.5], [1.0], [1.5]]
        images = (1 / (1 + np.exp(-certainty))).astype(np.float32)
        watch = Watch(frontier)
        for part in np.array_split(images, 40, axis=1):
            watch.serve(part)
            assert watch.drift.state().reasons == ()


def test_late_answers_of_an_earlier_point_are_compared_with_what_is_expected_of_that(frontier: Frontier) -> None:
    watch = Watch(frontier)
    past = watch.point
    watch.move_to(10)
    watch.serve(traffic(1000, 1)[0], past)
    state = watch.drift.state()
    assert state.z is not None
    assert not state.alarm


def test_points_of_long_ago_are_forgotten(frontier: Frontier) -> None:
    watch = Watch(frontier)
    past = watch.point
    for row in range(POINTS):
        watch.move_to(row)
    watch.serve(traffic(1000, 1)[0], past)
    assert watch.drift.state().z is None


def test_a_point_of_unknown_fractions_is_not_judged_by_the_images_before_it(frontier: Frontier) -> None:
    watch = Watch(frontier)
    watch.serve(traffic(1000, 1)[0])
    known = watch.row
    watch.row, watch.point = None, OperatingPoint(2, (0.5, 0.5, 0.0))
    watch.drift.retune(watch.point)
    watch.serve(traffic(1000, 2)[0])
    assert watch.drift.state().z is None
    watch.row, watch.point = known, OperatingPoint(3, known.thresholds)
    watch.drift.retune(watch.point)
    assert watch.drift.state().z is not None


def test_only_the_last_images_count(frontier: Frontier) -> None:
    watch = Watch(frontier)
    watch.serve(traffic(1000, 1, harder=3.0)[0])
    assert watch.drift.state().alarm
    watch.serve(traffic(WINDOW, 2)[0])
    state = watch.drift.state()
    assert (state.images, state.alarm) == (WINDOW, False)
    assert len(watch.drift.confidences()) == WINDOW


def test_an_alarm_is_told_once_when_it_begins_and_once_when_it_ends(
    frontier: Frontier, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(frontier)
    with caplog.at_level(logging.INFO):
        watch.serve(traffic(3000, 1, harder=2.0)[0])
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "psi, exit_fractions" in caplog.text
        watch.serve(traffic(WINDOW + ENOUGH, 2)[0])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_what_the_exits_said_is_forgotten_where_for_long_only_steered_images_came(frontier: Frontier) -> None:
    watch = Watch(frontier)
    watch.serve(traffic(2000, 1, harder=2.0)[0])
    assert watch.drift.state().alarm
    watch.serve(traffic(WINDOW + 2000, 2)[0], steered=True)
    state = watch.drift.state()
    assert (state.z, state.alarm) == (None, False)


def test_it_is_judged_when_images_have_come_and_not_when_somebody_asks(frontier: Frontier) -> None:
    watch = Watch(frontier)
    watch.serve(traffic(1000, 1)[0])
    before = watch.drift.state()
    watch.serve(traffic(ENOUGH - 1, 2, harder=3.0)[0])
    assert dataclasses.replace(watch.drift.state(), images=1000) == before


def test_a_model_of_one_exit_has_nothing_to_compare() -> None:
    records = Records(np.zeros((0, 1000), np.float32), np.ones((1, 1000), np.bool_))
    point = OperatingPoint(1, (0.0,))
    drift = Drift(records, 1000, lambda: (1.0,), point)
    for _ in range(2 * ENOUGH):
        drift.observe(answer(point, [0.9]), steered=False)
    assert drift.state() == DriftState(2 * ENOUGH, None, (0.0,), False, ())


def test_an_exit_that_is_always_equally_sure_has_no_deciles() -> None:
    records = Records(np.full((1, 1000), 0.5, np.float32), np.ones((2, 1000), np.bool_))
    point = OperatingPoint(1, (0.9, 0.0))
    drift = Drift(records, 1000, lambda: (0.0, 1.0), point)
    for _ in range(2 * ENOUGH):
        drift.observe(answer(point, [0.5, 0.9]), steered=False)
    assert drift.state() == DriftState(2 * ENOUGH, 0.0, (0.0, 0.0), False, ())


@pytest.mark.parametrize("records", [None, Records(np.zeros((2, 0), np.float32), np.zeros((3, 0), np.bool_))])
def test_without_records_and_without_a_prediction_it_is_silent(records: Records | None) -> None:
    point = OperatingPoint(1, (0.5, 0.5, 0.0))
    drift = Drift(records, 0, lambda: None, point)
    for _ in range(ENOUGH):
        drift.observe(answer(point, [0.9]), steered=False)
    state = drift.state()
    assert (state.images, state.psi, state.z, state.alarm) == (ENOUGH, None, None, False)


def test_exits_that_nobody_takes_and_nobody_should_are_no_alarm(frontier: Frontier) -> None:
    watch = Watch(frontier, row=0)
    assert watch.row.exit_fractions == (1, 0, 0)
    watch.serve(traffic(1000, 1)[0])
    assert watch.drift.state().z == (0.0, 0.0, 0.0)


one = st.tuples(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), st.integers(1, 3), st.booleans())
request = st.tuples(st.lists(one, min_size=1, max_size=3), st.booleans(), st.integers(0, 50))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(one, min_size=1, max_size=3), st.booleans(), st.integers(0, 50)), min_size=1, max_size=9
    ),
    st.integers(1, 10**9),
)
def test_whatever_comes_it_tells_numbers(
    frontier: Frontier, requests: list[tuple[list[Any], bool, int]], samples: int
) -> None:
    """Over and over: runs of any length, exits that no threshold explains, deadlines at any of them."""
    watch = Watch(dataclasses.replace(frontier, samples=samples))
    while len(watch.drift.confidences()) < 3 * ENOUGH:
        for images, steered, row in requests:
            watch.move_to(row)
            results = tuple(answer(watch.point, seen[:exit_], cut).results[0] for seen, exit_, cut in images)
            watch.drift.observe(Answer(watch.point, results, 0.0), steered)
    state = watch.drift.state()
    assert state.psi is not None
    assert math.isfinite(state.psi)
    assert state.z is None or all(map(math.isfinite, state.z))


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200), st.integers(1, 50))
def test_no_bin_of_the_values_that_made_the_edges_is_empty(values: list[float], bins: int) -> None:
    array = np.array(values, dtype=np.float32)
    edges = quantile_edges(array, bins)
    assert len(edges) < bins
    assert np.all(np.diff(edges) > 0)
    assert np.all(np.bincount(bins_of(array, edges), minlength=len(edges) + 1) > 0)
