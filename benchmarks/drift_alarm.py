"""What deadlines, streams and time do to the cost loop and to the drift alarm. No server runs: all is counted.

    python -m benchmarks.drift_alarm --out

Hurried traffic, and an overload, go through the server's own scheduler under a virtual clock (`benchmarks.virtual`);
false alarms and delays are counted on images in succession, each judged by fixed thresholds. Streams are correlated as
video is (`cascades.draw`), each with calibration images of its own, drawn from the same population. Everything is
seeded: the same result every time. One image a request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import cascades
from benchmarks.control import BATCH_SIZES, BUDGET, GMACS, PROFILE, Steered
from benchmarks.harness import RESULTS, Options, Report, command_line, finish
from benchmarks.simulate import SAMPLES, profile_of
from benchmarks.virtual import Fate, Setup, Trace
from server.bench import arrivals
from server.budget.drift import ENOUGH, Drift
from server.bundle.frontier import Frontier, FrontierRow, Records, exits_taken
from server.calibration.sweep import sweep
from server.core import Answer, ImageResult, OperatingPoint

CORRELATIONS = (0.0, 0.9, 0.98)  # of the difficulty of two images in succession
COSTS = (0.25, 0.5, 0.75)  # operating points, by their place between the cheapest row and the knee
CALIBRATION = 5_000  # images: the fewer, the more of what looks like drift is calibration's own error
POPULATION = 100_000
STREAMS, STREAM = 20, 100_000  # of a correlation and an operating point, and images of each
START = 10_000  # images, the first of a stream: a server that begins
SHIFTS = (0.25, 0.5, 1.0)  # standard deviations of difficulty
BEFORE, AFTER, TRIALS = 20_000, 20_000, 20  # images around a shift

IMAGES = 200_000  # of a simulation
HURRIED = 0.2  # share of the images that have little time
HURRIED_S, PATIENT_S = 0.001, 1.0
LOADS = (0.9, 1.1)
DEADLINE_S = 0.05

NOTHING = np.zeros(0, np.float32)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="number and length of the runs, of the full ones")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for the .json")
    options = parser.parse_args(arguments)
    options.command = command_line("drift_alarm", sys.argv[1:] if arguments is None else arguments)
    report = Report("drift_alarm", figures={"seed": options.seed, "gmacs": GMACS, "calibration": CALIBRATION})
    for part in options.only:
        PARTS[part](report, options)
    return finish(report, options)


# --- with the scheduler -----------------------------------------------------------------------------------------------


class Watched(Steered):
    """A simulation with a live budget in charge and a drift alarm beside it."""

    def __init__(
        self,
        frontier: Frontier,
        setup: Setup,
        times: NDArray[np.float64],
        rows: NDArray[np.int64],
        **options: Any,
    ) -> None:
        super().__init__(frontier, setup, times, rows, **options)
        budget = self.budget
        self.drift = Drift(
            frontier.records, frontier.samples, lambda: budget.predicted.exit_fractions, self.simulation.point
        )
        budget.on_change(self.drift.retune)
        self.looks: list[tuple[bool, float]] = []  # whether it alarms, and the largest z
        self._judged = 0
        count = self.simulation.on_answer
        assert count is not None

        def observe(answer: Answer, latency: float) -> None:
            self.drift.observe(answer, False)
            count(answer, latency)
            self._judged += 1
            if self._judged % ENOUGH == 0:
                state = self.drift.state()
                self.looks.append((state.alarm, max(map(abs, state.z or (0.0,)))))

        self.simulation.on_answer = observe

    def figures(self) -> dict[str, float]:
        return {"alarmed_looks": float(np.mean([a for a, _ in self.looks])), "z": max(z for _, z in self.looks)}


def _calibrated(seed: int) -> tuple[Records, Frontier, FrontierRow]:
    """Traffic, and a frontier from other images of the same kind."""
    own = cascades.synthetic(CALIBRATION, seed + 100)
    frontier = sweep(own.confidence, own.correct, GMACS)
    row = frontier.by_gmacs(BUDGET)
    assert row is not None
    return cascades.synthetic(SAMPLES, seed), frontier, row


def _setup(records: Records, row: FrontierRow, deadline_s: float) -> Setup:
    return Setup(profile_of(*PROFILE), records, row.thresholds, BATCH_SIZES, deadline_s=deadline_s)


def hurried(report: Report, options: Options) -> None:
    """A share of the images has little time; a cost is held."""
    records, frontier, row = _calibrated(options.seed)
    setup = _setup(records, row, PATIENT_S)
    rate, images = 0.5 * setup.capacity, round(IMAGES * options.scale)
    found = report.figures["hurried"] = {}
    for share in (0.0, HURRIED, 0.5):
        for correlation in (0.0, 0.98):
            times = arrivals.poisson(rate, 1.05 * images / rate, options.seed + 1)[:images]
            rows = cascades.draw(records, len(times), options.seed + 2, correlation=correlation)
            rushed = np.random.default_rng(options.seed + 3).random(len(times)) < share
            deadlines = times + np.where(rushed, HURRIED_S, PATIENT_S)
            watched = Watched(frontier, setup, times, rows, deadlines=deadlines)
            trace = watched.simulation.run()
            figures = found[f"{share:g}/{correlation:g}"] = {
                "overall": _cost(trace, trace.exit > 0),
                "with_time": _cost(trace, (trace.exit > 0) & ~rushed),
                "cut_short": trace.fraction(Fate.DEGRADED),
                **watched.figures(),
            }
            report.add(
                f"{share:.0%} hurried, correlation {correlation:g}: GMACs of those with time, of all",
                f"{figures['with_time']:.3f}, {figures['overall']:.3f}; cut short {figures['cut_short']:.3f}, "
                f"largest z {figures['z']:.1f}, looks that alarm {figures['alarmed_looks']:.3f}",
            )


def _cost(trace: Trace, which: NDArray[np.bool_]) -> float:
    return float(np.asarray(GMACS)[trace.exit[which] - 1].mean())


def overload(report: Report, options: Options) -> None:
    """More arrives than the held cost leaves time for: brownout, and images that are cut short."""
    records, frontier, row = _calibrated(options.seed)
    setup = _setup(records, row, DEADLINE_S)
    images = round(IMAGES * options.scale)
    found = report.figures["overload"] = {}
    for load in LOADS:
        for hold in (True, False):
            rate = load * setup.capacity
            times = arrivals.poisson(rate, 1.05 * images / rate, options.seed + 1)[:images]
            rows = cascades.draw(records, len(times), options.seed + 2)
            watched = Watched(frontier, setup, times, rows)
            if not hold:
                watched.simulation.ticks = None
            trace = watched.simulation.run()
            name = "brownout" if hold else "no brownout"
            figures = found[f"{load:g}/{name}"] = {"cut_short": trace.fraction(Fate.DEGRADED), **watched.figures()}
            report.add(
                f"load {load:g}, {name}: largest z, looks that alarm",
                f"{figures['z']:.1f}, {figures['alarmed_looks']:.3f}; cut short {figures['cut_short']:.3f}",
            )


# --- without it -------------------------------------------------------------------------------------------------------


class Stream:
    """A drift alarm at one operating point, and the images that it hears of."""

    def __init__(self, seed: int, place: float) -> None:
        population = cascades.synthetic(POPULATION, seed)
        own = np.random.default_rng(seed + 1).integers(0, POPULATION, CALIBRATION)
        frontier = sweep(population.confidence[:, own], population.correct[:, own], GMACS)
        row = frontier.by_gmacs((1 - place) * frontier.rows[0].gmacs + place * frontier.knee.gmacs)
        assert row is not None
        self.population = population
        self._frontier, self._row = frontier, row
        self.point = OperatingPoint(1, row.thresholds)
        exits = exits_taken(population, row.thresholds)
        firsts = population.confidence.T.tolist()
        self._answers = [self._answer(exit_ + 1, seen) for exit_, seen in zip(exits.tolist(), firsts, strict=True)]

    def _answer(self, exit_: int, seen: Sequence[float]) -> Answer:
        confidences = (*seen, 1.0)[:exit_]
        return Answer(self.point, (ImageResult(NOTHING, exit_, confidences[-1], False, 0.0, 0.0, confidences),), 0.0)

    def alarms(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(looks, 2) whether each look alarms, by reason: psi, exit_fractions."""
        row, found = self._row, []
        drift = Drift(self._frontier.records, self._frontier.samples, lambda: row.exit_fractions, self.point)
        answers = self._answers
        for begin in range(0, len(rows) - ENOUGH + 1, ENOUGH):
            for image in rows[begin : begin + ENOUGH].tolist():
                drift.observe(answers[image], False)
            reasons = drift.state().reasons
            found.append(("psi" in reasons, "exit_fractions" in reasons))
        return np.array(found)


