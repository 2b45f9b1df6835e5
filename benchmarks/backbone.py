"""A DVT against its own backbone: the MACs that each needs for the same accuracy (the form of the paper's Table 3).

    python -m benchmarks.backbone cifar10/train cifar10/test runs/backbone --out

The backbone is the cascade's last stage trained alone, on the finest grid, without reuse. Both are trained with the
same recipe, images and seeds, for as many epochs. The DVT's thresholds are solved on the held-out slice of TRAIN; both
are judged on TEST. A run that was finished in the folder is not repeated, one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import Options, Report, finish, parse
from benchmarks.small_models import epochs_of, log, records, trained
from model.flops import cumulative_macs
from model.recipes import RECIPES
from server.bundle.frontier import evaluate_thresholds
from server.calibration.sweep import sweep


def main(arguments: list[str] | None = None) -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("train", type=Path)
        parser.add_argument("test", type=Path)
        parser.add_argument("runs", type=Path, help="folder of the training runs")
        parser.add_argument("--recipe", default="cifar10", choices=RECIPES, help="(default %(default)s)")
        parser.add_argument("--epochs", type=int, help="in place of the recipe's")
        parser.add_argument("--seeds", type=int, default=1, help="(default %(default)s)")

    options = parse("backbone", __doc__, arguments, more)
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    recipe = RECIPES[options.recipe]
    recipe = replace(recipe, epochs=options.epochs or recipe.epochs)
    name = "backbone_photo10" if options.recipe == "photo10" else "backbone"  # the embedded model has a file of its own
    report = Report(name, figures={"recipe": options.recipe, "seeds": options.seeds})
    for seed in range(options.seeds):
        dvt = trained(options.train, options.runs / f"dvt-seed{seed}", replace(recipe, seed=seed))
        alone_changes = {**recipe.changes, "grids": dvt.config.grids[-1:]}
        alone_recipe = replace(recipe, seed=seed, changes=alone_changes)
        alone = trained(options.train, options.runs / f"alone-seed{seed}", alone_recipe)
        epochs = [epochs_of(options.runs / f"{name}-seed{seed}") for name in ("dvt", "alone")]
        report.add(
            f"seed {seed}: epochs of the last run", "{} and {}".format(*epochs), **{f"seed{seed}_epochs": epochs}
        )

        [alone_macs] = cumulative_macs(alone)
        alone_logged = log(alone, recipe, options.train, options.test)
        target = {
            name: float((logits[0].argmax(-1) == labels).mean()) for name, (logits, labels) in alone_logged.items()
        }
        dvt_logged = log(dvt, recipe, options.train, options.test)
        solving, judging = (records(dvt_logged[name]) for name in ("held-out", "test"))
        macs = cumulative_macs(dvt)
        costs = [m / 1e9 for m in macs]
        frontier = sweep(solving.confidence, solving.correct, costs)
        points = [evaluate_thresholds(judging, row.thresholds, costs) for row in frontier.rows]
        exits = judging.correct.mean(axis=1)

        report.add(
            f"seed {seed}: backbone alone", f"{target['test']:.2%} at {alone_macs / 1e6:.2f} MMAC",
            **{f"seed{seed}_alone_accuracy": target["test"], f"seed{seed}_alone_mmacs": alone_macs / 1e6},
        )  # fmt: skip
        report.add(
            f"seed {seed}: DVT, its exits",
            ", ".join(f"{a:.2%} at {m / 1e6:.2f}" for a, m in zip(exits, macs, strict=True)) + " MMAC",
            **{f"seed{seed}_exit_accuracy": exits.tolist(), f"seed{seed}_exit_mmacs": [m / 1e6 for m in macs]},
        )
        report.add(
            f"seed {seed}: DVT, best of the curve", f"{max(p.accuracy for p in points):.2%}",
            **{f"seed{seed}_curve": [(round(p.gmacs * 1e3, 3), round(p.accuracy, 4)) for p in points]},
        )  # fmt: skip
        # Read off the curve, as the paper does; and by the row that held-out images say reaches the backbone.
        needed = cost_of(target["test"], [(p.gmacs, p.accuracy) for p in points])
        _add(report, seed, "read off the curve", needed, target["test"], alone_macs)
        row = frontier.by_accuracy(target["held-out"])
        if row is not None:
            point = evaluate_thresholds(judging, row.thresholds, costs)
            _add(report, seed, "row chosen on held-out images", point.gmacs, point.accuracy, alone_macs)
    return report


def _add(report: Report, seed: int, how: str, gmacs: float | None, accuracy: float, alone_macs: int) -> None:
    key = f"seed{seed}_{how.split()[0]}"
    if gmacs is None:
        report.add(f"seed {seed}: {how}", "the DVT never reaches the backbone", **{f"{key}_ratio": None})
        return
    ratio = alone_macs / 1e9 / gmacs
    report.add(
        f"seed {seed}: {how}",
        f"{accuracy:.2%} at {gmacs * 1e3:.2f} MMAC: {ratio:.2f} times fewer",
        **{f"{key}_mmacs": gmacs * 1e3, f"{key}_accuracy": accuracy, f"{key}_ratio": ratio},
    )


def cost_of(accuracy: float, points: list[tuple[float, float]]) -> float | None:
    """The least mean cost at which the curve through `points` (cost, accuracy) reaches an accuracy; None: never."""
    ordered = sorted(points)
    costs, best = np.array([c for c, _ in ordered]), np.maximum.accumulate([a for _, a in ordered])
    if best[-1] < accuracy:
        return None
    at = int(np.searchsorted(best, accuracy))
    if at == 0:
        return float(costs[0])
    share = (accuracy - best[at - 1]) / (best[at] - best[at - 1])
    return float(costs[at - 1] + share * (costs[at] - costs[at - 1]))


if __name__ == "__main__":
    sys.exit(main())
