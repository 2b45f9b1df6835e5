"""Padding of graphs in half precision: what it makes of shapes, and that nobody looks at it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from export.aligned import MULTIPLE
from export.stage import StageGraph
from export.verify import example_images
from model.config import variant
from model.dvt import DVT

DESIGNS: list[dict[str, Any]] = [
    {},
    {"feature_reuse": False},
    {"relation_reuse": False},
]


def graphs(**changes: Any) -> list[StageGraph]:
    torch.manual_seed(0)
    model = DVT(variant("micro", **changes)).eval()
    return [StageGraph(model, number, precision="fp16") for number in (1, 2, 3)]


def test_state_is_aligned_in_half_alone():
    first, second, third = graphs()
    for graph in (first, second):
        features, relations = list(graph.outputs().values())[3:]
        assert all(int(size) % MULTIPLE == 0 for size in (*features.shape[1:], *relations.shape[1:]))
    assert list(third.inputs()) == ["image", "features_2", "relations_2"]
    assert third.inputs()["relations_2"] == second.outputs()["relations_2"]
    plain = StageGraph(DVT(variant("micro")), 1).outputs()
    assert plain["relations_1"].shape[2:] == (5, 5)


@pytest.mark.parametrize("changes", DESIGNS, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
@torch.inference_mode()
def test_nobody_looks_at_padding(changes: dict[str, Any]):
    images = torch.from_numpy(example_images(48))
    answers = []
    for spoiled in (False, True):
        state: tuple[torch.Tensor, ...] = ()
        for graph in graphs(**changes):
            tokens = graph.config.grids[graph.number - 1] ** 2 + 1
            if spoiled:
                graph.stage.places[:, tokens:] = torch.linspace(-3, 5, graph.stage.places.shape[-1])
            given = graph(images, *state)
            answers.append(given[:3])
            state = given[3:]
            if spoiled and state:
                features, relations = (tensor.clone() for tensor in state)
                features[..., tokens:, :] = 100
                relations[:, :, tokens:] = relations[:, :, :, tokens:] = -100
                state = (features, relations)
    for plain, other in zip(answers[:3], answers[3:], strict=True):
        for one, two in zip(plain, other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