def _begun(alarms: NDArray[np.bool_]) -> int:
    """Alarms that begin; one that goes on is one."""
    return int((alarms & ~np.concatenate(([False], alarms[:-1]))).sum())


def false_alarms(report: Report, options: Options) -> None:
    """Streams that have not changed, watched from the start of a server on."""
    streams, images = (
        max(1, round(STREAMS * options.scale)),
        max(2 * START, round(STREAM * min(1.0, 5 * options.scale))),
    )
    first = START // ENOUGH
    found = report.figures["false_alarms"] = {}
    counts = {(place, c): np.zeros(6) for place in COSTS for c in CORRELATIONS}
    for number in range(streams):
        for place in COSTS:
            stream = Stream(options.seed + 1000 * number, place)
            for correlation in CORRELATIONS:
                rows = cascades.draw(stream.population, images, options.seed + number, correlation=correlation)
                alarms = stream.alarms(rows)
                any_, later = alarms.any(axis=1), alarms[first:]
                counts[place, correlation] += (
                    any_[:first].any(),
                    _begun(any_[first:]),
                    _begun(later[:, 0]),
                    _begun(later[:, 1]),
                    any_[first:].mean(),
                    1,
                )
    for (place, correlation), (starts, begun, psi, exits, looks, of) in counts.items():
        millions = of * (images - START) / 1e6
        figures = found[f"{place:g}/{correlation:g}"] = {
            "millions": millions,
            "per_million": begun / millions,
            "psi_per_million": psi / millions,
            "exit_fractions_per_million": exits / millions,
            "alarmed_looks": looks / of,
            "starts_with_alarm": starts / of,
        }
        report.add(
            f"operating point {place:g}, correlation {correlation:g}: false alarms per million images",
            f"{figures['per_million']:.2f} (psi {figures['psi_per_million']:.2f}, exits "
            f"{figures['exit_fractions_per_million']:.2f}) in {millions:.1f} million; looks that alarm "
            f"{figures['alarmed_looks']:.4f}; of the starts {figures['starts_with_alarm']:.2f}",
        )


