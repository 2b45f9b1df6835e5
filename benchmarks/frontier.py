"""The accuracy/cost curve of a bundle on labelled images that neither training nor calibration saw.

    python -m benchmarks.frontier BUNDLE IMAGES --plot docs/frontier.png --out

Every operating point of the bundle's frontier is judged on IMAGES, through the exported engine; so is the geometric
family of thresholds, fitted to the same calibration records.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, Report, finish
from server.bundle.frontier import FrontierRow, Records, evaluate_thresholds
from server.bundle.manifest import Bundle
from server.calibration.calibrate import read_image_folder, record
from server.calibration.evaluate import Evaluation, evaluate
from server.calibration.families import geometric
from server.engines import load_engine
from server.settings import usable_cores


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, help="image folder, root/<label>/<file>")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for frontier.json")
    options = parser.parse_args(arguments)
    bundle = Bundle.load(options.bundle)
    if bundle.frontier.records is None:
        raise SystemExit(
            f"{options.bundle}: its frontier was imported and has no records of images; calibrate it first"
        )
    engine = load_engine(bundle)
    examples = read_image_folder(options.images, bundle.manifest.labels)
    records = record(bundle, engine, examples, threads=usable_cores(), progress=True)
    engine.close()
    judged = evaluate(bundle.frontier, records)
    report = Report("frontier", figures={"model": bundle.manifest.name, "version": bundle.manifest.version})
    for number, (accuracy, gmacs) in enumerate(zip(judged.exit_accuracy, judged.stage_gmacs, strict=True), start=1):
        report.add(f"all leave at exit {number}", f"{accuracy:.2%} at {gmacs * 1e3:.2f} MMAC")
    for title, points in (("frontier", judged.points), ("geometric", judged.geometric_points)):
        for name, row in points.items():
            leave = " ".join(f"{fraction:.2f}" for fraction in row.exit_fractions)
            report.add(f"{title}, {name}", f"{row.accuracy:.2%} at {row.gmacs * 1e3:.2f} MMAC, exits {leave}")
    report.add("area under the budget curve", f"frontier {judged.area:.4f}, geometric {judged.geometric_area:.4f}")
    report.figures |= dataclasses.asdict(judged)
    if options.plot:
        plot(bundle, records, judged, options.plot)
    options.command = "python -m benchmarks.frontier BUNDLE IMAGES"
    return finish(report, options)


def plot(bundle: Bundle, records: Records, evaluation: Evaluation, path: Path) -> None:
    """Accuracy against mean cost: the frontier's points, the geometric family's, and the exits alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    costs = evaluation.stage_gmacs
    frontier = bundle.frontier

    def turn_out(rows: tuple[FrontierRow, ...]) -> tuple[list[float], list[float]]:
        found = sorted((evaluate_thresholds(records, r.thresholds, costs) for r in rows), key=lambda r: r.gmacs)
        return [row.gmacs * 1e3 for row in found], [row.accuracy * 100 for row in found]

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    family = geometric(frontier.records.confidence, frontier.records.correct, costs)
    axes.plot(*turn_out(family), "--", color="tab:gray", label="geometric thresholds")
    axes.plot(*turn_out(frontier.rows), color="tab:blue", label="calibrated frontier: PUT /budget moves along it")
    axes.plot(
        [c * 1e3 for c in costs],
        [a * 100 for a in evaluation.exit_accuracy],
        "o:",
        color="tab:orange",
        label="one exit for all",
    )
    for number, (cost, accuracy) in enumerate(zip(costs, evaluation.exit_accuracy, strict=True), start=1):
        axes.annotate(f"exit {number}", (cost * 1e3, accuracy * 100), (6, -12), textcoords="offset points", fontsize=9)
    axes.set_xlabel("mean cost per image, million multiply-accumulates")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"{bundle.manifest.name}, {evaluation.images} test images")
    axes.margins(x=0.08, y=0.1)  # room for the exits' names
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
