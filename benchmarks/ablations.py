"""The paper's ablations (Tables 5 and 6; 7 and 8 in the NeurIPS version) in small: what each reuse and each of its
designs is worth.

    python -m benchmarks.ablations TRAIN TEST runs/ablations --tables feature-designs relation-designs --seeds 3 --out

Designs are compared as the paper does: two exits, on the recipe's two coarsest grids, one reuse at a time, beside a
cascade without any. The table `reuse` is of the whole cascade, whose thresholds are solved on the held-out slice of
TRAIN. TEST judges everything.

Every model is trained with the same recipe, on the same images, for as many epochs, once for each seed: all rows with
the first seed, then all with the next. A run that was finished in the folder is not repeated, one that was interrupted
goes on; after `--minutes` none is begun, and seeds that not all rows have are left out. Writes ablations.md and
ablations.json; tables that were not asked for stay in them as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import RESULTS
from benchmarks.small_models import Logged, log, records, run, trained
from model.config import variant
from model.data import scan_image_folder
from model.dvt import DVT
from model.flops import cumulative_macs
from model.recipes import RECIPES, Recipe
from server.bundle.frontier import evaluate_thresholds
from server.calibration.sweep import sweep

SHARES = (0.25, 0.5, 0.75)  # of the last exit's cost
SHUFFLES = 10_000

# Table -> row -> changes to the variant. The paper's order; the last row is the design that it kept.
_WITHOUT = {"feature_reuse": False, "relation_reuse": False}
_FEATURES = ("layer-wise", "class-token", "first-layer", "no-norm", "final")
_RELATIONS = ("layer-wise", "final-layer", "linear", "naive-upsampling", "all-layers")
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "reuse": {
        "none": _WITHOUT,
        "features": {"relation_reuse": False},
        "relations": {"feature_reuse": False},
        "both": {},
    },
    "feature-designs": {
        "without": _WITHOUT,
        **{design: {"relation_reuse": False, "feature_design": design} for design in _FEATURES},
    },
    "relation-designs": {
        "without": _WITHOUT,
        **{design: {"feature_reuse": False, "relation_design": design} for design in _RELATIONS},
    },
}
TWO_EXITS = ("feature-designs", "relation-designs")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("runs", type=Path, help="folder of the training runs")
    parser.add_argument("--recipe", default="ablation")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after these no training run is begun")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for ablations.md and .json")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.recipe]
    if options.epochs:
        recipe = replace(recipe, epochs=options.epochs, warmup_epochs=min(recipe.warmup_epochs, options.epochs - 1))
    deadline = time.monotonic() + options.minutes * 60
    results: dict[str, Any] = {"tables": {}}
    if options.out and (before := options.out / "ablations.json").exists():
        results = json.loads(before.read_text())
    for table, seeds in _train_all(options, recipe, deadline).items():
        if seeds:
            rows = {row: _judge(options, recipe, table, changes, seeds) for row, changes in TABLES[table].items()}
            results["tables"][table] = {
                "recipe": options.recipe, "epochs": recipe.epochs, "seeds": seeds, "rows": rows, "noise": _noise(rows)
            }  # fmt: skip
    text = _markdown(results)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ablations.md").write_text(text)
        (options.out / "ablations.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _train_all(options: argparse.Namespace, recipe: Recipe, deadline: float) -> dict[str, int]:
    """How many seeds all rows of a table have."""
    complete = dict.fromkeys(options.tables, 0)
    for seed in range(options.seeds):
        for table in options.tables:
            for changes in TABLES[table].values():
                if time.monotonic() > deadline and not _finished(options, table, changes, seed):
                    return complete
                _trained(options, recipe, table, changes, seed)
            complete[table] = seed + 1
    return complete


def _folder(options: argparse.Namespace, table: str, changes: dict[str, Any], seed: int) -> Path:
    """Equal configurations of different tables are one run: its folder is named after what differs."""
    said = [f"{k}={v}" for k, v in changes.items() if v not in ("final", "all-layers")]
    name = "+".join(["two-exits"] * (table in TWO_EXITS) + said) or "both"
    return Path(options.runs / f"{name}-seed{seed}")


def _finished(options: argparse.Namespace, table: str, changes: dict[str, Any], seed: int) -> bool:
    return (_folder(options, table, changes, seed) / "model.safetensors").exists()


def _trained(options: argparse.Namespace, recipe: Recipe, table: str, changes: dict[str, Any], seed: int) -> DVT:
    all_changes = {**recipe.changes, **changes}
    if table in TWO_EXITS:
        all_changes["grids"] = variant(recipe.variant, **recipe.changes).grids[:2]
    return trained(
        options.train, _folder(options, table, changes, seed), replace(recipe, changes=all_changes, seed=seed)
    )


def _judge(
    options: argparse.Namespace, recipe: Recipe, table: str, changes: dict[str, Any], seeds: int
) -> dict[str, Any]:
    """Accuracies in percent: mean over the seeds, and the largest distance from it; of the exits also each seed's."""
    models = [_trained(options, recipe, table, changes, seed) for seed in range(seeds)]
    macs = cumulative_macs(models[0])
    costs = [m / 1e9 for m in macs]
    exits, budgets = [], []
    for model in models:
        if table in TWO_EXITS:
            tested = run(model, scan_image_folder(options.test)[1])
        else:
            logged = log(model, recipe, options.train, options.test)
            tested = logged["test"]
            budgets.append(_budgets(logged, costs))
        exits.append(records(tested).correct.mean(axis=1) * 100)
    row = {
        "mmacs": [round(m / 1e6, 2) for m in macs],
        "exits": [_spread(column) for column in np.array(exits).T],
        "exits_by_seed": np.array(exits).round(3).tolist(),
    }
    return row | ({"budgets": [_spread(column) for column in np.array(budgets).T]} if budgets else {})


