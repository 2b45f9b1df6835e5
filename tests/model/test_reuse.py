"""Reuse against independent computations: hand-written rows, PyTorch's own pooling, and what must pass through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.config import variant
from model.dvt import DVT
from model.reuse import LayerFeatures, RelationReuse, upsample_matrix

# The published models' rows, as weights of source tokens, written out by hand.
SEVEN_TO_TEN = [
    {0: 1}, {0: 1 / 2, 1: 1 / 2}, {1: 2 / 3, 2: 1 / 3}, {2: 1}, {2: 1 / 2, 3: 1 / 2},
    {3: 1 / 2, 4: 1 / 2}, {4: 1}, {4: 1 / 3, 5: 2 / 3}, {5: 1 / 2, 6: 1 / 2}, {6: 1},
]  # fmt: skip
TEN_TO_FOURTEEN = [
    {0: 1}, {0: 1 / 2, 1: 1 / 2}, {1: 2 / 3, 2: 1 / 3}, {2: 1}, {2: 1 / 3, 3: 2 / 3}, {3: 1 / 2, 4: 1 / 2}, {4: 1},
    {5: 1}, {5: 1 / 2, 6: 1 / 2}, {6: 2 / 3, 7: 1 / 3}, {7: 1}, {7: 1 / 3, 8: 2 / 3}, {8: 1 / 2, 9: 1 / 2}, {9: 1},
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "rows"), [(7, 10, SEVEN_TO_TEN), (10, 14, TEN_TO_FOURTEEN)])
def test_the_published_grids_upsample_by_the_published_rows(source: int, target: int, rows: list[dict[int, float]]):
    expected = torch.zeros(target, source)
    for i, row in enumerate(rows):
        for j, weight in row.items():
            expected[i, j] = weight
    torch.testing.assert_close(upsample_matrix(source, target), expected)


@pytest.mark.parametrize(("source", "target", "between"), [(7, 10, 14), (10, 14, 20), (7, 14, 20)])
def test_upsampling_is_nearest_and_then_adaptive_pooling(source: int, target: int, between: int):
    grid = torch.randn(2, 5, source, source)
    expected = F.adaptive_avg_pool2d(F.interpolate(grid, size=(between, between), mode="nearest"), (target, target))
    axis = upsample_matrix(source, target)
    torch.testing.assert_close(axis @ grid @ axis.T, expected)


@pytest.mark.parametrize(("source", "target"), [(2, 3), (3, 4), (4, 6), (6, 8), (4, 7), (7, 14)])
def test_upsampling_keeps_a_constant_and_the_order_of_tokens(source: int, target: int):
    axis = upsample_matrix(source, target)
    torch.testing.assert_close(axis.sum(1), torch.ones(target))
    assert (axis >= 0).all()
    assert (axis @ torch.arange(source).float()).diff().ge(0).all()


def test_feature_reuse_gives_the_class_token_nothing():
    reuse = LayerFeatures(variant("micro"), source=2, target=3)
    out = reuse(torch.randn(2, 4, 32))
    assert out.shape == (2, 10, 8)
    assert (out[:, 0] == 0).all()
    assert (out[:, 1:] != 0).any()


def test_feature_reuse_applies_its_mlp_before_it_upsamples():
    config = variant("micro")
    reuse = LayerFeatures(config, source=2, target=3)
    features = torch.randn(1, 4, config.embed_dim)
    tokens = reuse.mlp(reuse.norm(features)).transpose(1, 2).reshape(1, -1, 2, 2)
    axis = upsample_matrix(2, 3)
    expected = (axis @ tokens @ axis.T).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reuse(features)[:, 1:], expected)


def test_relation_reuse_upsamples_keys_and_queries_and_leaves_the_class_row_and_column_unscaled():
    config = variant("micro")
    reuse = RelationReuse(config, source=2, target=3)
    mixed = torch.randn(1, config.depth * config.num_heads, 5, 5)
    layer = reuse.layer(mixed, 1)
    own = mixed[:, config.num_heads :]  # layer-major: layer 1 has the second h channels
    assert layer.shape == (1, config.num_heads, 10, 10)
    torch.testing.assert_close(layer[..., 0, 0], own[..., 0, 0])
    axis = upsample_matrix(2, 3)
    row = own[..., 0, 1:].reshape(1, -1, 2, 2)  # the class token's logits over keys
    torch.testing.assert_close(layer[..., 0, 1:], (axis @ row @ axis.T).flatten(2))
    column = own[..., 1:, 0].reshape(1, -1, 2, 2)
    torch.testing.assert_close(layer[..., 1:, 0], (axis @ column @ axis.T).flatten(2))
    # And one pair in the middle, by the definition: both sides averaged over their source tokens.
    square = torch.kron(axis, axis)
    torch.testing.assert_close(
        layer[..., 1 + 4, 1 + 7], torch.einsum("i,bhij,j->bh", square[4], own[..., 1:, 1:], square[7])
    )


def test_the_last_exit_alone_trains_every_stage_through_both_reuses():
    model = DVT(variant("micro"))
    model(torch.randn(2, 3, 48, 48))[-1].sum().backward()
    for stage in model.stages:
        assert stage.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["feature_reuse", "relation_reuse"])
def test_each_reuse_alone_carries_gradients_and_the_other_is_not_there(kind: str):
    off = {"feature_reuse": False, "relation_reuse": False, kind: True}
    model = DVT(variant("micro", **off))
    absent = "relation_reuse" if kind == "feature_reuse" else "feature_reuse"
    assert not any(absent in name for name in model.state_dict())
    model(torch.randn(2, 3, 48, 48))[-1].sum().backward()
    assert model.stages[0].blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_without_reuse_the_stages_are_strangers():
    model = DVT(variant("micro", feature_reuse=False, relation_reuse=False))
    model(torch.randn(2, 3, 48, 48))[-1].sum().backward()
    assert model.stages[0].blocks[0].attn.qkv.weight.grad is None
