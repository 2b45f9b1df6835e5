"""The paper's ablations are what their names say: what reaches what, told by gradients and by hand."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from export.stage import StageGraph
from model.ablations import FEATURES, RELATIONS
from model.config import FeatureDesign, RelationDesign, variant
from model.dvt import DVT
from model.flops import as_published, cumulative_macs
from model.reuse import FeatureReuse, RelationReuse

DESIGNS = [("feature_design", d) for d in get_args(FeatureDesign)] + [
    ("relation_design", d) for d in get_args(RelationDesign)
]


@pytest.mark.parametrize(("field", "design"), DESIGNS)
def test_every_design_runs_counts_trains_and_exports_its_state(field: str, design: str):
    torch.manual_seed(0)
    model = DVT(variant("micro", **{field: design})).eval()
    images = torch.randn(2, 3, 48, 48)
    exits = model(images)
    with as_published(model):
        for got, want in zip(model(images), exits, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert len(cumulative_macs(model)) == 3
    exits[-1].sum().backward()
    unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert unused <= {
        f"stages.{i}.{part}" for i in (0, 1) for part in ("head.weight", "head.bias", "norm.weight", "norm.bias")
    }
    for number in (1, 2, 3):
        graph = StageGraph(model, number)
        with torch.inference_mode():
            outputs = graph(*graph.example(batch=2))
        assert [tuple(t.shape[1:]) for t in outputs] == [shape[1:] for _, shape in graph.outputs().values()]


# GMACs at the second exit of T2T-ViT-12 on 7x7 and 10x10 tokens, as published: Tables 5 and 6 (7 and 8 at NeurIPS).
@pytest.mark.parametrize(
    ("field", "design", "published"),
    [
        ("feature_design", "layer-wise", "1.43"),
        ("feature_design", "class-token", "1.43"),
        ("feature_design", "first-layer", "1.38"),
        ("feature_design", "no-norm", "1.42"),
        ("feature_design", "final", "1.43"),
        ("relation_design", "layer-wise", "1.38"),
        ("relation_design", "final-layer", "1.39"),
        ("relation_design", "linear", "1.38"),
        ("relation_design", "naive-upsampling", "1.41"),
        ("relation_design", "all-layers", "1.41"),
    ],
)
def test_macs_of_every_design_are_the_published_ones(field: str, design: str, published: str):
    other = "relation_reuse" if field == "feature_design" else "feature_reuse"
    macs = cumulative_macs(DVT(variant("t2t-vit-12", grids=(7, 10), **{field: design, other: False})))
    assert [f"{m / 1e9:.2f}" for m in macs] == ["0.47", published]


def test_layer_wise_features_come_from_the_same_layer():
    reuse = FEATURES["layer-wise"](variant("micro"), 2, 3)
    features = torch.randn(1, 2, 4, 32, requires_grad=True)  # (B, L, n, D)
    reuse(features)[1].sum().backward()
    assert not features.grad[:, 0].any()
    assert features.grad[:, 1].any()


def test_the_class_token_is_reused_where_asked():
    torch.manual_seed(0)
    reuse = FEATURES["class-token"](variant("micro"), 2, 3)
    features = torch.randn(1, 5, 32)
    first = reuse(features)[0]
    torch.testing.assert_close(first[:, 0], reuse[0].mlp(reuse[0].norm(features[:, 0])))
    plain = FeatureReuse(variant("micro"), 2, 3)
    plain.load_state_dict(reuse.state_dict())
    torch.testing.assert_close(first[:, 1:], plain(features[:, 1:])[0][:, 1:])


def test_only_the_first_layer_reuses_where_asked():
    model = DVT(variant("micro", feature_design="first-layer"))
    widths = [block.mlp.fc1.in_features for block in model.stages[1].blocks]
    assert widths == [40, 32]
    assert model.stages[1].feature_reuse(torch.randn(1, 4, 32))[1] is None


def test_features_are_not_normalised_where_asked():
    reuse = FEATURES["no-norm"](variant("micro"), 2, 3)
    features = torch.randn(1, 4, 32)
    torch.testing.assert_close(reuse(features)[0], reuse[0].upsample @ reuse[0].mlp(features))


def gradient(design: str, layer: int) -> torch.Tensor:
    """Which channels (layers of two heads) of the upstream relations reach a layer's bias: (L*h,)."""
    torch.manual_seed(0)
    reuse = RELATIONS.get(design, RelationReuse)(variant("micro"), 2, 3)
    relations = torch.randn(1, 4, 5, 5, requires_grad=True)
    reuse.layer(reuse(relations), layer).square().sum().backward()
    return relations.grad.abs().sum(dim=(0, 2, 3)) > 0


def test_relations_come_from_all_layers_from_the_own_one_or_from_the_last():
    assert gradient("all-layers", 0).tolist() == [True] * 4
    assert gradient("layer-wise", 0).tolist() == [True, True, False, False]
    assert gradient("layer-wise", 1).tolist() == [False, False, True, True]
    assert gradient("final-layer", 0).tolist() == [False, False, True, True]


def test_a_linear_map_of_relations_is_linear():
    reuse = RELATIONS["linear"](variant("micro"), 2, 3)
    a, b = torch.randn(2, 1, 4, 5, 5)
    zero = reuse(torch.zeros_like(a))
    torch.testing.assert_close(reuse(a + b) - zero, reuse(a) + reuse(b) - 2 * zero, atol=1e-5, rtol=1e-4)


def test_naive_upsampling_stretches_the_list_of_tokens():
    reuse = RELATIONS["naive-upsampling"](variant("micro"), 2, 3)
    own = torch.randn(1, 4, 5, 5)
    expected = F.interpolate(own[:, :2, 1:, 1:], size=(9, 9), mode="bilinear")
    torch.testing.assert_close(reuse.layer(own, 0)[..., 1:, 1:], expected)


def test_an_unknown_design_is_refused():
    with pytest.raises(ValueError, match="feature_design is one of final, layer-wise"):
        variant("micro", feature_design="else")
