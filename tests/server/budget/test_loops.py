"""The controllers alone: a model of a server that they steer, and the clock turned by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.budget.loops import (
    KAPPA,
    Brownout,
    CostLoop,
    LatencyLoop,
    Quantile,
    Rate,
    Tail,
    Waiting,
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


def test_every_quantile_follows_what_was_learned_of_the_tail():
    for quantile in (0.5, 0.9, 0.99, 0.999):
        assert tail_factor(quantile, 2 * KAPPA) == pytest.approx(2 * tail_factor(quantile, KAPPA))


@given(st.floats(0.001, 1.0), st.floats(0.0, 0.99), st.floats(0.4, 5.0))
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


def test_a_clock_that_jumps_back_stops_no_rate():
    rate = Rate(horizon=0.5)
    for step in range(40):
        rate.add(5)
        rate.tick(1000 + step * 0.05)
    for step in range(40):
        rate.add(10)
        rate.tick(step * 0.05)
    assert rate.value == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_a_running_quantile_is_found_and_followed(quantile: float):
    rng = np.random.default_rng(0)
    running, found = Quantile(quantile), []
    for scale in (0.01, 1.0):
        for number, seconds in enumerate(rng.exponential(scale, size=4000)):
            running.observe(float(seconds))
            found.append(running.value if number > 500 else math.nan)
        assert np.nanmean(found) == pytest.approx(-scale * math.log(1 - quantile), rel=0.15)
        found.clear()


def test_an_odd_time_hardly_moves_a_running_quantile():
    running = Quantile(0.5)
    for _ in range(3):
        running.observe(0.01)
    for odd in (1e9, 0.0, -1.0):
        before = running.value
        running.observe(odd)
        assert running.value == pytest.approx(before, rel=0.06)
    for _ in range(10_000):
        running.observe(0.0)
    assert 0 < running.value < 1e-5


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


def plant(quantile: float, true_factor: float, *, answers: int = 0, seed: int = 0) -> tuple[list[float], Tail]:
    """A server whose latencies are exponential beyond the median, with a tail that the loop does not know: the share
    of late answers, second by second."""
    tail = Tail()
    loop = LatencyLoop(0.05, quantile, 2, tail)
    rng = np.random.default_rng(seed)
    rate, alone = 300.0, 0.008
    late = []
    for _ in range(answers // 256):
        for _ in range(loop.TICKS):
            seconds = min(max(loop.affordable(rate, alone, COSTS[0], COSTS[-1]), COSTS[0]), COSTS[-1])
        median = predicted_latency(alone, rate * seconds / 2, 1.0)
        wanted = predicted_latency(alone, rate * seconds / 2, true_factor)
        # At the quantile the latency is `wanted`; at 0.5 there is only a median, which is that.
        if quantile > 0.5:
            scale = (wanted - median) / math.log(0.5 / (1 - quantile))
        else:
            median, scale = wanted, 0.3 * wanted
        latencies = median + scale * (rng.exponential(size=256) - math.log(2))
        for latency in latencies:
            loop.observe(float(latency))
        late.append(float(np.mean(latencies > loop.target)))
    return late, tail


class TestLatencyLoop:
    def test_a_higher_rate_leaves_less_for_an_image(self):
        loop = LatencyLoop(0.05, 0.99, 2, Tail())
        slow, fast = (loop.affordable(rate, alone=0.01, cheapest=0.001, dearest=0.01) for rate in (50, 500))
        assert slow == pytest.approx(10 * fast)
        assert loop.affordable(0.0, alone=0.01, cheapest=0.001, dearest=0.01) == math.inf
        assert loop.affordable(0.0, alone=0.06, cheapest=0.001, dearest=0.01) < 0

    @pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 0.999])
    @pytest.mark.parametrize("wrong", [0.7, 1.7, 3.0])
    def test_the_wanted_share_is_late_whatever_the_tail(self, quantile: float, wrong: float):
        late, _ = plant(quantile, wrong * tail_factor(quantile, KAPPA), answers=400_000)
        assert np.mean(late[len(late) // 3 :]) == pytest.approx(1 - quantile, rel=0.15)

    @pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
    def test_a_minute_is_enough_to_learn_a_tail_twice_as_long(self, quantile: float):
        late, _ = plant(quantile, 2 * tail_factor(quantile, KAPPA), answers=60 * 256)
        assert np.mean(late[-30:]) == pytest.approx(1 - quantile, rel=0.4)

    def test_a_quiet_hour_unlearns_nothing(self):
        loop = LatencyLoop(0.05, 0.99, 2, tail := Tail())
        for _ in range(10 * loop.TICKS):
            loop.affordable(1.0, alone=0.01, cheapest=0.001, dearest=0.01)
            for _ in range(loop.BLOCK):
                loop.observe(0.011)
        assert tail.kappa == KAPPA

    def test_an_overload_winds_nothing_up(self):
        loop = LatencyLoop(0.05, 0.99, 2, tail := Tail())
        for _ in range(200):
            loop.affordable(5000.0, 0.008, COSTS[0], COSTS[-1])  # more than the cheapest row can do
            for _ in range(loop.BLOCK):
                loop.observe(1.0)
        assert tail.kappa == KAPPA

    @pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 0.999])
    def test_a_stall_is_one_step(self, quantile: float):
        loop = LatencyLoop(0.05, quantile, 2, tail := Tail())
        for _ in range(loop.TICKS):
            loop.affordable(300.0, 0.008, COSTS[0], COSTS[-1])
        for _ in range(50_000):
            loop.observe(60.0)
        assert KAPPA < tail.kappa <= KAPPA * math.exp(loop.GAIN * loop.MOST) * 1.001

    def test_what_was_learned_outlives_the_target(self):
        tail = Tail()
        for target in (0.05, 0.06):
            before = tail.kappa
            loop = LatencyLoop(target, 0.99, 2, tail)
            for _ in range(loop.TICKS):
                loop.affordable(300.0, 0.008, COSTS[0], COSTS[-1])
            for _ in range(loop.BLOCK):
                loop.observe(0.1)
            assert tail.kappa > before


GIVEN = 0.2  # seconds, to every request


def tick(brownout: Brownout, now: float, left: Sequence[float] = (), deep: Sequence[float] = (), **how: Any) -> int:
    """The row in force, of 200 as wanted. `left`: seconds of what waits for the first stage, and `deep` of what waits
    behind it."""
    about = {"costs": COSTS, "wanted": 200, "executors": 2, "rate": 100.0, "given": GIVEN, **how}
    waiting = Waiting.of(now, [[now + one for one in left], [now + one for one in deep]], [0.0, 0.005])
    limit = brownout.tick(now, waiting=waiting, **about)
    row: int = about["wanted"] if limit is None else limit
    assert 0 <= row <= about["wanted"]
    return row


class Server:
    """A fluid model: a queue of images by deadline, executors that work it off, a row by which each costs. Every
    `odd`th image is given other `seconds`."""

    def __init__(self, odd: int = 0, seconds: float = GIVEN, places: float = math.inf) -> None:
        self.brownout = Brownout()
        self.odd, self.seconds, self.places = odd, seconds, places
        self.queue: list[float] = []  # deadlines, the earliest first
        self.now = self.arrived = self.done = 0.0
        self.refused = self.missed = 0

    def run(self, seconds: float, rate: float, wanted: int = 200) -> list[int]:
        rows = []
        for _ in range(round(seconds / Brownout.TICK)):
            self.now += Brownout.TICK
            left = [deadline - self.now for deadline in self.queue]
            row = tick(self.brownout, self.now, left, rate=rate, wanted=wanted, places=self.places)
            rows.append(row)
            whole = int(self.arrived + rate * Brownout.TICK) - int(self.arrived)
            for number in range(int(self.arrived), int(self.arrived) + whole):
                given = self.seconds if self.odd and number % self.odd == 0 else GIVEN
                if len(self.queue) < self.places:
                    self.queue.append(self.now + given)
                else:
                    self.refused += 1
            self.arrived += rate * Brownout.TICK
            self.queue.sort()
            self.done = min(self.done, 1.0) + Brownout.TICK * 2 / COSTS[row]
            served, self.queue = self.queue[: int(self.done)], self.queue[int(self.done) :]
            self.done -= len(served)
            late = sum(deadline < self.now for deadline in self.queue)
            self.missed, self.queue = self.missed + late, self.queue[late:]
        return rows


class TestBrownout:
    def test_a_busy_server_is_not_an_overloaded_one(self):
        server = Server()
        assert set(server.run(5, rate=195)) == {200}  # of 200 a second that the wanted row can do

    def test_an_overload_costs_accuracy_and_the_queue_stays_within_the_horizon(self):
        server = Server()
        rows = server.run(10, rate=500)
        assert len(server.queue) * COSTS[rows[-1]] / 2 <= GIVEN / 2
        assert server.missed == 0
        mean_cost = np.mean([COSTS[row] for row in rows[60:]])
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

    @pytest.mark.parametrize("odd", [100, 20, 5, 2])
    @pytest.mark.parametrize("seconds", [30.0, 1e9, math.inf])
    def test_the_patience_of_some_is_no_delay_for_the_others(self, odd: int, seconds: float):
        server = Server(odd, seconds)
        server.run(10, rate=500)
        assert server.missed == 0

    def test_the_patient_do_not_fill_the_queue(self):
        server = Server(5, 30.0, places=100)
        server.run(20, rate=500)
        assert server.refused == server.missed == 0

    def test_a_queue_too_short_to_wait_long_in_is_browned_out_before_it_is_full(self):
        server = Server(1, 60.0, places=64)
        rows = server.run(10, rate=300)
        assert rows[-1] < 200
        assert server.refused < 64, "while the load was new"

    @pytest.mark.parametrize("hurried", [[0.0], [1e-9], [-1.0], [0.001] * 2, [0.0, 0.001]])
    def test_a_few_hurried_move_nothing(self, hurried: list[float]):
        brownout = Brownout()
        for number in range(40):
            assert tick(brownout, number * 0.05, [*hurried, *[GIVEN] * 4]) == 200

    def test_many_hurried_count_as_such(self):
        assert tick(Brownout(), 0.0, [0.05] * 20, rate=300.0) < tick(Brownout(), 0.0, [GIVEN] * 20, rate=300.0)

    def test_who_waits_behind_the_first_stage_presses_with_what_is_left_to_do(self):
        assert tick(Brownout(), 0.0, deep=[GIVEN] * 40, rate=150.0) < 200
        assert tick(Brownout(), 0.0, deep=[30.0] * 40, rate=150.0) == 200

    def test_where_only_one_row_is_there_it_stays(self):
        brownout = Brownout()
        for number in range(40):
            waiting = Waiting.of(0.0, [[0.1] * 500], [0.0])
            assert (
                brownout.tick(
                    number * 0.05, costs=[0.01], wanted=0, executors=1, rate=1e4, waiting=waiting, given=GIVEN
                )
                is None
            )

    def test_a_clock_that_jumps_back_does_not_hold_the_ceiling_down(self):
        brownout = Brownout()
        assert tick(brownout, 1000.0, [GIVEN] * 200, rate=1000.0) < 200
        tick(brownout, 1001.0)
        rows = [tick(brownout, number * 0.05) for number in range(100)]
        assert rows[-1] == 200

    def test_clients_that_wait_for_answers_are_not_held_down_for_ever(self):
        """32 clients in a closed loop fill the server at any row, and never wait long."""
        brownout = Brownout()
        brownout.row = row = 0
        for number in range(round(150 / Brownout.TICK)):
            row = tick(brownout, number * Brownout.TICK, [10.0] * 30, rate=2 / COSTS[row], given=10.0, places=512)
        assert row == 200

    @given(
        loads=st.lists(
            st.tuples(
                st.floats(0, 2000),
                st.lists(st.floats(-1, 1e12), max_size=30),
                st.lists(st.floats(-1, math.inf), max_size=30),
            ),
            min_size=1,
            max_size=30,
        ),
        wanted=st.integers(0, 200),
        given=st.floats(0, 1e9),
        longest=st.sampled_from([math.inf, 1e-6, 0.05]),
        places=st.sampled_from([math.inf, 1, 512]),
    )
    @settings(deadline=None)
    def test_whatever_comes_the_ceiling_is_a_row_below_the_wanted_one(self, loads, wanted: int, **how: float):
        brownout = Brownout()
        for number, (rate, left, deep) in enumerate(loads):
            tick(brownout, number * 0.05, left, deep, rate=rate, wanted=wanted, **how)
            assert brownout.row is None or 0 <= brownout.row < max(wanted, 1)
