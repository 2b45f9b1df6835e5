"""The controllers alone: a model of a server that they steer, and the clock turned by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.budget.loops import (
    KAPPA,
    Brownout,
    CostLoop,
    LatencyLoop,
    Rate,
    affordable_load,
    predicted_latency,
    tail_factor,
)
from server.bundle.frontier import FrontierRow

COSTS = [0.002 + 0.00004 * row for row in range(201)]  # 2 to 10 ms


def test_the_tail_is_one_at_the_median_and_twice_kappa_at_the_99th_percentile():
    assert tail_factor(0.5, KAPPA) == pytest.approx(1)
    assert tail_factor(0.99, KAPPA) == pytest.approx(2 * KAPPA)
    assert 1 < tail_factor(0.9, KAPPA) < 2 * KAPPA < tail_factor(0.999, KAPPA)


@given(st.floats(0.001, 1.0), st.floats(0.0, 0.99), st.floats(1.0, 5.0))
def test_the_affordable_load_is_the_one_that_meets_the_latency(alone: float, load: float, factor: float):
    assert affordable_load(predicted_latency(alone, load, factor), alone, factor) == pytest.approx(load, abs=1e-9)


def test_no_load_meets_a_latency_below_that_of_an_image_alone():
    assert affordable_load(0.01, 0.02, 2.0) < 0
    assert predicted_latency(0.02, 1.0, 2.0) == math.inf


def test_a_rate_follows_what_arrives_and_forgets():
    rate = Rate(horizon=0.5)
    rate.tick(0.0)
    for step in range(1, 61):
        rate.add(5)
        rate.tick(step * 0.05)
    assert rate.value == pytest.approx(100, rel=0.01)
    for step in range(61, 121):
        rate.tick(step * 0.05)
    assert rate.value < 1


def test_a_burst_after_a_silence_is_no_rate_yet():
    rate = Rate(horizon=1.0)
    for start in (0.0, 100.0):
        rate.tick(start)
        rate.add(64)
        assert rate.tick(start + 0.05) == pytest.approx(64, rel=0.05), "64 in the last second, not 1,280"
        rate.rest()
        assert rate.value == 0


class TestCostLoop:
    STAGES = (0.47, 2.31)
    ROWS = tuple(
        FrontierRow((0.5, 0.0), 0.5, None, 0.47 + 1.84 * deep, (1 - deep, deep))
        for deep in np.linspace(0, 1, 257).tolist()
    )

    def loop(self, gmacs: float) -> CostLoop:
        return CostLoop(self.ROWS, self.STAGES, gmacs)

    def test_it_moves_at_the_end_of_a_block_and_by_sixteen_rows_at_most(self):
        loop = self.loop(1.0)
        rows = [loop.row]
        for _ in range(12 * CostLoop.BLOCK):
            loop.observe(2)
            rows.append(loop.row)
        steps = np.diff(rows)
        moved = np.flatnonzero(steps) + 1
        assert np.all(moved % CostLoop.BLOCK == 0)
        assert np.abs(steps).max() == CostLoop.MAX_STEP
        assert loop.row == 0

    @pytest.mark.parametrize("deep", [73, 74, 75])
    def test_it_stays_put_within_one_percent(self, deep: int):
        """So many of a block cost 0.995, 1.002 and 1.009."""
        loop = self.loop(1.0)
        for _ in range(20):
            assert not any(loop.observe(2 if n < deep else 1) for n in range(CostLoop.BLOCK))

    def test_it_does_not_wind_up_while_it_is_stuck_at_an_end(self):
        def blocks_to_leave(blocks_stuck: int) -> int:
            loop = self.loop(1.0)
            for _ in range(blocks_stuck * CostLoop.BLOCK):
                loop.observe(1)  # so easy that even the dearest row costs too little
            assert loop.row == len(self.ROWS) - 1
            for block in range(1, 100):
                for _ in range(CostLoop.BLOCK):
                    loop.observe(2)
                if loop.row < len(self.ROWS) - 1:
                    return block
            pytest.fail("never left the end")

        assert blocks_to_leave(1000) == blocks_to_leave(40) <= 5

    def test_a_budget_beyond_the_end_rests_at_the_dearest_row(self):
        loop = self.loop(50.0)
        assert not any(loop.observe(2) for _ in range(50 * CostLoop.BLOCK))
        assert loop.row == len(self.ROWS) - 1

    @pytest.mark.parametrize("hurried", [0.0, 0.2, 0.6, 0.9])
    def test_images_in_a_hurry_do_not_make_the_others_dear(self, hurried: float):
        """Twice as many go deep as calibration says, and whoever is in a hurry is cut short there."""
        rng = np.random.default_rng(0)
        loop, costs = self.loop(1.0), []
        for _ in range(80_000):
            deep = rng.random() < 2 * self.ROWS[loop.row].exit_fractions[1]
            if rng.random() < hurried:
                loop.observe(1, cut_short=deep)
            else:
                loop.observe(2 if deep else 1)
                costs.append(self.STAGES[deep])
        assert np.mean(costs[len(costs) // 4 :]) == pytest.approx(1.0, rel=0.02)

    def test_where_everybody_is_cut_short_it_waits(self):
        loop = self.loop(1.0)
        row = loop.row
        assert not any(loop.observe(1, cut_short=True) for _ in range(50 * CostLoop.BLOCK))
        assert loop.row == row

    def test_where_nobody_comes_to_an_exit_calibration_speaks_for_it(self):
        """At the first exit images are as in calibration, and none has the time for the second."""
        rows = [
            FrontierRow((0.5, 0.5, 0.0), 0.5, None, 0.5 + deep * (0.5 + 0.4), (1 - deep, 0.6 * deep, 0.4 * deep))
            for deep in np.linspace(0, 1, 257).tolist()
        ]
        loop = CostLoop(rows, (0.5, 1.0, 2.0), 1.0)
        rng = np.random.default_rng(0)
        for _ in range(50_000):
            loop.observe(1, cut_short=bool(rng.random() > rows[loop.row].exit_fractions[0]))
        assert loop.gmacs == pytest.approx(1.0, rel=0.1)

    def test_another_budget_forgets_the_images_and_keeps_what_was_learned(self):
        loop = self.loop(1.0)
        for _ in range(12 * CostLoop.BLOCK - 1):
            loop.observe(2)
        loop.aim_at(2.0)
        assert loop.budget == 2.0
        assert loop.gmacs < 1.5
        assert not any(loop.observe(1) for _ in range(CostLoop.BLOCK - 1))

    @pytest.mark.parametrize("gmacs", [0.1, 0.47, 5.0])
    def test_a_frontier_of_one_row_and_a_model_of_one_exit_leave_nothing_to_move(self, gmacs: float):
        one = FrontierRow((0.0,), 0.5, None, 0.47, (1.0,))
        loop = CostLoop((one,), (0.47,), gmacs)
        assert not any(loop.observe(1) for _ in range(10 * CostLoop.BLOCK))
        assert (loop.row, loop.gmacs) == (0, 0.47)


class TestLatencyLoop:
    def test_a_higher_rate_leaves_less_for_an_image(self):
        loop = LatencyLoop(0.05, 0.99, executors=2)
        slow, fast = (loop.affordable(rate, alone=0.01, cheapest=0.001, dearest=0.01) for rate in (50, 500))
        assert slow == pytest.approx(10 * fast)
        assert loop.affordable(0.0, alone=0.01, cheapest=0.001, dearest=0.01) == math.inf
        assert loop.affordable(0.0, alone=0.06, cheapest=0.001, dearest=0.01) < 0

    @pytest.mark.parametrize("true_kappa", [0.8, 2.0, 4.0])
    def test_kappa_is_learned_until_the_target_is_met(self, true_kappa: float):
        """The plant: latencies are exponential beyond the median, with a tail that the loop does not know."""
        loop = LatencyLoop(0.05, 0.99, executors=2)
        rng = np.random.default_rng(0)
        rate, alone = 300.0, 0.008
        tails = []
        for _ in range(200):
            for _ in range(loop.TICKS):
                seconds = min(max(loop.affordable(rate, alone, COSTS[0], COSTS[-1]), COSTS[0]), COSTS[-1])
            median = predicted_latency(alone, rate * seconds / 2, 1.0)
            p99 = predicted_latency(alone, rate * seconds / 2, 2 * true_kappa)
            scale = (p99 - median) / math.log(50)
            latencies = median + scale * (rng.exponential(size=loop.BLOCK) - math.log(2))
            for latency in latencies:
                loop.observe(float(latency))
            tails.append(float(np.quantile(latencies, 0.99)))
        assert np.mean(tails[-100:]) == pytest.approx(0.05, rel=0.1)

    def test_a_quiet_hour_unlearns_nothing(self):
        loop = LatencyLoop(0.05, 0.99, executors=2)
        loop.affordable(1.0, alone=0.01, cheapest=0.001, dearest=0.01)
        for _ in range(10 * loop.BLOCK):
            loop.observe(0.011)
        assert loop.kappa == KAPPA

    def test_an_overload_winds_nothing_up(self):
        loop = LatencyLoop(0.05, 0.99, executors=2)
        for _ in range(200):
            loop.affordable(5000.0, 0.008, COSTS[0], COSTS[-1])  # more than the cheapest row can do
            for _ in range(loop.BLOCK):
                loop.observe(1.0)
        assert loop.kappa == KAPPA

    def test_a_second_of_many_blocks_is_one_step(self):
        loop = LatencyLoop(0.05, 0.99, executors=2)
        for _ in range(loop.TICKS):
            loop.affordable(300.0, 0.008, COSTS[0], COSTS[-1])
        for _ in range(50 * loop.BLOCK):
            loop.observe(0.1)
        assert KAPPA < loop.kappa <= KAPPA * math.exp(loop.GAIN_UP * math.log(2)) * 1.001

    def test_one_block_in_the_dead_band_moves_nothing(self):
        loop = LatencyLoop(0.05, 0.5, executors=2)
        for _ in range(loop.BLOCK):
            loop.observe(0.051)
        assert loop.kappa == KAPPA


class Server:
    """A fluid model: a queue of images, executors that work it off, a row by which each costs."""

    def __init__(self, executors: int = 2, horizon: float = 0.1) -> None:
        self.executors, self.horizon = executors, horizon
        self.brownout = Brownout()
        self.queue = 0.0
        self.now = 0.0

    def run(self, seconds: float, rate: float, wanted: int = 200) -> list[int]:
        rows = []
        for _ in range(round(seconds / Brownout.TICK)):
            self.now += Brownout.TICK
            limit = self.brownout.tick(
                self.now, costs=COSTS, wanted=wanted, executors=self.executors, rate=rate,
                new=round(self.queue), deep=0.0, horizon=self.horizon,
            )  # fmt: skip
            row = wanted if limit is None else limit
            assert row <= wanted
            rows.append(row)
            served = Brownout.TICK * self.executors / COSTS[row]
            self.queue = max(0.0, self.queue + rate * Brownout.TICK - served)
        return rows


class TestBrownout:
    def test_a_busy_server_is_not_an_overloaded_one(self):
        server = Server()
        assert set(server.run(5, rate=195)) == {200}  # of 200 a second that the wanted row can do

    def test_an_overload_costs_accuracy_and_the_queue_stays_within_the_horizon(self):
        server = Server()
        rows = server.run(10, rate=500)
        assert server.queue * COSTS[rows[-1]] / server.executors <= server.horizon
        settled = rows[60:]
        mean_cost = np.mean([COSTS[row] for row in settled])
        assert mean_cost == pytest.approx(2 / 500, rel=0.08), "what the load leaves, neither more nor much less"

    def test_after_the_load_the_wanted_row_comes_back(self):
        server = Server()
        assert server.run(5, rate=600)[-1] < 200
        rows = server.run(10, rate=100)
        assert rows[-1] == 200
        assert server.brownout.row is None
        assert rows == sorted(rows), "no swing on the way up"

    def test_what_no_row_can_pay_gets_the_cheapest(self):
        server = Server()
        assert server.run(5, rate=5000)[-1] == 0

    def test_clients_that_wait_for_answers_are_not_held_down_for_ever(self):
        """32 clients in a closed loop fill the server at any row, and never wait long."""
        brownout = Brownout()
        brownout.row = 0
        now, row = 0.0, 0
        for _ in range(round(150 / Brownout.TICK)):
            now += Brownout.TICK
            limit = brownout.tick(
                now, costs=COSTS, wanted=200, executors=2, rate=2 / COSTS[row], new=30, deep=0.0, horizon=5.0
            )
            row = 200 if limit is None else limit
        assert row == 200

    @given(
        loads=st.lists(st.tuples(st.floats(0, 2000), st.integers(0, 500), st.floats(0, 1)), min_size=1, max_size=60),
        wanted=st.integers(0, 200),
    )
    @settings(deadline=None)
    def test_whatever_comes_the_ceiling_is_a_row_below_the_wanted_one(self, loads, wanted: int):
        brownout = Brownout()
        for number, (rate, new, deep) in enumerate(loads):
            limit = brownout.tick(
                number * 0.05, costs=COSTS, wanted=wanted, executors=2, rate=rate, new=new, deep=deep, horizon=0.1
            )
            assert limit is None or 0 <= limit < max(wanted, 1)
