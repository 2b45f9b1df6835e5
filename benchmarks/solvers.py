"""Solvers of thresholds side by side: accuracy at five budgets, and seconds.

    python -m benchmarks.solvers --out

On the confidences that the bundle's calibration logged, and on synthetic ones. The sweep solves all budgets at once,
the geometric family has one list for all, the genetic algorithm and the exact solver run once for each budget. All are
judged on the images that they were solved on: how well they solve is the question here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.cascades import synthetic
from benchmarks.exact import exact_best
from benchmarks.harness import Options, Report, finish, load_bundle, parse
from server.bundle.frontier import FrontierRow, Records
from server.calibration.families import genetic, geometric
from server.calibration.sweep import sweep

SHARES = (0.2, 0.3, 0.4, 0.55, 0.75)  # of the last exit's cost
GMACS = (0.4725, 1.4625, 3.4975)  # of the synthetic ones: T2T-ViT-12's


def main(arguments: list[str] | None = None) -> int:
    def more(parser):  # type: ignore[no-untyped-def]
        parser.add_argument(
            "--sizes", type=int, nargs="*", default=[50_000, 1_200_000], help="synthetic sets of images"
        )
        parser.add_argument("--exact-up-to", type=int, default=60_000, help="images that the exact solver is given")

    options = parse("solvers", __doc__, arguments, more)
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    report = Report("solvers", figures={"shares": SHARES})
    frontier = load_bundle(options).frontier
    if frontier.records is None:
        raise SystemExit("the bundle's frontier was imported and has no records of images; calibrate it first")
    _compare(report, "logged", frontier.records, frontier.stage_gmacs, options)
    for size in options.sizes:
        _compare(report, f"synthetic {size}", synthetic(size), GMACS, options)
    return report


def _compare(report: Report, name: str, records: Records, costs: Sequence[float], options: Options) -> None:
    confidence, correct = records.confidence, records.correct
    budgets = [share * costs[-1] for share in SHARES]
    solvers: dict[str, Callable[[], list[float | None]]] = {
        "sweep": lambda: _best(sweep(confidence, correct, costs, max_rows=4096).rows, budgets),
        "geometric": lambda: _best(geometric(confidence, correct, costs), budgets),
        "genetic": lambda: [genetic(confidence, correct, costs, budget).accuracy for budget in budgets],
    }
    if correct.shape[1] <= options.exact_up_to and len(costs) == 3:
        solvers["exact"] = lambda: [exact_best(confidence, correct, costs, budget) for budget in budgets]
    found: dict[str, NDArray[np.float64]] = {}
    for solver, solve in solvers.items():
        began = time.perf_counter()
        found[solver] = np.array([np.nan if a is None else a for a in solve()])
        seconds = time.perf_counter() - began
        shown = " ".join(f"{a * 100:6.2f}" for a in found[solver])
        key = f"{name}_{solver}".replace(" ", "_")
        report.add(
            f"{name}: {solver}", f"{shown}   {seconds:7.2f} s", **{key: found[solver].tolist(), f"{key}_s": seconds}
        )
    if "exact" in found:
        worst = float(np.nanmax(found["exact"] - found["sweep"])) * 100
        report.add(
            f"{name}: sweep below exact",
            f"{worst:.3f} points",
            **{f"{name}_sweep_below_exact".replace(" ", "_"): worst},
        )


def _best(rows: Sequence[FrontierRow], budgets: Sequence[float]) -> list[float | None]:
    return [max((row.accuracy for row in rows if row.gmacs <= budget), default=None) for budget in budgets]


if __name__ == "__main__":
    sys.exit(main())
