"""A profile says what a batch takes: from few and noisy points, on the machine that was measured, and as time goes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bundle.profile import Identity, LatencyProfile, LiveProfile, StageCost

SIZES = (1, 2, 4, 8, 16, 32, 64)
HERE = Identity(model="f8368f00bc3c", precision="fp32", runtime="onnxruntime 1.31.1", device="A CPU", concurrency=2)

costs = st.floats(1e-5, 1e-1)


def at(sizes: tuple[int, ...], cost: Callable[[int], float]) -> StageCost:
    points = tuple(cost(n) for n in sizes)
    return StageCost(sizes, points, points)


def measured() -> LatencyProfile:
    stages = (at(SIZES, lambda n: 0.001 + 0.002 * n), at((1, 4), lambda n: 0.004 * n), at((1,), lambda _: 0.007))
    return LatencyProfile(stages, HERE)


class TestStageCost:
    @given(fixed=costs, per_image=costs)
    def test_a_straight_line_is_found_exactly(self, fixed: float, per_image: float) -> None:
        cost = at(SIZES, lambda n: fixed + per_image * n)
        assert cost.linear
        assert (cost.fixed, cost.per_image) == (pytest.approx(fixed, rel=1e-6), pytest.approx(per_image, rel=1e-6))
        for n in (1, 3, 50, 1000):
            assert cost.seconds(n) == pytest.approx(fixed + per_image * n)

    @given(
        st.floats(1e-4, 1e-2), st.floats(1e-4, 1e-2), st.lists(st.floats(-0.04, 0.04), min_size=len(SIZES), max_size=64)
    )
    def test_noise_of_four_per_cent_leaves_a_line_that_is_off_by_no_more(
        self, fixed: float, per_image: float, noise: list[float]
    ) -> None:
        true = [fixed + per_image * n for n in SIZES]
        noisy = tuple(s * (1 + off) for s, off in zip(true, noise, strict=False))
        cost = StageCost(SIZES, noisy, noisy)
        for n, s in zip(SIZES, true, strict=True):
            assert cost.seconds(n) == pytest.approx(s, rel=0.09)

    def test_over_many_noisy_profiles_the_line_is_right_on_average(self) -> None:
        rng = np.random.default_rng(0)
        true = np.array([0.004 + 0.001 * n for n in SIZES])
        fits = []
        for _ in range(300):
            points = tuple(true * rng.normal(1, 0.03, len(SIZES)))
            cost = StageCost(SIZES, points, points)
            fits.append((cost.fixed, cost.per_image))
        assert np.mean(fits, axis=0) == pytest.approx([0.004, 0.001], rel=0.01)
        assert np.std(fits, axis=0) == pytest.approx([0, 0], abs=2e-4)

    @given(st.lists(costs, min_size=1, max_size=len(SIZES)))
    def test_a_larger_batch_is_never_believed_to_take_less_time(self, points: list[float]) -> None:
        cost = StageCost(SIZES[: len(points)], tuple(points), tuple(points))
        seconds = [cost.seconds(n) for n in range(1, 100)]
        assert all(later >= earlier - 1e-15 for earlier, later in pairwise(seconds))
        assert cost.fixed >= 0
        assert cost.per_image >= 0

    def test_where_no_line_fits_the_points_are_joined(self) -> None:
        cost = at((1, 2, 4, 8), lambda n: 0.001 * n * n)
        assert not cost.linear
        assert [cost.seconds(n) for n in (1, 2, 4, 8)] == pytest.approx([0.001, 0.004, 0.016, 0.064])
        assert cost.seconds(3) == pytest.approx(0.010)
        assert cost.seconds(16) == pytest.approx(0.128), "beyond the largest its cost per image stays"

    def test_a_slow_point_does_not_raise_all_that_lie_behind_it(self) -> None:
        points = (0.001, 0.002, 0.012, 0.008, 0.016)
        cost = StageCost((1, 2, 4, 8, 16), points, points)
        assert not cost.linear
        assert cost.seconds(4) == cost.seconds(8) == pytest.approx(0.00923, abs=1e-5)  # pooled by relative error
        assert cost.seconds(16) == 0.016
        assert cost.seconds(2) == 0.002

    def test_one_point_says_what_an_image_costs(self) -> None:
        cost = StageCost((4,), (0.02,), (0.03,))
        assert (cost.fixed, cost.per_image, cost.seconds(8)) == (0, pytest.approx(0.005), pytest.approx(0.04))

    @pytest.mark.parametrize(
        ("sizes", "seconds", "cause"),
        [
            ((), (), "at least one"),
            ((1, 2), (0.1,), "as many seconds"),
            ((2, 1), (0.1, 0.1), "do not rise"),
            ((0, 1), (0.1, 0.1), "do not rise"),
            ((1,), (math.nan,), "finite"),
            ((1,), (-0.1,), "not negative"),
        ],
    )
    def test_points_that_are_none_are_refused(self, sizes: Any, seconds: Any, cause: str) -> None:
        with pytest.raises(ValueError, match=cause):
            StageCost(sizes, seconds, seconds)


class TestLatencyProfile:
    def test_what_is_written_is_what_is_read(self) -> None:
        profile = measured()
        assert LatencyProfile.from_json(profile.to_json()) == profile
        document = json.loads(profile.to_json())
        assert document["identity"]["device"] == "A CPU"
        assert document["stages"][0]["linear"] is True
        assert document["stages"][0]["fixed"] == pytest.approx(0.001)

    @pytest.mark.parametrize(
        ("change", "cause"),
        [
            ({"format_version": 2}, "format version 2, this server reads 1"),
            ({"stages": []}, "no stages"),
            ({"stages": [3]}, "not a latency profile"),
            ({"stages": [{"batches": [1], "p50": [1e-3]}]}, "'p99'"),
            ({"stages": [{"batches": [1.5], "p50": [1e-3], "p99": [1e-3]}]}, "not whole numbers"),
            ({"stages": [{"batches": [1], "p50": [10**400], "p99": [1e-3]}]}, "not readable as JSON"),
            ({"stages": [{"batches": [1, 1], "p50": [1, 1], "p99": [1, 1]}]}, "do not rise"),
            ({"identity": None}, "not a latency profile"),
            ({"identity": {"model": "x"}}, "'precision'"),
        ],
    )
    def test_what_is_no_profile_is_refused_with_its_cause(self, change: dict[str, Any], cause: str) -> None:
        document = {**json.loads(measured().to_json()), **change}
        with pytest.raises(ValueError, match=cause):
            LatencyProfile.from_json(json.dumps(document))

    @pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format_version": 1}'])
    def test_nor_is_just_any_text_one(self, text: str) -> None:
        with pytest.raises(ValueError, match="not "):
            LatencyProfile.from_json(text)

    def test_what_was_only_stated_is_not_written(self) -> None:
        with pytest.raises(ValueError, match="not measured"):
            LatencyProfile.lines([0.001], [0.001]).to_json()

    def test_a_profile_is_for_one_model_on_one_machine(self) -> None:
        other = Identity("f8368f00bc3c", "fp32", "onnxruntime 1.31.1", "Another CPU", 2)
        assert HERE.misfit(other) == "device A CPU, not Another CPU"
        assert HERE.misfit(Identity("f8368f00bc3c", "fp32", "onnxruntime 1.31.1", "A CPU", 2)) is None

    def test_an_image_costs_its_share_of_the_batch_that_pays(self) -> None:
        profile = LatencyProfile.lines([0.008, 0.0, 0.004], [0.001, 0.002, 0.003])
        assert profile.image_seconds((8, 4, 2)) == pytest.approx((0.002, 0.002, 0.005))


class TestLiveProfile:
    @given(slower=st.floats(0.1, 10), jitter=st.integers(0, 2**32 - 1))
    def test_it_follows_a_machine_that_has_changed(self, slower: float, jitter: int) -> None:
        profile, rng = measured(), np.random.default_rng(jitter)
        live = LiveProfile(profile)
        for batch in rng.integers(1, 65, 500).tolist():
            live.observe(1, batch, profile.seconds(1, batch) * slower * rng.lognormal(0, 0.05))
        assert live.seconds(1, 8) == pytest.approx(profile.seconds(1, 8) * slower, rel=0.05)
        assert live.stages[0].per_image == pytest.approx(0.002 * slower, rel=0.05)
        assert live.seconds(2, 8) == profile.seconds(2, 8), "the other stages have not been seen"

    @given(st.floats(1e-9, 1e9))
    def test_one_batch_moves_it_by_little_whatever_it_took(self, seconds: float) -> None:
        profile = measured()
        live = LiveProfile(profile)
        live.observe(1, 8, seconds)
        moved = live.seconds(1, 8) / profile.seconds(1, 8)
        assert 0.89 <= moved <= 1.017
        assert (moved - 1) * (seconds - profile.seconds(1, 8)) >= -1e-9

    def test_ten_batches_that_are_far_quicker_than_believed_halve_the_belief(self) -> None:
        profile = measured()
        live = LiveProfile(profile)
        for _ in range(10):
            live.observe(1, 8, profile.seconds(1, 8) / 20)
        assert live.seconds(1, 8) < profile.seconds(1, 8) / 2

    def test_a_stall_now_and_then_is_not_taken_for_the_machine(self) -> None:
        profile = measured()
        live = LiveProfile(profile)
        for number in range(1000):
            live.observe(2, 4, profile.seconds(2, 4) * (100 if number % 50 == 0 else 1))
        assert live.seconds(2, 4) == pytest.approx(profile.seconds(2, 4), rel=0.03)

    def test_a_correction_that_nothing_tests_fades(self) -> None:
        profile = measured()
        live = LiveProfile(profile)
        for _ in range(200):
            live.observe(1, 8, 5 * profile.seconds(1, 8))
            live.observe(2, 8, 5 * profile.seconds(2, 8))
        for tick in range(800):  # 40 s
            live.forget(0.05)
            if tick % 40 == 0:
                live.observe(1, 8, 5 * profile.seconds(1, 8))
        assert live.seconds(1, 8) == pytest.approx(5 * profile.seconds(1, 8), rel=0.02), "tested every other second"
        assert live.seconds(2, 8) == pytest.approx(profile.seconds(2, 8), rel=0.02)

    def test_that_a_machine_is_quick_is_not_forgotten(self) -> None:
        profile = measured()
        live = LiveProfile(profile)
        for _ in range(200):
            live.observe(1, 8, profile.seconds(1, 8) / 5)
        for _ in range(800):
            live.forget(0.05)
        assert live.seconds(1, 8) == pytest.approx(profile.seconds(1, 8) / 5, rel=0.02)

    def test_what_says_nothing_changes_nothing(self) -> None:
        live = LiveProfile(LatencyProfile.lines([0.0], [0.0]))
        live.observe(1, 8, 0.1)
        assert live.seconds(1, 8) == pytest.approx(0, abs=1e-9)
        live = LiveProfile(measured())
        live.observe(1, 8, 0.0)
        assert live.seconds(1, 8) == measured().seconds(1, 8)


def test_of_batches_that_are_nearly_as_fast_the_smallest_pays() -> None:
    cpu = StageCost((1, 2, 4, 8), (0.010, 0.0192, 0.0384, 0.0768), (0.02,) * 4)  # 4 % to be had from larger batches
    gpu = StageCost((1, 8, 64), (0.004, 0.0042, 0.012), (0.02,) * 3)
    assert LatencyProfile((cpu, gpu)).sizes_that_pay() == (1, 64)