def _budgets(logged: Logged, costs: list[float]) -> list[float]:
    """Accuracies at SHARES of the last exit's cost, by thresholds from the held-out images."""
    solving, judging = (records(logged[name]) for name in ("held-out", "test"))
    frontier = sweep(solving.confidence, solving.correct, costs)
    rows = [frontier.by_gmacs(share * costs[-1]) or frontier.rows[0] for share in SHARES]
    return [evaluate_thresholds(judging, row.thresholds, costs).accuracy * 100 for row in rows]


def _spread(values: NDArray[np.float64]) -> tuple[float, float]:
    return round(float(values.mean()), 2), round(float(np.abs(values - values.mean()).max()), 2)


def _noise(rows: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """How far apart the best and the worst row are at the last exit, and how often chance alone spreads rows so far:
    names of rows dealt out anew among the models of each seed. None with a single seed, which cannot tell."""
    last = np.array([[exits[-1] for exits in row["exits_by_seed"]] for row in rows.values()])  # (rows, seeds)
    if last.shape[1] < 2:
        return None
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.broadcast_to(last, (SHUFFLES, *last.shape)), axis=1)
    by_chance = shuffled.mean(axis=2).var(axis=1) >= last.mean(axis=1).var() - 1e-9
    means = last.mean(axis=1)
    return {"range": round(float(means.max() - means.min()), 2), "chance": round(float(by_chance.mean()), 3)}


_TITLES = {
    "reuse": "Which reuse",
    "feature-designs": "Designs of feature reuse (the paper's Table 5)",
    "relation-designs": "Designs of relation reuse (the paper's Table 6)",
}


def _markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Ablations, in small",
        "",
        "Top-1 in percent: mean over the seeds, and the largest distance from it. At this scale (24 thousand small",
        "photos, models of a few hundred thousand parameters, short training) differences below a point or two mean",
        "nothing, and the order need not be that of the paper, which trained on ImageNet.",
    ]
    for table, found in sorted(results["tables"].items(), key=lambda item: list(TABLES).index(item[0])):
        rows = found["rows"]
        first = next(iter(rows.values()))
        heads = [f"exit {number}" for number in range(1, len(first["exits"]) + 1)]
        heads += [f"at {share:.0%} of the cost" for share in SHARES] if "budgets" in first else []
        lines += ["", f"## {_TITLES[table]}", ""]
        lines += [f"Recipe `{found['recipe']}`, epochs: {found['epochs']}, seeds: {found['seeds']}.", ""]
        lines += ["| | " + " | ".join([*heads, "MMACs"]) + " |", "|---" * (len(heads) + 2) + "|"]
        for name, row in rows.items():
            cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in (*row["exits"], *row.get("budgets", ()))]
            lines.append(
                f"| {name} | " + " | ".join(cells) + " | " + " / ".join(f"{m:.1f}" for m in row["mmacs"]) + " |"
            )
        if noise := found.get("noise"):
            lines += [
                "",
                f"At the last exit the means lie within {noise['range']:.1f} points. Dealt out anew among the models",
                f"of each seed, the names of the rows spread as far in {noise['chance']:.0%} of all cases: "
                + ("no difference is told." if noise["chance"] > 0.05 else "more than chance."),
            ]
        elif found["seeds"] == 1:
            lines += ["", "A single seed cannot tell its differences from chance."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
