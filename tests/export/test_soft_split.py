"""The exported soft split computes what the model's does, without a gather."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from export.soft_split import ChannelsLastTokens, soft_split
from export.stage import StageGraph
from model.backbones.t2t_vit import TokensToToken, soft_split_geometry
from model.config import variant
from model.dvt import DVT
from server.bundle.manifest import Bundle


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int, int]:
    stride = draw(st.integers(1, 8))
    kernel = draw(st.integers(stride, 2 * stride))
    padding = draw(st.integers(0, stride - 1))
    size = draw(st.integers(max(1, kernel - 2 * padding), 40))
    return size, kernel, stride, padding


@given(splits(), st.integers(1, 4), st.integers(1, 2))
@settings(max_examples=200, deadline=None)
def test_a_split_is_unfold_with_its_columns_in_another_order(
    split: tuple[int, int, int, int], channels: int, batch: int
):
    size, kernel, stride, padding = split
    x = torch.arange(1, batch * size * size * channels + 1, dtype=torch.float32).view(batch, size, size, channels)
    unfolded = F.unfold(x.permute(0, 3, 1, 2), kernel, stride=stride, padding=padding)
    want = unfolded.view(batch, channels, kernel * kernel, -1).permute(0, 3, 2, 1).flatten(2)
    torch.testing.assert_close(soft_split(x, kernel, stride, padding), want, atol=0, rtol=0)


@given(st.integers(16, 320), st.integers(2, 20))
@settings(max_examples=300, deadline=None)
def test_no_model_has_a_split_that_is_wider_than_two_strides(size: int, grid: int):
    try:
        kernel, stride, padding = soft_split_geometry(size, grid)
    except ValueError:
        return
    assert stride <= kernel <= 2 * stride
    assert padding < stride


@pytest.mark.parametrize(("size", "grid"), [(224, 7), (48, 2), (48, 3), (48, 4), (50, 3)])
def test_tokens_are_the_model_s(size: int, grid: int):
    torch.manual_seed(0)
    tokens = TokensToToken(size, grid, embed_dim=32).eval()
    with torch.no_grad():
        for parameter in tokens.parameters():  # no column like another
            parameter.add_(torch.randn_like(parameter) * 0.05)
    image = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        want = tokens(image)
        got = ChannelsLastTokens(tokens)(image.permute(0, 2, 3, 1))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_an_export_leaves_the_trained_model_as_it_is():
    torch.manual_seed(0)
    model = DVT(variant("micro")).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    StageGraph(model, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_pixel_is_gathered(micro_bundle: Path):
    bundle = Bundle.load(micro_bundle)
    for number in (1, 2, 3):
        graph = onnx.load(bundle.stage_path(number)).graph
        assert not {node.op_type for node in graph.node} & {"GatherND", "If", "NonZero"}
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        picked = [shapes[node.input[1]] for node in graph.node if node.op_type == "Gather"]
        assert picked == [(), ()]  # the class token, and the head's row
