"""The simulator: nothing is lost, time has no unit, and where the answer is known it is found."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import cascades
from benchmarks import simulate as simulation
from benchmarks.baselines import (
    BASELINES,
    FixedDelay,
    by_policy,
    compacted,
    largest_queue_first,
    padded,
    shallow_first,
    static,
)
from benchmarks.offline import thresholds_for
from benchmarks.virtual import Fate, Setup, Simulation, Ticks, Trace
from server.bench import arrivals
from server.budget.controller import BudgetController
from server.budget.store import MemoryStore
from server.budget.store import Policy as Target
from server.bundle.frontier import NEVER
from server.bundle.profile import LatencyProfile
from server.calibration.sweep import sweep
from server.cascade.scheduler import deepest_first
from server.core import OperatingPoint

RECORDS = cascades.synthetic(2000)
MIX = (0.45, 0.30, 0.25)
THRESHOLDS = thresholds_for(RECORDS.confidence, MIX)
PROFILE = LatencyProfile.lines((0.02, 0.02, 0.02), (0.001, 0.002, 0.004))
SETUP = Setup(PROFILE, RECORDS, THRESHOLDS, (16, 16, 16), deadline_s=0.4)
WORK_CONSERVING = (deepest_first, shallow_first, largest_queue_first)


def simulate(setup: Setup = SETUP, policy=deepest_first, *, rate=150.0, images=1500, seed=0, **options) -> Trace:
    times = arrivals.poisson(rate, images / rate, seed)
    return Simulation(setup, policy, times, cascades.draw(setup.records, len(times), seed + 1), **options).run()


def backlog(setup: Setup, policy=deepest_first, images=1500) -> Trace:
    """All at once."""
    rows = cascades.draw(setup.records, images, 0)
    return Simulation(replace(setup, deadline_s=math.inf), policy, np.zeros(images), rows).run()


def test_the_setup_knows_its_rates():
    assert SETUP.reach == pytest.approx((1, 0.55, 0.25), abs=1e-3)
    assert SETUP.image_s == pytest.approx(0.001 + 0.55 * 0.002 + 0.25 * 0.004, rel=1e-3)


@pytest.mark.parametrize("name", [*BASELINES, "static"])
@pytest.mark.parametrize("rate", [60, 600])
def test_every_arrival_has_one_fate(name, rate):
    setup, policy = (static if name == "static" else BASELINES[name])(replace(SETUP, max_queued_images=40))
    times = arrivals.poisson(rate, 1000 / rate, 0)
    one = Simulation(setup, policy, times, cascades.draw(setup.records, len(times), 1))
    trace = one.run()
    figures = trace.figures()
    assert sum(figures[fate.name.lower()] for fate in Fate) == pytest.approx(1)
    assert figures["in_flight"] == 0
    assert one.engine.slots_in_use == 0, "state of nobody is left"
    assert sum(part["share"] for part in figures["by_exit"].values()) == pytest.approx(np.mean(trace.exit > 0))
    assert trace.rows[0] <= len(times)
    if rate == 60 and name == "compacted":
        assert trace.attainment == 1
    if rate == 600:
        assert trace.attainment < 1


def test_what_is_cut_short_is_in_flight():
    trace = simulate(rate=600, give_up_after=10)
    missed = sum(trace.fraction(fate) for fate in (Fate.LATE, Fate.DEGRADED, Fate.EXPIRED, Fate.REFUSED))
    assert missed * len(trace.fate) > 10
    assert trace.fraction(Fate.IN_FLIGHT) > 0


def test_latency_is_queue_and_compute():
    trace = simulate()
    answered = trace.exit > 0
    assert np.allclose(trace.latency[answered], (trace.queue + trace.compute)[answered])
    assert np.all(trace.latency[answered] <= SETUP.deadline_s + 1e-9)


def test_images_leave_where_the_records_say():
    times = arrivals.poisson(100, 10, 0)
    rows = cascades.draw(RECORDS, len(times), 1)
    trace = Simulation(replace(SETUP, deadline_s=math.inf), deepest_first, times, rows).run()
    sure = np.concatenate([RECORDS.confidence >= np.array(THRESHOLDS[:2])[:, None], np.ones((1, 2000), bool)])
    expected = sure.argmax(axis=0)[rows]
    assert np.array_equal(trace.exit, expected + 1)
    assert np.array_equal(trace.correct, RECORDS.correct[expected, rows])


def test_the_same_seed_gives_the_same_result():
    first, second = simulate(rate=250), simulate(rate=250)
    assert np.array_equal(first.fate, second.fate)
    assert np.array_equal(first.latency, second.latency, equal_nan=True)
    assert not np.array_equal(first.latency, simulate(rate=250, seed=1).latency[: len(first.latency)], equal_nan=True)


@pytest.mark.parametrize("policy", WORK_CONSERVING)
def test_slower_by_a_factor_is_later_by_that_factor(policy):
    plain = simulate(policy=policy)
    # A power of two scales floats without rounding.
    profile = LatencyProfile.lines((0.08, 0.08, 0.08), (0.004, 0.008, 0.016))
    slow = simulate(replace(SETUP, profile=profile, deadline_s=1.6), policy, rate=150 / 4)
    assert np.array_equal(slow.fate, plain.fate)
    assert np.allclose(slow.latency, 4 * plain.latency, equal_nan=True)


def test_without_fixed_costs_all_work_conserving_policies_have_equal_throughput():
    free = replace(SETUP, profile=LatencyProfile.lines((0, 0, 0), (0.001, 0.002, 0.004)))
    ended = [backlog(free, policy).ended for policy in WORK_CONSERVING]
    assert ended == pytest.approx([ended[0]] * len(ended))


def test_where_all_leave_at_the_first_exit_it_is_a_single_queue():
    setup = replace(SETUP, thresholds=(0.0, 0.0, 0.0), deadline_s=math.inf)
    times = arrivals.poisson(100, 10, 0)
    trace = Simulation(setup, deepest_first, times, np.zeros(len(times), np.int64)).run()
    # Lindley's recursion, for batches: the next one starts when the device is free and somebody is there.
    ends, free, first = [], 0.0, 0
    while first < len(times):
        start = max(free, times[first])
        size = min(16, int(np.searchsorted(times, start, side="right")) - first)
        free = start + PROFILE.seconds(1, size)
        ends += [free] * size
        first += size
    assert np.allclose(trace.latency, np.array(ends) - times)
    assert trace.batches[1:].tolist() == [0, 0]


def test_a_backlog_is_served_at_the_capacity():
    """With survivors gathered up to full batches; run to completion pays for emptier ones."""
    gathered = backlog(SETUP, shallow_first, images=4000)
    assert len(gathered.fate) / gathered.ended == pytest.approx(SETUP.capacity, rel=0.02)
    completed = backlog(SETUP, deepest_first, images=4000)
    assert completed.ended > gathered.ended
    assert completed.rows.sum() == gathered.rows.sum()
    assert gathered.figures()["utilisation"] == pytest.approx(1)


def test_two_executors_serve_twice_as_many():
    one, two = backlog(SETUP), backlog(replace(SETUP, executors=2))
    assert one.ended / two.ended == pytest.approx(2, rel=0.05)
    assert two.figures()["utilisation"] > 0.9


def test_a_padded_batch_costs_its_first_size_at_every_stage():
    images = 4
    setup = replace(SETUP, thresholds=(0.5, NEVER, 0.0))
    hard, easy = int(RECORDS.confidence[0].argmin()), int(RECORDS.confidence[0].argmax())
    served, policy = padded(setup)
    rows = np.array([easy, easy, hard, easy])
    trace = Simulation(served, policy, np.zeros(images), rows).run()
    assert trace.batches.tolist() == [1, 1, 1]
    assert trace.busy_s == pytest.approx(sum(PROFILE.seconds(stage, images) for stage in (1, 2, 3)))
    assert (
        Simulation(*compacted(setup), np.zeros(images), np.array([easy, easy, hard, easy])).run().busy_s < trace.busy_s
    )


def test_a_fixed_delay_waits_for_a_full_batch_or_its_end():
    setup = replace(SETUP, thresholds=(0.0, 0.0, 0.0), max_batch_sizes=(2, 2, 2))
    times = np.array([0.0, 1.0, 1.005])
    trace = Simulation(setup, FixedDelay(0.01, 2), times, np.zeros(3, np.int64)).run()
    assert trace.queue == pytest.approx([0.01, 0.005, 0.0])


def test_a_delay_that_outlasts_the_deadline_loses_the_image_and_ends():
    setup = replace(SETUP, deadline_s=0.05)
    trace = Simulation(setup, FixedDelay(0.04, 16), np.array([0.0, 1.0]), np.zeros(2, np.int64)).run()
    assert trace.fraction(Fate.IN_TIME) == 0
    assert trace.fraction(Fate.IN_FLIGHT) == 0


def test_a_full_server_refuses_and_a_late_image_is_degraded():
    crowded = simulate(replace(SETUP, max_queued_images=4), rate=600)
    assert crowded.fraction(Fate.REFUSED) > 0.2
    late = simulate(replace(SETUP, deadline_s=0.07), rate=300)
    assert late.fraction(Fate.DEGRADED) > 0
    assert late.fraction(Fate.REFUSED) > 0, "they could not have made it"
    assert np.all(late.latency[late.fate == Fate.DEGRADED] <= 0.07 + 1e-9)
    assert np.all(late.exit[late.fate == Fate.REFUSED] == 0)
    assert late.figures()["correct_in_time"] > np.mean(late.correct[late.fate == Fate.IN_TIME]) * late.attainment


def test_what_would_make_the_first_batch_too_slow_for_its_head_is_refused():
    slow = replace(SETUP, deadline_s=0.03)
    trace = Simulation(slow, deepest_first, np.zeros(16), np.arange(16)).run()
    assert trace.fraction(Fate.REFUSED) == 7 / 16  # 16 images take 36 ms, 9 of them 29 ms
    assert trace.rows[0] == 9
    assert np.isin(trace.fate[7:], (Fate.IN_TIME, Fate.DEGRADED)).all()


def test_a_controller_ticks_and_its_points_are_in_force():
    seen = []

    def act(now, load):
        seen.append((now, sum(load.waiting)))
        if len(seen) == 3:
            one.retune(OperatingPoint(2, (0.0, 0.0, 0.0)))  # all leave at the first exit

    times = arrivals.poisson(100, 10, 0)
    rows = cascades.draw(RECORDS, len(times), 1)
    one = Simulation(SETUP, deepest_first, times, rows, ticks=Ticks(1.0, act))
    trace = one.run()
    assert [now for now, _ in seen[:3]] == pytest.approx([times[0] + 1, times[0] + 2, times[0] + 3])
    assert trace.exit[times < 2].max() == 3
    assert trace.exit[times > 3.1].max() == 1


def test_the_cost_loop_holds_its_budget_when_input_gets_harder():
    costs = (0.5, 1.5, 3.5)
    frontier = sweep(RECORDS.confidence, RECORDS.correct, costs)
    budget = 1.4

    def error(hold: str) -> float:
        store = MemoryStore()
        store.save(Target(1, {"gmacs": budget}, hold))
        controller = BudgetController(frontier, store)
        times = arrivals.poisson(100, 100, 0)
        harder = np.where(times > 20, 0.5, 0.0)
        one = Simulation(
            replace(SETUP, deadline_s=math.inf),
            deepest_first,
            times,
            cascades.draw(RECORDS, len(times), 1, shift=harder),
            point=controller.point,
            on_answer=lambda answer, seconds: controller.observe(answer, seconds, False),
        )
        controller.on_change(one.retune)
        return one.run().figures(costs, budget)["budget_error"]

    assert error("cost") < 0.05
    assert error("quality") > 0.1


def test_figures_of_a_budget_speak_of_the_worst_window():
    trace = simulate(replace(SETUP, thresholds=(0.0, 0.0, 0.0)))
    figures = trace.figures((1.0, 2.0, 3.0), budget=0.8)
    assert figures["mean_cost"] == 1
    assert figures["budget_error"] == pytest.approx(0.25)


def test_draws_follow_the_records_and_hard_ones_come_in_runs():
    rows = cascades.draw(RECORDS, 20_000, 0)
    assert np.bincount(rows, minlength=2000).max() < 40
    ease = RECORDS.confidence[0]

    def memory(rows):
        return np.corrcoef(ease[rows[:-1]], ease[rows[1:]])[0, 1]

    assert abs(memory(rows)) < 0.05
    runs = cascades.draw(RECORDS, 20_000, 0, correlation=0.95)
    assert memory(runs) > 0.6
    assert ease[runs].mean() == pytest.approx(ease.mean(), abs=0.05), "the mix stays"
    harder = cascades.draw(RECORDS, 20_000, 0, shift=0.5)
    assert ease[harder].mean() < ease.mean() - 0.05
    with pytest.raises(ValueError, match="correlation"):
        cascades.draw(RECORDS, 1, 0, correlation=1.0)


def test_nothing_to_simulate_is_refused():
    with pytest.raises(ValueError, match="0 arrivals"):
        Simulation(SETUP, deepest_first, np.array([]), np.array([], np.int64))
    with pytest.raises(ValueError, match="one executor"):
        padded(replace(SETUP, executors=2))


def test_the_maximum_holds_and_a_little_more_does_not():
    traffic = simulation.Traffic.generate("poisson", 1500, RECORDS, 0)
    setup = replace(SETUP, deadline_s=0.5)
    best = simulation.maximum(simulation.server, setup, traffic, guess=100)
    assert simulation.run(simulation.server, setup, traffic, best).attainment >= simulation.TARGET
    assert simulation.run(simulation.server, setup, traffic, best * 1.05).attainment < simulation.TARGET
    assert simulation.maximum(simulation.server, setup, traffic, guess=10 * best) == pytest.approx(best, rel=0.03)
    assert simulation.maximum(by_policy(shallow_first), setup, traffic, guess=best, beat=best) == best


def test_what_no_rate_can_serve_has_maximum_0():
    traffic = simulation.Traffic.generate("poisson", 200, RECORDS, 0)
    assert simulation.maximum(compacted, replace(SETUP, deadline_s=0.01), traffic, guess=100) == 0
    with pytest.raises(ValueError, match="images are too few"):
        simulation.maximum(compacted, replace(SETUP, deadline_s=100.0), traffic, guess=100)
    with pytest.raises(SystemExit, match="too few"):
        simulation.main(["maximum", "--images", "50"])


def test_configurations_are_balanced_and_the_same_every_time():
    found = simulation.configurations(72)
    assert found == simulation.configurations(72)
    assert len(set(found)) > 60
    for factor in ("deadline", "mix", "arrivals", "max_batch_size"):
        levels = [getattr(configuration, factor) for configuration in found]
        assert max(map(levels.count, levels)) - min(map(levels.count, levels)) <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--configurations", "1", "--images", "100"],
        ["p99", "--images", "100"],
        ["maximum", "--images", "300", "--profile", "2,2,2/0.1,0.2,0.4", "--deadline-ms", "30", "--correlation", "0.9"],
    ],
    ids=["compare", "p99", "maximum"],
)
def test_a_study_writes_its_figures_and_a_picture(arguments, tmp_path):
    pytest.importorskip("matplotlib")
    assert simulation.main([*arguments, "--out", str(tmp_path), "--plots", str(tmp_path)]) == 0
    name = f"simulate_{arguments[0]}"
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["broken"] == []
    assert results["figures"]
    assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_a_run_is_long_beside_its_deadline():
    options = simulation._parse(["compare"])
    short, long = (simulation.images_of(options, replace(SETUP, deadline_s=seconds)) for seconds in (0.1, 5.0))
    assert short == 5000
    assert long > 15 * 5.0 * SETUP.capacity
    assert simulation.images_of(simulation._parse(["compare", "--images", "7"]), SETUP) == 7


def test_options_that_make_no_sense_are_refused(capsys):
    for arguments in (["--deadline-ms", "inf"], ["--profile", "1,2/3"], ["--mix", "1,1,1"]):
        with pytest.raises(SystemExit):
            simulation.main(["maximum", *arguments])
        assert arguments[0] in capsys.readouterr().err
    with pytest.raises(SystemExit, match="3 values"):
        simulation.main(["maximum", "--mix", "0.5,0.5"])


def test_a_trace_sets_the_gaps(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("minute,invocations\n" + "".join(f"{60 * at},{5 + at % 3}\n" for at in range(20)))
    arguments = [
        "maximum",
        "--trace",
        str(path),
        "--trace-time",
        "minute",
        "--trace-count",
        "invocations",
        "--deadline-ms",
        "20",
    ]
    assert simulation.main([*arguments, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "simulate_maximum.json").read_text())["figures"]["maximum_server"] > 0
