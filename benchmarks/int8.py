"""Whether 8-bit integers pay on CPUs: a trained model's stages, quantised, beside fp32 as `dvt export` writes it.

    taskset -c 0,1 python -m benchmarks.int8 photo10/train photo10/test --out

What is quantised, and how, is `export.int8`'s. Scales are found on photos of the first folder that training saw, and
that solve no frontier.

Three designs: `uint8`, activations with a zero point; `uint8_7bit`, the same with weights of 7 bits, whose sums of
products do not overflow on CPUs without VNNI instructions either; `int8`, activations without a zero point, as GPUs
have them.

Each has a frontier of its own, solved on the held-out slice of the first folder and judged on the second: once by MACs,
and once by the time that its stages take in batches of the size that pays. The answer is what equal accuracy costs:
times on both curves at the same accuracies, with an interval from drawing the judging images anew. Time is CPU time of
the process, one thread, all in turn: others on the machine do not count, but for the caches that they take.

`--openvino` (`pip install openvino`) puts another runtime beside, on the same fp32 graphs, in fp32 and in bf16.

Legend: N images, E exits, R rows of a frontier.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from onnxruntime.quantization import QuantType

from benchmarks.backbone import cost_of
from benchmarks.harness import RESULTS, Report, command_line, finish
from benchmarks.openvino_session import OpenVinoSession
from benchmarks.precision import (
    CHECKPOINT,
    Images,
    Said,
    add_evaluation,
    arrays,
    in_batches,
    joined,
    label_ids,
    read_pixels,
    stage_graphs,
)
from export.int8 import BATCH, DESIGN, SCALING, Design, quantise, scaling_images
from export.stage import IMAGE, StageGraph
from export.to_onnx import write_onnx
from export.verify import Tensors, run_cascade
from model.checkpoint import load_model
from model.flops import cumulative_macs
from server.bundle.frontier import Frontier, Records, exits_taken
from server.calibration.calibrate import read_image_folder
from server.calibration.evaluate import SHARES, evaluate
from server.calibration.sweep import sweep
from server.engines.onnx import largest_batch_that_pays, open_session, own_gmacs

PLAIN = "fp32"
TOGETHER = 33  # images of one batch whose rows are compared with those of smaller ones
DRAWS = 200
STEPS = 101  # accuracies at which two curves are compared

Session = InferenceSession | OpenVinoSession
Sessions = Sequence[Session]
Points = list[tuple[float, float]]  # ms, accuracy

DESIGNS = {
    "uint8": Design(QuantType.QUInt8, symmetric=False, weight_bits=8),
    "uint8_7bit": DESIGN,  # as `dvt export` writes it
    "int8": Design(QuantType.QInt8, symmetric=True, weight_bits=8),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="image folder: its held-out slice solves frontiers, the rest scales")
    parser.add_argument("test", type=Path, help="image folder that judges")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="(default the embedded model's)")
    parser.add_argument("--held-out", type=float, default=0.08, help="share of the first folder (default %(default)s)")
    parser.add_argument(
        "--designs",
        nargs="+",
        choices=DESIGNS,
        default=tuple(DESIGNS),
        help="(default all; of micro, ONNX Runtime 1.31 does not load the last stage in int8)",
    )
    parser.add_argument(
        "--scaling", type=int, default=SCALING, help="photos that find the scales (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=40, help="(default %(default)s)")
    parser.add_argument("--openvino", action="store_true", help="OpenVINO as well, in fp32 and bf16")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for int8.json")
    options = parser.parse_args(arguments)
    options.command = command_line("int8", sys.argv[1:] if arguments is None else arguments)
    report = Report("int8")
    with tempfile.TemporaryDirectory() as folder:
        _measure(report, Path(folder), options)
    return finish(report, options)


def _measure(report: Report, folder: Path, options: argparse.Namespace) -> None:
    model, _ = load_model(options.checkpoint)
    config = model.config
    solving = read_image_folder(options.train, config.labels, fraction=options.held_out)
    judging = read_image_folder(options.test, config.labels)
    scaling = scaling_images(options.train, config.labels, options.held_out, options.scaling)
    images = {"solving": read_pixels(config, solving), "judging": read_pixels(config, judging)}
    labels = {"solving": label_ids(solving), "judging": label_ids(judging)}
    numbers = {"solving": len(solving), "judging": len(judging), "scaling": len(scaling)}
    report.add("images", f"{len(scaling)} for scales, {len(solving)} held out, {len(judging)} test", **numbers)
    vnni = _vector_instructions()
    report.add("this CPU's instructions for products of bytes", ", ".join(vnni) or "none", vnni=vnni)

    graphs = stage_graphs(model, PLAIN)
    files = {PLAIN: [folder / f"stage{graph.number}.onnx" for graph in graphs]}
    for graph, file in zip(graphs, files[PLAIN], strict=True):
        write_onnx(graph, file)
    sessions: dict[str, Sessions] = {PLAIN: [open_session(file) for file in files[PLAIN]]}
    inputs = _inputs(graphs, sessions[PLAIN], read_pixels(config, scaling))
    for name in options.designs:
        print(f"{config.name} in {name}", file=sys.stderr)
        files[name] = [folder / f"{name}-{file.name}" for file in files[PLAIN]]
        for before, after, feeds in zip(files[PLAIN], files[name], inputs, strict=True):
            quantise(before, after, _rows_in_batches(feeds), DESIGNS[name])
        sessions[name] = [open_session(file) for file in files[name]]

    for name in files:
        sizes = [file.stat().st_size for file in files[name]]
        report.add(f"{name}: size of the stages", f"{sum(sizes) / 1e6:.2f} MB", **{f"{name}_bytes": sizes})
        wrong = _depending_rows(graphs, sessions[name], images["solving"][:TOGETHER])
        report.must_be_zero(f"{name}: rows that depend on their batch", wrong, **{f"{name}_depending_rows": wrong})

    if options.openvino:
        for hint in ("f32", "bf16"):
            name = f"openvino_{hint}"
            sessions[name] = [OpenVinoSession(file, hint) for file in files[PLAIN]]
            rows = _depending_rows(graphs, sessions[name], images["solving"][:TOGETHER])
            report.add(f"{name}: rows that depend on their batch", str(rows), **{f"{name}_depending_rows": rows})

    gmacs = [macs / 1e9 for macs in cumulative_macs(model)]
    batches = [largest_batch_that_pays(own) for own in own_gmacs(gmacs)]
    times = _measure_times(report, graphs, sessions, images["solving"], batches, options.rounds)

    said = {
        name: {
            which: joined([run_cascade(graphs, own, batch) for batch in in_batches(images[which])]) for which in images
        }
        for name, own in sessions.items()
    }
    records = {
        name: {which: answers.records(labels[which]) for which, answers in own.items()} for name, own in said.items()
    }
    for name, own in records.items():
        add_evaluation(report, name, evaluate(sweep(*arrays(own["solving"]), gmacs), own["judging"]))
        if name != PLAIN:
            _add_differences(report, name, records[PLAIN], own, said[PLAIN]["judging"], said[name]["judging"])
    _compare_by_time(report, records, times)


def _rows_in_batches(feeds: Tensors) -> Iterator[Tensors]:
    for start in range(0, len(feeds[IMAGE]), BATCH):
        yield {name: rows[start : start + BATCH] for name, rows in feeds.items()}


def _inputs(graphs: Sequence[StageGraph], sessions: Sessions, images: Images) -> list[Tensors]:
    """What every stage is given, all images going on to the last."""
    left: Tensors = {}
    inputs = []
    for graph, answers in zip(graphs, run_cascade(graphs, sessions, images), strict=True):
        inputs.append({name: images if name == IMAGE else left[name] for name in graph.inputs()})
        left = answers
    return inputs


def _vector_instructions() -> list[str]:
    flags = next(
        (line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), []
    )
    return [flag for flag in flags if flag in ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")]


# --- batches and time -------------------------------------------------------------------------------------------------


def _depending_rows(graphs: Sequence[StageGraph], sessions: Sessions, images: Images) -> int:
    """Rows of any output of any stage that are not the same bits in every batch."""
    together = run_cascade(graphs, sessions, images)
    wrong = 0
    for size in (1, 3, 16):
        for start in range(0, len(images), size):
            apart = run_cascade(graphs, sessions, images[start : start + size])
            for few, all_ in zip(apart, together, strict=True):
                for name, rows in few.items():
                    wrong += sum(
                        not np.array_equal(row, all_[name][start + at], equal_nan=True) for at, row in enumerate(rows)
                    )
    return wrong


def _measure_times(
    report: Report,
    graphs: Sequence[StageGraph],
    sessions: Mapping[str, Sessions],
    images: Images,
    batches: Sequence[int],
    rounds: int,
) -> dict[str, list[float]]:
    """Milliseconds an image that leaves at each exit has cost, in batches of the sizes that pay."""
    stages: dict[str, list[float]] = {name: [] for name in sessions}
    for graph, most in zip(graphs, batches, strict=True):
        at = graph.number - 1
        for batch in sorted({1, most}):
            feeds = _inputs(graphs, sessions[PLAIN], images[:batch])[at]
            taken = _in_turns({name: own[at] for name, own in sessions.items()}, feeds, rounds)  # each (rounds,)
            for name, seconds in taken.items():
                ms = 1e3 * float(np.median(seconds)) / batch
                ratios = taken[PLAIN] / seconds
                low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
                key = f"{name}_stage{graph.number}_batch{batch}"
                times = "" if name == PLAIN else f", {middle:.2f} times as fast as fp32 ({low:.2f} to {high:.2f})"
                report.add(
                    f"{name}: stage {graph.number} in batches of {batch}",
                    f"{ms:.3f} ms an image{times}",
                    **{f"{key}_ms": ms, f"{key}_ratio": [low, middle, high]},
                )
                if batch == most:
                    stages[name].append(ms)
    return {name: np.cumsum(each).tolist() for name, each in stages.items()}


def _in_turns(sessions: Mapping[str, Session], feeds: Tensors, rounds: int) -> dict[str, NDArray[np.float64]]:
    """CPU seconds of each in each round, in changing order."""
    names = list(sessions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.process_time()
            sessions[name].run(None, feeds)
            if number >= 0:  # one round warms up
                taken[name].append(time.process_time() - began)
    return {name: np.array(seconds) for name, seconds in taken.items()}


# --- accuracy ---------------------------------------------------------------------------------------------------------


def _add_differences(
    report: Report, name: str, plain: Mapping[str, Records], own: Mapping[str, Records], before: Said, after: Said
) -> None:
    """Of the exits, paired by image, on all images that training did not see: far more than judge the frontiers."""
    change = np.concatenate([own[which].correct.astype(int) - plain[which].correct for which in own], axis=1)  # (E, N)
    means, margins = change.mean(axis=1), 1.96 * change.std(axis=1) / np.sqrt(change.shape[1])
    difference = np.abs(after.confidence - before.confidence)
    exits = ", ".join(f"{100 * mean:+.2f} ± {100 * margin:.2f}" for mean, margin in zip(means, margins, strict=True))
    report.add(
        f"{name}: accuracy of the exits less fp32's, on {change.shape[1]} images",
        f"{exits} points",
        **{f"{name}_accuracy_change": means, f"{name}_accuracy_margin": margins},
    )
    report.add(
        f"{name}: confidences beside fp32's",
        f"largest {difference.max():.2f}, mean {difference.mean():.4f}",
        **{f"{name}_confidence_largest": difference.max(axis=1), f"{name}_confidence_mean": difference.mean(axis=1)},
    )


class Curve:
    """What the rows of a frontier come to on images: those that solved it, or others."""

    def __init__(self, frontier: Frontier, records: Records) -> None:
        taken = np.stack([exits_taken(records, row.thresholds) for row in frontier.rows])  # (R, N)
        self.cost = np.asarray(frontier.stage_gmacs)[taken]  # milliseconds, whatever a frontier calls them
        self.right = np.take_along_axis(records.correct, taken, axis=0)

    def points(self, weights: NDArray[np.float64] | None = None) -> Points:
        """`weights`: how often each image counts; by default once."""
        costs, accuracies = (np.average(rows, axis=1, weights=weights) for rows in (self.cost, self.right))
        return list(zip(costs.tolist(), accuracies.tolist(), strict=True))


def cost_ratio(plain: Points, other: Points) -> float:
    """How many times as much `plain` costs as `other`, on average over the accuracies that both reach."""
    reached = [[accuracy for _, accuracy in points] for points in (plain, other)]
    cheapest = max(accuracy for points in (plain, other) for _, accuracy in [min(points)])
    steps = np.linspace(cheapest, min(map(max, reached)), STEPS)
    costs = [[cost_of(float(step), points) or np.nan for step in steps] for points in (plain, other)]
    ratio: float = np.nanmean(costs[0]) / np.nanmean(costs[1])
    return ratio


def _compare_by_time(
    report: Report, records: Mapping[str, Mapping[str, Records]], times: Mapping[str, Sequence[float]]
) -> None:
    curves = {}
    for name, own in records.items():
        frontier = sweep(*arrays(own["solving"]), times[name])
        curves[name] = {which: Curve(frontier, own[which]) for which in own}
    budgets = [share * times[PLAIN][-1] for share in SHARES]
    for which in ("judging", "solving"):
        plain = curves[PLAIN][which].points()
        asked = [max(accuracy for cost, accuracy in plain if cost <= budget) for budget in (*budgets, np.inf)]
        for name, own in curves.items():
            points, key = own[which].points(), f"{name}_{which}"
            costs = [cost_of(accuracy, points) for accuracy in asked]
            shown = ", ".join(
                f"{accuracy:.2%} {'never' if cost is None else f'{cost:.3f} ms'}"
                for accuracy, cost in zip(asked, costs, strict=True)
            )
            what = "test" if which == "judging" else "held out"
            report.add(f"{name}: the cost of fp32's accuracies, {what}", shown, **{f"{key}_costs": costs})
            if name == PLAIN:
                report.figures[f"{which}_accuracies"] = asked
                continue
            ratio = cost_ratio(plain, points)
            low, high = _interval(curves[PLAIN][which], own[which])
            report.add(
                f"{name}: images in fp32's time at equal accuracy, {what}",
                f"{ratio:.2f} times as many (95 % {low:.2f} to {high:.2f})",
                **{f"{key}_cost_ratio": ratio, f"{key}_cost_ratio_interval": [low, high]},
            )


def _interval(plain: Curve, other: Curve) -> tuple[float, float]:
    """95 % of the ratios where the images are drawn anew, with replacement, the same ones for both."""
    rng = np.random.default_rng(0)
    count = plain.right.shape[1]
    ratios = []
    for _ in range(DRAWS):
        weights = rng.multinomial(count, np.full(count, 1 / count)).astype(float)
        ratios.append(cost_ratio(plain.points(weights), other.points(weights)))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
