"""What an exit may go by (the paper's Table 7): accuracy at the same mean cost, where images leave by their largest
probability, by the entropy of all, by the margin between the two largest, or by lot.

    python -m benchmarks.criteria TRAIN TEST --out

Thresholds are solved on the held-out slice of TRAIN, by each criterion for itself, and judged on TEST. By lot, as in
the paper: at each exit as many images leave as by the largest probability, which ones is drawn. At a given cost the two
operating points on either side are mixed. Intervals are of 95 %, from TEST drawn anew, the same draws for all criteria.
MACs at equal accuracy are held against the backbone in a file that `benchmarks.backbone` wrote, whose accuracy stays as
it is in all draws; those in which the curve does not reach it are left out of the interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.backbone import cost_of
from benchmarks.harness import RESULTS, Options, Report, finish, parse
from benchmarks.small_models import CRITERIA, Logged, log, records
from model.checkpoint import load_model
from model.flops import cumulative_macs
from model.recipes import RECIPES
from server.bundle.frontier import NDIGITS, NEVER, Criterion, Frontier, FrontierRow, Records, exits_taken
from server.calibration.evaluate import SHARES, budget_area
from server.calibration.sweep import sweep

EMBEDDED = Path(__file__).resolve().parent.parent / "model" / "checkpoints" / "photo10.safetensors"

Drawn = NDArray[np.float64]
"""(R,) or (rows, R): one value for each of R draws of the test images."""


def main(arguments: list[str] | None = None) -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("train", type=Path)
        parser.add_argument("test", type=Path)
        parser.add_argument("--checkpoint", type=Path, default=EMBEDDED, help="by default the embedded model's")
        parser.add_argument("--held-out", type=float, default=0.08, help="as in training (default %(default)s)")
        parser.add_argument("--seeds", type=int, default=100, help="lots (default %(default)s)")
        parser.add_argument("--draws", type=int, default=1000, help="of the test images (default %(default)s)")
        parser.add_argument("--backbone", type=Path, default=RESULTS / "backbone_photo10.json", help="a report")

    options = parse("criteria", __doc__, arguments, more)
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    model, header = load_model(options.checkpoint)
    recipe = replace(RECIPES["photo10"], held_out=options.held_out)
    logged = log(model, recipe, options.train, options.test)
    costs = np.array(cumulative_macs(model)) / 1e9
    backbone = json.loads(options.backbone.read_text())["figures"]
    target, alone = backbone["seed0_alone_accuracy"], backbone["seed0_alone_mmacs"] / 1e3
    images = len(logged["test"][1])
    weights = np.random.default_rng(0).multinomial(images, [1 / images] * images, options.draws).T / images  # (N, R)
    weights = np.hstack([np.full((images, 1), 1 / images), weights])  # the images as they are come first
    report = Report("criteria", figures={"model": model.config.name, "images": images, "seeds": options.seeds})
    report.figures["epochs"] = header.get("epochs")

    curves = {name: _curve(logged, name, costs, weights) for name in CRITERIA}
    plain = curves["max_probability"]
    plain_areas, plain_ratios = _areas(*plain, costs), _ratios(alone, target, *plain)
    for name, curve in curves.items():
        areas, ratios = _areas(*curve, costs), _ratios(alone, target, *curve)
        at = {f"{share:.0%}": _at(share * costs[-1], *curve) for share in SHARES}
        report.add(
            name,
            ", ".join(f"{values[0]:.2%} at {share}" for share, values in at.items()) + f", area {areas[0]:.4f}, "
            f"{ratios[0]:.2f} times fewer MACs than the backbone {_interval(ratios)}",
            **{
                f"{name}_accuracy": [values[0] for values in at.values()],
                f"{name}_area": areas[0],
                f"{name}_ratio": ratios[0],
                f"{name}_ratio_interval": _ends(ratios),
            },
        )
        if name == "max_probability":
            continue
        gains = {share: values - _at(float(share[:-1]) / 100 * costs[-1], *plain) for share, values in at.items()}
        report.add(
            f"{name} less max_probability, points",
            ", ".join(f"{g[0] * 100:+.2f} {_interval(g * 100)} at {share}" for share, g in gains.items())
            + f", area {(areas - plain_areas)[0] * 100:+.2f} {_interval((areas - plain_areas) * 100)}"
            + f", times fewer MACs {(ratios - plain_ratios)[0]:+.2f} {_interval(ratios - plain_ratios)}",
            **{
                f"{name}_gains": [g[0] for g in gains.values()],
                f"{name}_gain_intervals": [_ends(g) for g in gains.values()],
                f"{name}_area_gain": (areas - plain_areas)[0],
                f"{name}_area_gain_interval": _ends(areas - plain_areas),
                f"{name}_ratio_gain": (ratios - plain_ratios)[0],
                f"{name}_ratio_gain_interval": _ends(ratios - plain_ratios),
            },
        )
    _add_lots(report, options, logged, costs)
    return report


def _add_lots(report: Report, options: Options, logged: Logged, costs: NDArray[np.float64]) -> None:
    frontier, judging = _solved(logged, "max_probability", costs)
    rng = np.random.default_rng(0)
    every = [exits_taken(judging, thresholds) for thresholds in _with_ends(frontier)]
    lots = []
    for _ in range(options.seeds):
        order = rng.permutation(len(every[0]))  # who draws which lot
        lots.append([judging.correct[taken[order], np.arange(len(order))].mean() for taken in every])
    cost = np.array([costs[taken].mean() for taken in every])
    accuracy = np.array(lots).T  # (rows, seeds)
    at = {f"{share:.0%}": _at(share * costs[-1], np.tile(cost[:, None], options.seeds), accuracy) for share in SHARES}
    report.add(
        "by lot",
        ", ".join(f"{values.mean():.2%} ± {values.std():.2%} at {share}" for share, values in at.items()),
        lot_accuracy=[values.mean() for values in at.values()],
        lot_deviation=[values.std() for values in at.values()],
    )


def _solved(logged: Logged, criterion: Criterion, costs: NDArray[np.float64]) -> tuple[Frontier, Records]:
    solving, judging = (records(logged[name], criterion) for name in ("held-out", "test"))
    return sweep(solving.confidence, solving.correct, costs.tolist()), judging


def _with_ends(frontier: Frontier) -> list[tuple[float, ...]]:
    """Thresholds of all rows, and of both ends: everybody leaves at the first exit, or at the last."""
    others = frontier.num_exits - 1
    return [(0.0,) * others, *(row.thresholds for row in frontier.rows), (NEVER,) * others]


def _curve(
    logged: Logged, criterion: Criterion, costs: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[Drawn, Drawn]:
    """Mean cost and accuracy of every row of the frontier, for every draw of the test images: (rows, R)."""
    frontier, judging = _solved(logged, criterion, costs)
    every = [exits_taken(judging, thresholds) for thresholds in _with_ends(frontier)]
    cost = np.array([costs[taken] for taken in every]) @ weights
    right = np.array([judging.correct[taken, np.arange(len(taken))] for taken in every]) @ weights
    return cost, right


def _at(cost: float, costs: Drawn, accuracies: Drawn) -> Drawn:
    """Accuracy at exactly this mean cost, of two neighbours mixed: (rows, R) -> (R,)."""
    values = []
    for x, y in zip(costs.T, accuracies.T, strict=True):
        order = np.argsort(x, kind="stable")
        values.append(np.interp(cost, x[order], y[order]))
    return np.array(values)


def _areas(costs: Drawn, accuracies: Drawn, ends: NDArray[np.float64]) -> Drawn:
    """(rows, R) -> (R,), see `budget_area`."""

    def area(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        rows = [FrontierRow((), a, None, c, ()) for c, a in zip(x.round(NDIGITS).tolist(), y.tolist(), strict=True)]
        return budget_area(rows, float(ends[0]), float(ends[-1]))

    return np.array([area(x, y) for x, y in zip(costs.T, accuracies.T, strict=True)])


def _ratios(alone: float, target: float, costs: Drawn, accuracies: Drawn) -> Drawn:
    """Of the backbone's cost and the curve's at its accuracy; NaN where the curve never reaches it."""
    needed = [cost_of(target, list(zip(*points, strict=True))) for points in zip(costs.T, accuracies.T, strict=True)]
    return np.array([alone / cost if cost else np.nan for cost in needed])


def _ends(drawn: Drawn) -> list[float]:
    sound = drawn[1:][np.isfinite(drawn[1:])]
    return np.percentile(sound, (2.5, 97.5)).tolist() if len(sound) else [np.nan, np.nan]


def _interval(drawn: Drawn) -> str:
    return "({:.2f} to {:.2f})".format(*_ends(drawn))


if __name__ == "__main__":
    sys.exit(main())