def delays(report: Report, options: Options) -> None:
    """Images from a shift to the alarm, with traffic as in calibration before it."""
    trials = max(1, round(TRIALS * options.scale))
    shift = np.repeat([0.0, 1.0], [BEFORE, AFTER])
    found = report.figures["delays"] = {}
    streams = [Stream(options.seed + 1000 * number, 0.5) for number in range(min(trials, 5))]
    for size in SHIFTS:
        for correlation in CORRELATIONS:
            waits: list[float] = []
            for trial in range(trials):
                stream = streams[trial % len(streams)]
                rows = cascades.draw(
                    stream.population,
                    len(shift),
                    options.seed + 7 * trial,
                    correlation=correlation,
                    shift=size * shift,
                )
                heard = stream.alarms(rows).any(axis=1)[BEFORE // ENOUGH :]
                waits.append((int(heard.argmax()) + 1) * ENOUGH if heard.any() else float("inf"))
            median, slow = np.quantile(waits, (0.5, 0.9), method="higher").tolist()
            missed = float(np.mean(np.isinf(waits)))
            found[f"{size:g}/{correlation:g}"] = {
                "median": None if np.isinf(median) else median,
                "p90": None if np.isinf(slow) else slow,
                "missed": missed,
            }
            report.add(
                f"shift of {size:g} sigma, correlation {correlation:g}: images to the alarm, median and p90",
                f"{median:.0f}, {slow:.0f}; not within {AFTER}: {missed:.2f}",
            )


PARTS: dict[str, Any] = {
    "hurried": hurried,
    "overload": overload,
    "false_alarms": false_alarms,
    "delays": delays,
}


if __name__ == "__main__":
    sys.exit(main())
