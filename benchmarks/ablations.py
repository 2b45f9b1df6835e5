"""The paper's ablations (Tables 5 to 7) in small: what each reuse and each of its designs is worth.

    python -m benchmarks.ablations TRAIN TEST runs/ablations --tables reuse --out

Every model is trained with the same recipe, on the same images, for as many epochs, once for each seed. A run that was
finished in the folder is not repeated, one that was interrupted goes on. Thresholds are solved on the held-out slice of
TRAIN and judged on TEST. Writes ablations.md and ablations.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import RESULTS
from benchmarks.small_models import Logged, log, records, trained
from model.dvt import DVT
from model.flops import cumulative_macs
from model.recipes import RECIPES, Recipe
from server.bundle.frontier import evaluate_thresholds
from server.calibration.sweep import sweep

SHARES = (0.25, 0.5, 0.75)  # of the last exit's cost

# Table -> row -> changes to the variant.
_FEATURES = ("final", "layer-wise", "class-token", "first-layer", "no-norm")
_RELATIONS = ("all-layers", "layer-wise", "final-layer", "linear", "naive-upsampling")
_CRITERIA = ("confidence", "entropy", "random")
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "reuse": {
        "none": {"feature_reuse": False, "relation_reuse": False},
        "features": {"relation_reuse": False},
        "relations": {"feature_reuse": False},
        "both": {},
    },
    "feature-designs": {design: {"feature_design": design} for design in _FEATURES},
    "relation-designs": {design: {"relation_design": design} for design in _RELATIONS},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("runs", type=Path, help="folder of the training runs")
    parser.add_argument("--recipe", default="ablation")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for ablations.md and .json")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.recipe]
    if options.epochs:
        recipe = replace(recipe, epochs=options.epochs)
    results: dict[str, Any] = {"recipe": options.recipe, "epochs": recipe.epochs, "seeds": options.seeds, "tables": {}}
    for table in options.tables:
        results["tables"][table] = rows = {}
        for row, changes in TABLES[table].items():
            models = [_trained(options, recipe, changes, seed) for seed in range(options.seeds)]
            logged = [log(model, recipe, options.train, options.test) for model in models]
            macs = cumulative_macs(models[0])
            rows[row] = _judge(logged, macs)
            if table == "reuse" and row == "both":
                results["tables"]["criteria"] = {name: _judge(logged, macs, name) for name in _CRITERIA}
    text = _markdown(results)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ablations.md").write_text(text)
        (options.out / "ablations.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _trained(options: argparse.Namespace, recipe: Recipe, changes: dict[str, Any], seed: int) -> DVT:
    """Equal configurations of different tables are one run: its folder is named after what differs."""
    said = "+".join(f"{k}={v}" for k, v in changes.items() if v not in ("final", "all-layers")) or "both"
    recipe = replace(recipe, changes={**recipe.changes, **changes}, seed=seed)
    return trained(options.train, options.runs / f"{said}-seed{seed}", recipe)


def _judge(seeds: list[Logged], macs: list[int], criterion: str = "confidence") -> dict[str, Any]:
    """Mean over the seeds, and the largest distance from it, of accuracies in percent."""
    costs = [m / 1e9 for m in macs]
    exits, budgets = [], []
    for logged in seeds:
        solving, judging = (records(logged[name], criterion) for name in ("held-out", "test"))
        exits.append(judging.correct.mean(axis=1) * 100)
        frontier = sweep(solving.confidence, solving.correct, costs)
        reached = []
        for share in SHARES:
            row = frontier.by_gmacs(share * costs[-1]) or frontier.rows[0]
            reached.append(evaluate_thresholds(judging, row.thresholds, costs).accuracy * 100)
        budgets.append(reached)
    return {
        "mmacs": [round(m / 1e6, 2) for m in macs],
        "exits": [_spread(column) for column in np.array(exits).T],
        "budgets": [_spread(column) for column in np.array(budgets).T],
    }


def _spread(values: NDArray[np.float64]) -> tuple[float, float]:
    return round(float(values.mean()), 2), round(float(np.abs(values - values.mean()).max()), 2)


def _markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Ablations, in small",
        "",
        f"Recipe `{results['recipe']}`, {results['epochs']} epochs, {results['seeds']} seeds. Top-1 in percent: mean",
        "over the seeds, and the largest distance from it. At this scale (24 thousand images of 64 x 64 pixels, models",
        "of a few hundred thousand parameters, short training) differences below a point or two mean nothing, and the",
        "order need not be that of the paper, which trained on ImageNet.",
    ]
    heads = ["exit 1", "exit 2", "exit 3", *(f"at {share:.0%} of the cost" for share in SHARES), "MMACs"]
    for table, rows in results["tables"].items():
        lines += ["", f"## {table}", "", "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for name, row in rows.items():
            cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in (*row["exits"], *row["budgets"])]
            lines.append(
                f"| {name} | " + " | ".join(cells) + " | " + " / ".join(f"{m:.1f}" for m in row["mmacs"]) + " |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
