"""The live budget under a virtual clock: the server's own controllers on its own scheduler, while traffic changes.

    python -m benchmarks.control drift --out --plots build      # the cost loop while the input gets harder and easier
    python -m benchmarks.control overload --out --plots build   # the brownout while two and three times as much arrives
    python -m benchmarks.control odd --out                      # the same while some clients are patient, or hurried
    python -m benchmarks.control low --out                      # clients of low priority that fill half of the queue
    python -m benchmarks.control late --out                     # the share of late answers under latency targets

Costs are stated, images synthetic and seeded: the same result every time. One image a request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from benchmarks import cascades
from benchmarks.harness import RESULTS, Options, Report, command_line, finish
from benchmarks.plots import pyplot, save
from benchmarks.simulate import SAMPLES, profile_of, server
from benchmarks.virtual import Fate, Setup, Simulation, Ticks, Trace
from server.bench import arrivals
from server.budget.control import Machine
from server.budget.controller import BudgetController
from server.budget.loops import Brownout
from server.budget.store import MemoryStore, Policy
from server.bundle.frontier import Frontier, FrontierRow
from server.bundle.profile import LiveProfile
from server.calibration.sweep import sweep
from server.cascade.scheduler import LOW, NORMAL, Load, Priority

GMACS = (0.4725, 1.4625, 3.4975)  # T2T-ViT-12, cumulative
PROFILE = ((0.2, 0.2, 0.2), (0.02, 0.06, 0.15))  # milliseconds a batch, and an image of it, by stage
BATCH_SIZES = (128, 128, 128)
BUDGET = 1.25  # GMACs an image

SHIFTS = (0.0, 0.5, 0.0, -0.5, 0.0)  # of the images' difficulty, in standard deviations, segment by segment
SEGMENT = 50_000  # images
WINDOW = 10_000

RATES = (8_000.0, 16_000.0, 24_000.0, 8_000.0)  # images a second
STEP_S = 5.0
DEADLINE_S = 0.05

PATIENT_S = 30.0
ODD = {  # share of the requests that are given another time, and that time
    "all alike": (0.0, DEADLINE_S),
    "1 % patient": (0.01, PATIENT_S),
    "5 % patient": (0.05, PATIENT_S),
    "20 % patient": (0.2, PATIENT_S),
    "5 % hurried": (0.05, DEADLINE_S / 10),
    "20 % hurried": (0.2, DEADLINE_S / 10),
    "60 % hopeless": (0.6, 1e-4),  # less than one image takes alone
}
LONG_QUEUE = 1 << 20
QUEUES = {"a long queue": LONG_QUEUE, "a queue of 512": 512}

LOADS = (0.0, 0.5, 1.5)  # of the capacity, by NORMAL
LOW_QUEUES = (512, 4096)
LOW_RATE = 2.0  # of the capacity

QUANTILES = (0.5, 0.9, 0.99, 0.999)
TARGETS_S = (0.002, 0.004, 0.006, 0.0075)
TARGET_LOAD = 0.9
SETTLING = 0.4  # of a run, at its beginning


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(STUDIES))
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="length of the run, of the full one (default 1)")
    parser.add_argument("--plots", type=Path, help="folder for the plot")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for the .json")
    options = parser.parse_args(arguments)
    options.command = command_line("control", sys.argv[1:] if arguments is None else arguments)
    return finish(STUDIES[options.what](options), options)


class Steered:
    """One simulation with a live budget in charge."""

    def __init__(
        self,
        frontier: Frontier,
        setup: Setup,
        times: NDArray[np.float64],
        rows: NDArray[np.int64],
        *,
        deadlines: NDArray[np.float64] | None = None,
        priorities: Sequence[Priority] | None = None,
        target: Mapping[str, float] = MappingProxyType({"gmacs": BUDGET}),
    ) -> None:
        self.machine = Machine(frontier.rows, setup.max_batch_sizes, setup.executors, places=setup.max_queued_images)
        self.machine.profile = LiveProfile(setup.profile)
        store = MemoryStore()
        store.save(Policy(1, dict(target), "cost"))
        self.budget = BudgetController(frontier, store, machine=self.machine)
        self.pressure: list[tuple[float, float]] = []
        self._times, self._seen = times, 0
        self._given = np.full(len(times), setup.deadline_s) if deadlines is None else deadlines - times
        self._priorities: Sequence[Priority] = [NORMAL] * len(times) if priorities is None else priorities
        self.simulation = Simulation(
            setup,
            server(setup)[1],
            times,
            rows,
            on_answer=lambda answer, latency: self.budget.observe(answer, latency, steered=False),
            ticks=Ticks(Brownout.TICK, self._tick),
            point=self.budget.point,
            deadlines=deadlines,
            priorities=priorities,
        )
        self.budget.on_change(self.simulation.retune)

    def _tick(self, now: float, _: Load) -> None:
        arrived = int(np.searchsorted(self._times, now, side="right"))
        for number in range(self._seen, arrived):
            if self._priorities[number] < LOW:
                self.machine.arrived(1, self._given[number])
        self._seen = arrived
        self.budget.tick(now, self.simulation.scheduler.deadlines(NORMAL))
        self.pressure.append((now, self.budget.pressure))


def _setup(records, row: FrontierRow, deadline_s: float) -> Setup:  # type: ignore[no-untyped-def]
    return Setup(profile_of(*PROFILE), records, row.thresholds, BATCH_SIZES, deadline_s=deadline_s)


def _begin(name: str, options: Options):  # type: ignore[no-untyped-def]
    records = cascades.synthetic(SAMPLES, options.seed)
    frontier = sweep(records.confidence, records.correct, GMACS)
    row = frontier.by_gmacs(BUDGET)
    assert row is not None
    stated = {"seed": options.seed, "profile_ms": PROFILE, "batch_sizes": BATCH_SIZES, "budget_gmacs": BUDGET}
    return Report(name, figures={**stated, "gmacs": GMACS}), records, frontier, row


# --- drift ------------------------------------------------------------------------------------------------------------


def drift(options: Options) -> Report:
    report, records, frontier, row = _begin("control_drift", options)
    segment = round(SEGMENT * options.scale)
    images = segment * len(SHIFTS)
    setup = _setup(records, row, deadline_s=1.0)
    rate = 0.5 * setup.capacity
    times = arrivals.poisson(rate, 1.02 * images / rate, options.seed + 1)[:images]
    shift = np.repeat(SHIFTS, segment)[: len(times)]
    rows = cascades.draw(records, len(times), options.seed + 2, shift=shift)
    held = Steered(frontier, setup, times, rows).simulation.run()
    fixed = Simulation(setup, server(setup)[1], times, rows).run()
    window = round(WINDOW * options.scale)
    for name, trace in (("held", held), ("thresholds fixed", fixed)):
        cost = np.array(GMACS)[trace.exit - 1]  # in order of arrival; all are answered at this load
        segments = [float(part.mean()) / BUDGET - 1 for part in np.array_split(cost, len(SHIFTS))]
        windows = [float(cost[at : at + window].mean()) / BUDGET - 1 for at in range(0, len(cost) - window + 1, window)]
        key = name.split()[-1]
        report.add(
            f"{name}: mean cost of each segment off the budget",
            ", ".join(f"{off:+.2%}" for off in segments),
            **{f"{key}_segments": segments},
        )
        report.add(
            f"{name}: windows of {window} off the budget by at most",
            f"{max(map(abs, windows)):.2%}",
            **{f"{key}_windows": windows},
        )
        report.figures[f"{key}_accuracy"] = float(trace.correct.mean())
        report.figures[f"{key}_answered"] = float((trace.exit > 0).mean())
    if options.plots:
        _plot_drift(report.figures, window, options.plots / "control_drift.png")
    return report


def _plot_drift(figures, window: int, path: Path) -> None:  # type: ignore[no-untyped-def]
    figure, axes = pyplot().subplots(figsize=(7, 4.2), dpi=150)
    axes.grid(alpha=0.3)
    for key, label in (("fixed", "thresholds fixed"), ("held", "cost held")):
        offs = figures[f"{key}_windows"]
        axes.plot([(n + 0.5) * window / 1000 for n in range(len(offs))], [100 * o for o in offs], "o-", label=label)
    axes.axhspan(-3, 3, color="0.9")
    axes.set(xlabel="thousand images", ylabel="mean cost of a window off the budget, %")
    axes.legend()
    save(figure, path)


# --- overload ---------------------------------------------------------------------------------------------------------


def _stepped(options: Options) -> NDArray[np.float64]:
    step = STEP_S * options.scale
    parts = [arrivals.poisson(rate, step, options.seed + 1 + n) + n * step for n, rate in enumerate(RATES)]
    return np.concatenate(parts)


def overload(options: Options) -> Report:
    report, records, frontier, row = _begin("control_overload", options)
    setup = _setup(records, row, DEADLINE_S)
    step = STEP_S * options.scale
    times = _stepped(options)
    rows = cascades.draw(records, len(times), options.seed + 9)
    report.add("capacity at the budget", f"{setup.capacity:.0f} images/s", capacity=setup.capacity)
    report.add("offered", ", ".join(f"{rate:.0f}" for rate in RATES) + f" images/s, {step:g} s each", rates=RATES)
    steered = Steered(frontier, setup, times, rows)
    contenders = {"brownout": steered.simulation, "fixed": Simulation(setup, server(setup)[1], times, rows)}
    traces = {name: simulation.run() for name, simulation in contenders.items()}
    for name, trace in traces.items():
        figures = outcome(trace)
        report.add(
            f"{name}: answered in time, of all",
            f"{figures['answered_in_time']:.4f}, of them cut short {figures['degraded']:.4f}",
            **{name: figures},
        )
        report.add(f"{name}: refused", f"{figures['refused']:.4f}")
        report.add(f"{name}: correct in time, of all", f"{figures['correct_in_time']:.4f}")
        report.add(f"{name}: p50, p99 ms", f"{figures['p50_ms']:.1f}, {figures['p99_ms']:.1f}")
    if options.plots:
        _plot_overload(traces, times, steered.pressure, options.plots / "control_overload.png")
    return report


def outcome(trace: Trace, among: NDArray[np.bool_] | None = None) -> dict[str, float]:
    """Fractions of all arrivals, or of those `among` (N,) all; latencies of the answers."""
    among = np.ones(len(trace.fate), dtype=bool) if among is None else among
    fate, correct, latency = trace.fate[among], trace.correct[among], trace.latency[among]
    answered = np.isin(fate, (Fate.IN_TIME, Fate.DEGRADED))
    p50, p99 = np.nanquantile(latency, (0.5, 0.99)) * 1000 if answered.any() else (np.nan, np.nan)
    return {
        "answered_in_time": float(answered.mean()),
        "degraded": float((fate == Fate.DEGRADED).mean()),
        "refused": float(np.isin(fate, (Fate.REFUSED, Fate.EXPIRED)).mean()),
        "correct_in_time": float((answered & correct).mean()),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
    }


def _plot_overload(  # type: ignore[no-untyped-def]
    traces: dict[str, Trace], times: NDArray[np.float64], pressure: Sequence[tuple[float, float]], path: Path
) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4.2), dpi=150)
    axes.grid(alpha=0.3)
    bins = np.arange(0, times[-1] + 0.1, 0.1)
    every = np.histogram(times, bins)[0]
    for name, trace in traces.items():
        good = np.isin(trace.fate, (Fate.IN_TIME, Fate.DEGRADED)) & trace.correct
        axes.plot(
            bins[:-1], np.histogram(times[good], bins)[0] / np.maximum(every, 1), label=f"correct in time: {name}"
        )
    axes.plot(*zip(*pressure, strict=True), color="0.6", lw=1, label="pressure")
    axes.plot(bins[:-1], every / every.max(), "k:", lw=1, label="arrivals, of the most")
    axes.set(xlabel="seconds", ylabel="fraction", ylim=(0, 1.05))
    axes.legend(loc="lower left", fontsize=8)
    save(figure, path)


# --- clients that are given other times ------------------------------------------------------------------------------


def odd(options: Options) -> Report:
    """The overload of before; some requests, at random, are given more time or less."""
    report, records, frontier, row = _begin("control_odd", options)
    times = _stepped(options)
    rows = cascades.draw(records, len(times), options.seed + 9)
    chance = np.random.default_rng(options.seed + 10).random(len(times))
    for queue, places in QUEUES.items():
        setup = replace(_setup(records, row, DEADLINE_S), max_queued_images=places)
        for name, (share, given) in ODD.items():
            strange = chance < share
            deadlines = times + np.where(strange, given, DEADLINE_S)
            steered = Steered(frontier, setup, times, rows, deadlines=deadlines)
            trace = steered.simulation.run()
            found = {"all": outcome(trace), "others": outcome(trace, ~strange)}
            pressure = float(np.mean([pressure for _, pressure in steered.pressure]))
            report.add(
                f"{queue}, {name}",
                f"{_in_words(found['all'])}; the others {_in_words(found['others'])}; pressure {pressure:.3f}",
                **{f"{queue}, {name}": {**found, "pressure": pressure}},
            )
    return report


def _in_words(found: Mapping[str, float]) -> str:
    return f"in time {found['answered_in_time']:.4f}, right {found['correct_in_time']:.4f}, no {found['refused']:.4f}"


# --- clients of low priority ------------------------------------------------------------------------------------------


def low(options: Options) -> Report:
    """LOW asks for twice the capacity and waits long, so that its half of the queue is always full."""
    report, records, frontier, row = _begin("control_low", options)
    setup = _setup(records, row, DEADLINE_S)
    seconds = STEP_S * options.scale
    behind = arrivals.poisson(LOW_RATE * setup.capacity, seconds, options.seed + 1)
    for places, load, beside in product(LOW_QUEUES, LOADS, (np.empty(0), behind)):
        ahead = arrivals.poisson(load * setup.capacity, seconds, options.seed + 2) if load else np.empty(0)
        if not len(ahead) and not len(beside):
            continue
        times = np.concatenate([ahead, beside])
        order = np.argsort(times, kind="stable")
        times, back = times[order], order >= len(ahead)
        steered = Steered(
            frontier,
            replace(setup, max_queued_images=places),
            times,
            cascades.draw(records, len(times), options.seed + 3),
            deadlines=times + np.where(back, PATIENT_S, DEADLINE_S),
            priorities=[LOW if one else NORMAL for one in back],
        )
        trace = steered.simulation.run()
        # Until the last arrival: then what LOW has left is worked off.
        pressure = float(np.mean([pressure for now, pressure in steered.pressure if now <= times[-1]]))
        found = {name: outcome(trace, among) for name, among in (("normal", ~back), ("low", back)) if among.any()}
        about = f"queue of {places}, NORMAL at {load:g} of the capacity, {'LOW beside it' if len(beside) else 'alone'}"
        words = [f"pressure {pressure:.3f}", *(f"{name} {_in_words(one)}" for name, one in found.items())]
        report.add(about, "; ".join(words), **{about: {"pressure": pressure, **found}})
    return report


# --- latency targets --------------------------------------------------------------------------------------------------


def late(options: Options) -> Report:
    """The wanted row would be the dearest; the target binds. The share of late answers once it has settled."""
    report, records, frontier, row = _begin("control_late", options)
    setup = _setup(records, row, deadline_s=10.0)
    rate, seconds = TARGET_LOAD * setup.capacity, 8 * STEP_S * options.scale
    times = arrivals.poisson(rate, seconds, options.seed + 1)
    rows = cascades.draw(records, len(times), options.seed + 2)
    for quantile, target in zip(QUANTILES, TARGETS_S, strict=True):
        steered = Steered(frontier, setup, times, rows, target={"latency_ms": 1000 * target, "quantile": quantile})
        trace = steered.simulation.run()
        settled = times > SETTLING * seconds
        share = float((trace.latency[settled] > target).mean())
        kappa = steered.machine.tail.kappa
        report.add(
            f"quantile {quantile:g}, {1000 * target:g} ms: late, and wanted",
            f"{share:.5f}, {1 - quantile:.5f}; correct {trace.correct[settled].mean():.4f}, kappa {kappa:.2f}",
            **{str(quantile): {"late": share, "correct": float(trace.correct[settled].mean()), "kappa": kappa}},
        )
    return report


STUDIES: dict[str, Callable[[Options], Report]] = {
    "drift": drift,
    "overload": overload,
    "odd": odd,
    "low": low,
    "late": late,
}

if __name__ == "__main__":
    sys.exit(main())
