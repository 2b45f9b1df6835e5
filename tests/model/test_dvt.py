"""The architecture against the published figures, and the cascade's own invariants."""

from __future__ import annotations

import math

import pytest
import torch

from model.backbones.t2t_vit import TokenPerformer, TokensToToken, sinusoid, soft_split_geometry
from model.backbones.vit import patch_geometry
from model.config import VARIANTS, DVTConfig, variant
from model.dvt import DVT
from model.flops import as_published, cumulative_macs

TOKENIZERS = {
    "t2t": variant("micro"),
    "patch": variant("micro", tokenizer="patch", qkv_bias=True),
    "conv": variant("micro", tokenizer="conv", qkv_bias=True),
}


# Parameters per stage and tensors in all, as published for 1000 classes.
@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("t2t-vit-12", [6_989_824, 7_744_510, 7_727_182], 650),
        ("t2t-vit-14", [21_574_656, 23_156_110, 23_151_070], 740),
        ("deit-small", [22_878_952, 23_920_456, 23_642_824], 608),
    ],
)
def test_parameters_are_those_of_the_paper(name: str, parameters: list[int], tensors: int):
    with torch.device("meta"):
        stages = [sum(p.numel() for p in stage.parameters()) for stage in DVT(variant(name)).stages]
        assert stages == parameters
        assert len(DVT(variant(name)).state_dict()) == tensors


@pytest.mark.parametrize(("grid", "sides"), [(7, (28, 14)), (10, (38, 19)), (14, (56, 28))])
def test_t2t_halves_its_side_as_published(grid: int, sides: tuple[int, int]):
    with torch.device("meta"):
        tokenizer = TokensToToken(224, grid, 256)
    assert tokenizer.sides == sides


def test_patch_convolutions_have_the_published_geometry():
    assert [patch_geometry(224, grid) for grid in (7, 10, 14)] == [(32, 0), (23, 3), (16, 0)]


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        (32, (2, 3, 4)),
        (48, (2, 3, 4, 6)),
        (64, (3, 4, 5, 6, 8)),
        (224, (4, 5, 6, 7, 8, 9, 10, 11, 12, 14)),
        (384, (7, 12, 24)),
    ],
)
def test_a_soft_split_leads_to_the_grid_and_overlaps(size: int, grids: tuple[int, ...]):
    for grid in grids:
        kernel, stride, padding = soft_split_geometry(size, grid)
        side = (size + 2 * padding - kernel) // stride + 1
        assert -(-side // 4) == grid
        assert stride < kernel < 2 * stride
        assert padding < kernel / 2


@pytest.mark.parametrize(("size", "grid"), [(48, 13), (224, 27)])
def test_a_soft_split_that_does_not_fit_is_refused(size: int, grid: int):
    with pytest.raises(ValueError, match=f"from {size} pixels to a {grid}x{grid} grid"):
        soft_split_geometry(size, grid)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "photo10"])
@pytest.mark.parametrize("grids", [(7, 14), (4, 7, 10, 14), (5, 9)])
def test_every_backbone_takes_any_list_of_grids(name: str, grids: tuple[int, ...]):
    config = variant(name, image_size=224, resize=256, grids=grids, depth=1)
    with torch.inference_mode():
        exits = DVT(config).eval()(torch.zeros(1, 3, 224, 224))
    assert [tuple(logits.shape) for logits in exits] == [(1, config.num_classes)] * len(grids)


@pytest.mark.parametrize("config", TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_exit_answers_for_every_image_alone(config: DVTConfig):
    torch.manual_seed(0)
    model = DVT(config).eval()
    images = torch.randn(3, 3, 48, 48)
    together = model(images)
    assert [logits.shape for logits in together] == [(3, 4)] * 3
    for i in range(3):
        for one, many in zip(model(images[i : i + 1]), together, strict=True):
            torch.testing.assert_close(one[0], many[i], atol=1e-5, rtol=1e-4)


def test_a_stage_run_alone_with_the_state_before_it_equals_the_cascade():
    torch.manual_seed(0)
    model = DVT(variant("micro")).eval()
    images = torch.randn(2, 3, 48, 48)
    first, state = model.stages[0](images)
    second, state = model.stages[1](images, state)
    third, state = model.stages[2](images, state)
    assert state is None
    for got, want in zip((first, second, third), model(images), strict=True):
        assert torch.equal(got, want)


def test_what_is_handed_on_are_the_scaled_logits_with_the_stage_s_own_bias():
    torch.manual_seed(0)
    config = variant("micro")
    model = DVT(config).eval()
    images = torch.randn(1, 3, 48, 48)
    _, state = model.stages[0](images)
    stage = model.stages[1]
    _, handed_on = stage(images, state)
    tokens = torch.cat((stage.cls_token, stage.tokenizer(images)), dim=1) + stage.pos_embed
    block = stage.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(1, 10, 3, 2, 16).permute(2, 0, 3, 1, 4)
    bias = stage.relation_reuse.layer(stage.relation_reuse(state.relations), 0)
    torch.testing.assert_close(handed_on.relations[:, :2], q @ k.transpose(-2, -1) / math.sqrt(16) + bias)


def test_the_performer_is_linear_attention_by_its_random_features():
    torch.manual_seed(0)
    performer = TokenPerformer(12).eval()
    x = torch.randn(2, 9, 12)
    k, q, v = performer.kqv(performer.norm1(x)).split(64, dim=-1)

    def features(t: torch.Tensor) -> torch.Tensor:
        return torch.exp(t @ performer.w.T - t.square().sum(-1, keepdim=True) / 2) / math.sqrt(32)

    weights = features(q) @ features(k).transpose(1, 2)  # the quadratic form of the same attention
    mixed = weights @ v / (weights.sum(-1, keepdim=True) + 1e-8)
    y = v + performer.proj(mixed)
    torch.testing.assert_close(performer(x), y + performer.mlp(performer.norm2(y)))


def test_a_performer_whose_features_all_underflow_gives_zeros_and_no_nan():
    performer = TokenPerformer(12).eval()
    with torch.no_grad():
        performer.kqv.weight.mul_(1e4)  # |x|^2/2 far beyond what exp can take
    _, q, _ = performer.kqv(performer.norm1(torch.randn(1, 9, 12))).split(64, dim=-1)
    assert not performer._features(q).any()
    assert performer(torch.randn(1, 9, 12)).isfinite().all()


def test_random_features_are_orthogonal_rows_of_length_sqrt_m_and_frozen():
    w = TokenPerformer(12).w
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), atol=1e-4, rtol=0)
    assert not w.requires_grad


