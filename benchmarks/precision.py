"""What half precision does to a model's answers: confidences, exits and accuracy of fp16 and bf16 beside fp32.

    python -m benchmarks.precision photo10/train photo10/test --out

No GPU is needed: PyTorch runs the very modules that are exported, on the CPU, with tensors that really are in half. In
fp16 the exported graphs are run by ONNX Runtime, too, which computes in fp32 between its operators on CPUs: what a
calibration on a CPU sees of such a bundle. And once with its fp32 part in TF32, which GPU runtimes allow themselves
unless they are told not to: here by rounding what products and convolutions are given.

Every precision has a frontier of its own, solved on the held-out slice of the first folder and judged on the second.
Next to it, exits are compared at one and the same thresholds, fp32's. A model with seeded weights then shows what the
T2T tokeniser and twelve layers do to logits. Images of one colour, of one pixel and of noise must not overflow.

Legend: N images, E exits, S image side.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.harness import RESULTS, Report, command_line, finish
from export.half import Precision
from export.stage import StageGraph
from export.to_onnx import write_onnx
from export.verify import Tensors, run_cascade, run_modules
from export.write import seeded_model
from model.checkpoint import load_model
from model.config import DVTConfig
from model.dvt import DVT
from model.flops import cumulative_macs
from server.bench.photos import photo
from server.bundle.frontier import Records, exits_taken
from server.bundle.manifest import Preprocessing
from server.calibration.calibrate import Example, read_image_folder
from server.calibration.evaluate import SHARES, Evaluation, evaluate
from server.calibration.sweep import sweep
from server.engines.onnx import open_session
from server.frontend.images import ImageLimits, decode

CHECKPOINT = Path(__file__).resolve().parents[1] / "model" / "checkpoints" / "photo10.safetensors"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
BATCH = 32

Images = NDArray[np.uint8]  # (N, S, S, 3)


@dataclass(frozen=True)
class Said:
    """What every exit says of every image."""

    logits: NDArray[np.float32]  # (E, N, K)
    confidence: NDArray[np.float32]  # (E, N)

    def records(self, labels: NDArray[np.int64]) -> Records:
        return Records(self.confidence[:-1], self.logits.argmax(axis=2) == labels)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="image folder whose held-out slice solves the frontiers")
    parser.add_argument("test", type=Path, help="image folder that judges them")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="(default the embedded model's)")
    parser.add_argument("--held-out", type=float, default=0.08, help="share of the first folder (default %(default)s)")
    parser.add_argument("--seeded", default="t2t-vit-12", help="a row of model.config.VARIANTS (default %(default)s)")
    parser.add_argument("--photos", type=int, default=8, help="for the seeded model, by code (default %(default)s)")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for precision.json")
    options = parser.parse_args(arguments)
    options.command = command_line("precision", sys.argv[1:] if arguments is None else arguments)
    report = Report("precision")
    model, _ = load_model(options.checkpoint)
    labels = model.config.labels
    solving = read_image_folder(options.train, labels, fraction=options.held_out)
    _judge(report, model, solving, read_image_folder(options.test, labels))
    _compare_seeded(report, options.seeded, options.photos)
    return finish(report, options)


# --- a trained model --------------------------------------------------------------------------------------------------


def _judge(report: Report, model: DVT, solving: Sequence[Example], judging: Sequence[Example]) -> None:
    images = {"solving": read_pixels(model.config, solving), "judging": read_pixels(model.config, judging)}
    labels = {"solving": label_ids(solving), "judging": label_ids(judging)}
    report.add("images", f"{len(solving)} held out, {len(judging)} test", solving=len(solving), judging=len(judging))
    costs = [macs / 1e9 for macs in cumulative_macs(model)]
    plain: dict[str, Said] = {}
    for precision in PRECISIONS:
        print(f"{model.config.name} in {precision}", file=sys.stderr)
        graphs = stage_graphs(model, precision)
        said = {name: _in_modules(graphs, images[name]) for name in images}
        frontier = sweep(*arrays(said["solving"].records(labels["solving"])), costs)
        records = said["judging"].records(labels["judging"])
        add_evaluation(report, precision, evaluate(frontier, records))
        _check_extremes(report, model.config.name, graphs)
        if precision == "fp32":
            plain, thresholds = said, {share: frontier.by_gmacs(share * costs[-1]) for share in SHARES}
            continue
        _add_differences(report, precision, plain["judging"], said["judging"])
        for share, row in thresholds.items():
            if row is None:
                continue
            ours, theirs = (
                exits_taken(taken.records(labels["judging"]), row.thresholds)
                for taken in (said["judging"], plain["judging"])
            )
            changed = int(np.count_nonzero(ours != theirs))
            name = f"{precision}: exits changed at fp32's thresholds for {share:.0%}"
            report.add(name, f"{changed} of {len(judging)}", **{f"{precision}_exits_changed_{share:.0%}": changed})
        if precision == "fp16":
            with TF32():
                rounded = _in_modules(graphs, images["judging"])
            _add_differences(report, "fp16 with TF32", plain["judging"], rounded)
            here = _in_runtime(graphs, images["judging"])
            _add_differences(report, "fp16 in ONNX Runtime", plain["judging"], here)
            gap = float(np.abs(here.confidence - said["judging"].confidence).max())
            report.add(
                "fp16 in ONNX Runtime, beside true halves", f"confidences within {gap:.1e}", fp16_runtime_gap=gap
            )


def add_evaluation(report: Report, precision: str, judged: Evaluation) -> None:
    exits = ", ".join(f"{accuracy:.2%}" for accuracy in judged.exit_accuracy)
    points = {name: judged.points[name] for name in judged.points if name != "knee"}
    budgets = ", ".join(f"{name} {row.accuracy:.2%} at {row.gmacs * 1e3:.1f} MMAC" for name, row in points.items())
    report.add(f"{precision}: accuracy of the exits", exits, **{f"{precision}_exit_accuracy": judged.exit_accuracy})
    report.add(
        f"{precision}: its own frontier",
        f"area {judged.area:.4f}; {budgets}",
        **{
            f"{precision}_area": judged.area,
            f"{precision}_budgets": {name: [row.accuracy, row.gmacs] for name, row in points.items()},
        },
    )


def _add_differences(report: Report, name: str, plain: Said, half: Said) -> None:
    difference = np.abs(half.confidence - plain.confidence)  # (E, N)
    classes = np.count_nonzero(half.logits.argmax(axis=2) != plain.logits.argmax(axis=2), axis=1)
    largest, mean = difference.max(axis=1), difference.mean(axis=1)
    key = name.replace(" ", "_")
    report.add(
        f"{name}: confidences beside fp32's",
        f"largest {difference.max():.1e}, mean {difference.mean():.1e}; classes changed {classes.tolist()}",
        **{
            f"{key}_confidence_largest": largest.tolist(),
            f"{key}_confidence_mean": mean.tolist(),
            f"{key}_classes_changed": classes.tolist(),
        },
    )


# --- a deep model with seeded weights ---------------------------------------------------------------------------------


def _compare_seeded(report: Report, variant: str, count: int) -> None:
    model = seeded_model(variant)
    config = model.config
    files = [photo(number) for number in range(count)]
    images = np.stack([decode(file, None, _preprocessing(config), ImageLimits()) for file in files])
    plain: Said | None = None
    for precision in PRECISIONS:
        print(f"{model.config.name} in {precision}", file=sys.stderr)
        graphs = stage_graphs(model, precision)
        said = _in_modules(graphs, images)
        _check_extremes(report, variant, graphs)
        if plain is None:
            plain = said
            continue
        largest = np.abs(said.logits - plain.logits).max(axis=(1, 2))
        scale = np.abs(plain.logits).max(axis=(1, 2))
        report.add(
            f"{variant}, seeded, {precision}: logits beside fp32's",
            ", ".join(f"{d:.1e} of {s:.2f}" for d, s in zip(largest, scale, strict=True)),
            **{f"{variant}_{precision}_logits_largest": largest.tolist(), f"{variant}_logits_scale": scale.tolist()},
        )


def _check_extremes(report: Report, name: str, graphs: Sequence[StageGraph]) -> None:
    answers = run_modules(graphs, extremes(graphs[0].config.image_size))
    wrong = sum(int(np.count_nonzero(~np.isfinite(value))) for answer in answers for value in answer.values())
    precision = graphs[0].precision
    report.must_be_zero(
        f"{name}, {precision}: values that are no numbers, extreme images",
        wrong,
        **{f"{name}_{precision}_wrong": wrong},
    )


def extremes(size: int) -> Images:
    """Black, white, grey, a bright pixel, a dark one, noise, noise of black and white, stripes."""
    rng = np.random.default_rng(0)
    images = np.zeros((8, size, size, 3), np.uint8)
    images[1], images[2], images[4], images[7, ::2] = 255, 128, 255, 255
    images[3, size // 2, size // 2], images[4, size // 2, size // 2] = 255, 0
    images[5] = rng.integers(0, 256, images[5].shape)
    images[6] = rng.integers(0, 2, images[6].shape) * 255
    return images


class TF32(TorchFunctionMode):
    """Matrix products and convolutions of fp32 are given numbers with 10 bits behind the leading one."""

    FUNCTIONS = (F.linear, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in self.FUNCTIONS:
            args = (_rounded(args[0]), _rounded(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))


def _rounded(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# --- running ----------------------------------------------------------------------------------------------------------


def stage_graphs(model: DVT, precision: Precision) -> list[StageGraph]:
    return [StageGraph(model, number, precision=precision) for number in range(1, model.config.num_stages + 1)]


def _in_modules(graphs: Sequence[StageGraph], images: Images) -> Said:
    return joined([run_modules(graphs, batch) for batch in in_batches(images)])


def _in_runtime(graphs: Sequence[StageGraph], images: Images) -> Said:
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for graph in graphs:
            write_onnx(graph, Path(folder) / "stage.onnx")
            sessions.append(open_session((Path(folder) / "stage.onnx").read_bytes()))
    return joined([run_cascade(graphs, sessions, batch) for batch in in_batches(images)])


def in_batches(images: Images) -> list[Images]:
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def joined(parts: Sequence[Sequence[Tensors]]) -> Said:
    """Of batches, what each exit answered."""
    logits, confidence = (
        np.concatenate([np.stack([answer[name] for answer in part]) for part in parts], axis=1)
        for name in ("logits", "confidence")
    )
    return Said(logits, confidence)


def arrays(records: Records) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    return records.confidence, records.correct


def read_pixels(config: DVTConfig, examples: Sequence[Example]) -> Images:
    how, limits = _preprocessing(config), ImageLimits()
    return np.stack([decode(file.read_bytes(), None, how, limits) for file, _ in examples])


def _preprocessing(config: DVTConfig) -> Preprocessing:
    return Preprocessing(config.resize, (config.image_size, config.image_size))


def label_ids(examples: Sequence[Example]) -> NDArray[np.int64]:
    return np.array([label for _, label in examples])


if __name__ == "__main__":
    sys.exit(main())
