"""Leaving work out changes no answer, and no state that is handed on."""

from __future__ import annotations

import itertools

import pytest
import torch

from export.stage import StageGraph
from model.config import variant
from model.dvt import DVT


def lively(**changes: object) -> DVT:
    """As if trained: no part of the model is small."""
    torch.manual_seed(0)
    model = DVT(variant("micro", **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.ndim > 1 else parameter + 0.1)
    return model


@pytest.mark.parametrize(("features", "relations"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_stage_answers_the_same_with_less_work(features: bool, relations: bool):
    model = lively(feature_reuse=features, relation_reuse=relations)
    before = after = ()
    for number in (1, 2, 3):
        plain, saving = StageGraph(model, number, saving=False), StageGraph(model, number)
        image = plain.example(batch=3)[0]
        with torch.inference_mode():
            before, after = (
                graph(image, *state[3:]) if graph.takes_state else graph(image)
                for graph, state in ((plain, before), (saving, after))
            )
        assert len(after) == len(before)
        for got, want in zip(after, before, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # sums in other orders, of large weights


def test_the_last_stage_does_less():
    model = lively()
    counts = []
    for saving in (False, True):
        graph = StageGraph(model, 3, saving)
        rows = []
        block = graph.stage.blocks[-1]
        block.norm2.register_forward_hook(lambda _, inputs, __, rows=rows: rows.append(inputs[0].shape[1]))
        with torch.inference_mode():
            graph(*graph.example(batch=1))
        counts += rows
    assert counts == [17, 2]


def test_a_stage_that_hands_on_keeps_all_its_rows():
    model = lively()
    for number, saving in itertools.product((1, 2), (False, True)):
        graph = StageGraph(model, number, saving)
        with torch.inference_mode():
            outputs = graph(*graph.example(batch=2))
        shapes = [tuple(t.shape[1:]) for t in outputs[3:]]
        assert shapes == [shape[1:] for _, shape in list(graph.outputs().values())[3:]]