def test_the_sinusoid_starts_at_the_class_token():
    table = sinusoid(5, 8)[0]
    torch.testing.assert_close(table[0], torch.tensor([0.0, 1.0] * 4))
    torch.testing.assert_close(table[3, :2], torch.tensor([math.sin(3), math.cos(3)]))


# GMACs at the exits, as published for 1000 classes, to all printed digits.
@pytest.mark.parametrize(
    ("name", "features", "relations", "published"),
    [
        ("t2t-vit-12", True, True, "0.4725 1.4625 3.4975"),
        ("t2t-vit-12", True, False, "0.472 1.425 3.308"),
        ("t2t-vit-12", False, True, "0.472 1.408 3.335"),
        ("t2t-vit-12", False, False, "0.472 1.371 3.145"),
        ("t2t-vit-14", True, True, "1.2065 3.8409 9.3276"),
        ("deit-small", True, True, "1.1453 3.6563 8.8438"),
    ],
)
def test_macs_are_the_published_ones(name: str, features: bool, relations: bool, published: str):
    model = DVT(variant(name, feature_reuse=features, relation_reuse=relations))
    digits = len(published.split()[0].partition(".")[2])
    assert " ".join(f"{macs / 1e9:.{digits}f}" for macs in cumulative_macs(model)) == published


# Table 1: T2T-ViT-12 alone on one grid. Of the 4x4 one only the cost is published, not the split.
@pytest.mark.parametrize(("grid", "published"), [(14, 1.78), (7, 0.47), (4, 0.21)])
def test_macs_of_a_backbone_alone_are_those_of_table_1(grid: int, published: float):
    (macs,) = cumulative_macs(DVT(variant("t2t-vit-12", grids=(grid,))))
    assert macs / 1e9 == pytest.approx(published, abs=0.0055)  # 1.775 is printed as 1.78


@pytest.mark.parametrize("grids", [(2, 3, 4), (2, 4)])
def test_what_is_counted_computes_the_same(grids: tuple[int, ...]):
    torch.manual_seed(0)
    model = DVT(variant("micro", grids=grids)).eval()
    with torch.no_grad():  # as if trained: no part of the model is small
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.ndim > 1 else parameter + 0.1)
    images = torch.randn(2, 3, 48, 48)
    expected = model(images)
    with as_published(model):
        published = model(images)
        assert "forward" in vars(model.stages[0].norm)
    for got, want in zip(published, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(model(images), expected, strict=True))


def test_macs_rise_from_exit_to_exit_and_do_not_depend_on_train_mode():
    model = DVT(variant("micro"))
    model.train()
    macs = cumulative_macs(model)
    assert model.training
    assert macs == cumulative_macs(model.eval())
    assert 0 < macs[0] < macs[1] < macs[2]


def test_macs_of_a_transformer_without_reuse_are_what_one_counts_by_hand():
    config = variant("micro", tokenizer="patch", feature_reuse=False, relation_reuse=False, num_classes=10)
    N, D, M = 5, config.embed_dim, config.mlp_hidden
    patches = 4 * 24 * 24 * 3 * D
    layer = N * (3 * D * D + D * D + 2 * D * M) + 2 * N * N * D + 2 * 5 * N * D  # products, attention, two norms
    expected = patches + config.depth * layer + 5 * N * D + D * 10
    # fvcore counts a LayerNorm as 5 operations an element
    assert cumulative_macs(DVT(config))[0] == expected


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="rise"):
        variant("micro", grids=(3, 2))
    with pytest.raises(ValueError, match="multiple"):
        variant("micro", num_heads=3)
    with pytest.raises(ValueError, match="unknown variant"):
        variant("huge")
    with pytest.raises(ValueError, match="micro: resize 48 is smaller than image_size 64"):
        variant("micro", image_size=64)
    with pytest.raises(ValueError, match="micro: depth must be at least 1, got 0"):
        variant("micro", depth=0)
    with pytest.raises(ValueError, match="micro: tokenizer is one of t2t, patch, conv"):
        variant("micro", tokenizer="pixels")
    with pytest.raises(ValueError, match="micro: mean has 2 numbers, one a channel is 3"):
        variant("micro", mean=(0.5, 0.5))
    with pytest.raises(ValueError, match="micro: std must be above 0"):
        variant("micro", std=(0.5, 0.0, 0.5))
    with pytest.raises(ValueError, match="unknown configuration fields: colour"):
        DVTConfig.from_dict({**variant("micro").to_dict(), "colour": 1})
