"""What the exact savings of an exported stage are worth: time with each of them over time without any.

    taskset -c 0 python -m benchmarks.savings --variant t2t-vit-12 --out

Stages 2 and 3 of a variant with seeded weights are exported several times over and run in turn, in changing order, on
the same inputs, with one thread. `all-layers-at-once` is a step back: the relations of all layers are upsampled before
the first layer needs its own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.harness import Options, Report, finish, parse
from export.savings import ALL, Saving
from export.stage import StageGraph
from export.to_onnx import write_onnx
from export.write import seeded_model
from model.dvt import DVT
from model.reuse import RelationReuse
from server.engines.onnx import open_session

NONE: frozenset[Saving] = frozenset()
CASES: dict[str, frozenset[Saving]] = {
    "class-row": frozenset({"class-row"}),
    "fused-features": frozenset({"fused-features"}),
    "both": ALL,
    "all-layers-at-once": NONE,
}


class AllAtOnce(RelationReuse):
    """Upsamples for all layers first: several megabytes an image."""

    def forward(self, relations: Tensor) -> Tensor:
        upsampled: Tensor = self.upsample @ (super().forward(relations) @ self.upsample.T)
        return upsampled

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        return mixed[:, layer * self.num_heads : (layer + 1) * self.num_heads]


def main(arguments: list[str] | None = None) -> int:
    def more(parser):  # type: ignore[no-untyped-def]
        parser.add_argument("--variant", default="t2t-vit-12", help="a row of model.config.VARIANTS")
        parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="(default all)")
        parser.add_argument("--rounds", type=int, default=15, help="(default %(default)s)")

    options = parse("savings", __doc__, arguments, more)
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    report = Report("savings", figures={"variant": options.variant, "rounds": options.rounds})
    model = seeded_model(options.variant)
    with tempfile.TemporaryDirectory() as folder:
        for stage in range(2, model.config.num_stages + 1):
            sessions = {name: _session(model, stage, name, Path(folder)) for name in ("none", *options.cases)}
            for batch in (1, 4):
                _compare(report, StageGraph(model, stage, NONE), sessions, batch, options.rounds)
    return report


def _session(model: DVT, stage: int, case: str, folder: Path):  # type: ignore[no-untyped-def]
    graph = StageGraph(model, stage, CASES.get(case, NONE))
    if case == "all-layers-at-once" and graph.stage.relation_reuse is not None:
        graph.stage.relation_reuse.__class__ = AllAtOnce
    path = folder / f"{stage}-{case}.onnx"
    write_onnx(graph, path)
    return open_session(path)


def _compare(report: Report, graph: StageGraph, sessions, batch: int, rounds: int) -> None:  # type: ignore[no-untyped-def]
    feeds = {name: tensor.numpy() for name, tensor in zip(graph.inputs(), graph.example(batch), strict=True)}
    names = list(sessions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    logits = {name: session.run(["logits"], feeds)[0] for name, session in sessions.items()}
    difference = max(float(np.abs(logits[name] - logits["none"]).max()) for name in names)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            sessions[name].run(None, feeds)
            seconds[name].append(time.perf_counter() - began)
    base = np.array(seconds["none"])
    for name in names[1:]:
        ratio = float(np.median(np.array(seconds[name]) / base))
        key = f"stage{graph.number}_batch{batch}_{name.replace('-', '_')}"
        report.add(
            f"stage {graph.number}, batch {batch}: {name}",
            f"{ratio:.3f} of the time ({np.median(base) * 1000:.1f} ms without)",
            **{f"{key}_ratio": ratio},
        )
    report.add(
        f"stage {graph.number}, batch {batch}: logits",
        f"within {difference:.1e}",
        **{f"stage{graph.number}_batch{batch}_logits": difference},
    )


if __name__ == "__main__":
    sys.exit(main())
