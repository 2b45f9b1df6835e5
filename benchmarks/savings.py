"""What the exact savings of an exported stage are worth: time with each of them over time without any.

    taskset -c 0 python -m benchmarks.savings --variant t2t-vit-12 --out

Stages 2 and 3 of a variant with seeded weights are exported several times over and run in turn, in changing order, on
the same inputs, with one thread. `class-row` is what exports do (`export/savings.py`). The others were tried:

- `fused-features`: the reused features of all layers come from one product, the affine maps in front folded into it.
- `folded-relations`: no bias is added to the logits, but queries and keys are widened, softmax(q k' + P y P') =
  softmax([q, P y] [k, P]'), so that an attention kernel can run that takes no bias (here, three plain operators).
- `all-layers-at-once`: the relations of all layers are upsampled before the first layer needs its own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Options, Report, finish, parse
from export.savings import keep_class_row
from export.stage import StageGraph, onnx_attention
from export.to_onnx import write_onnx
from export.write import seeded_model
from model.dvt import DVT
from model.layers import attend
from model.reuse import FeatureReuse, LayerFeatures, RelationReuse
from server.engines.onnx import open_session

CASES = ("class-row", "fused-features", "folded-relations", "all-layers-at-once")


class AllAtOnce(RelationReuse):
    """Upsamples for all layers first: several megabytes an image."""

    def forward(self, relations: Tensor) -> Tensor:
        upsampled: Tensor = self.upsample @ (super().forward(relations) @ self.upsample.T)
        return upsampled

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        return mixed[:, layer * self.num_heads : (layer + 1) * self.num_heads]


class FusedFeatures(nn.Module):
    """`FeatureReuse` with one product for the first linear layers of all its layers."""

    upsample: Tensor

    def __init__(self, reuse: FeatureReuse) -> None:
        super().__init__()
        parts = [layer for layer in reuse if isinstance(layer, LayerFeatures)]
        first = parts[0]
        self.eps = first.norm.eps
        self.hidden = first.mlp.fc1.out_features
        self.fc1 = nn.Linear(first.mlp.fc1.in_features, self.hidden * len(parts))
        with torch.no_grad():
            self.fc1.weight.copy_(torch.cat([p.mlp.fc1.weight * p.norm.weight for p in parts]))
            self.fc1.bias.copy_(torch.cat([p.mlp.fc1.weight @ p.norm.bias + p.mlp.fc1.bias for p in parts]))
        self.act = first.mlp.act
        self.fc2 = nn.ModuleList(p.mlp.fc2 for p in parts)
        self.register_buffer("upsample", first.upsample, persistent=False)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(B, n, D) -> (B, N+1, C) for each layer."""
        z = F.layer_norm(features, features.shape[-1:], eps=self.eps)
        hidden = self.act(self.fc1(z)).split(self.hidden, dim=-1)
        return [self.upsample @ fc2(part) for fc2, part in zip(self.fc2, hidden, strict=True)]


class Folded(RelationReuse):
    """Hands the attention P y, (B, h, N+1, n+1), in place of the bias P y P'."""

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        return self.upsample @ mixed[:, layer * self.num_heads : (layer + 1) * self.num_heads]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, left: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        assert left is not None
        right = self.upsample.expand(*k.shape[:2], -1, -1)
        return attend(torch.cat((q * scale, left), dim=-1), torch.cat((k, right), dim=-1), v, None, 1.0)


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
                _compare(report, StageGraph(model, stage, saving=False), sessions, batch, options.rounds)
    return report


def _session(model: DVT, stage: int, case: str, folder: Path):  # type: ignore[no-untyped-def]
    graph = StageGraph(model, stage, saving=False)
    if case == "class-row" and not graph.stage.hands_on:
        keep_class_row(graph.stage, onnx_attention)
    relations, features = graph.stage.relation_reuse, graph.stage.feature_reuse
    if case == "all-layers-at-once":
        relations.__class__ = AllAtOnce
    if case == "folded-relations":
        relations.__class__ = Folded
        for block in graph.stage.blocks:
            block.attn.attend = relations.attend
    if case == "fused-features":
        graph.stage.feature_reuse = FusedFeatures(features)
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
