"""Cost of the exits, counted by fvcore: multiply-accumulates (MACs), batch 1. The paper prints this count as "FLOPs".

fvcore counts matrix products and convolutions, and a few operations an element for norms, poolings and upsamplings.
So that our figures can be laid beside published ones, what is counted is the arithmetic as it was published: the same
function, computed less cleverly. Ours leaves out the reuse MLPs and the final norm on tokens that nobody reads, and
upsamples by a fixed matrix, of which fvcore would count the zeros.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dvt import DVT
from model.reuse import LayerFeatures, RelationReuse, intermediate_grid
from model.stage import Stage


def cumulative_macs(model: DVT) -> list[int]:
    """MACs spent up to and including each exit."""
    size = model.config.image_size
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # fvcore warns about every elementwise operator that it does not count.
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), as_published(model):
            warnings.simplefilter("ignore")  # it is built on TorchScript, which PyTorch calls deprecated at every turn
            from fvcore.nn import FlopCountAnalysis

            per_module = FlopCountAnalysis(model, torch.zeros(1, 3, size, size, device=device)).by_module()
        stages = [int(per_module[f"stages.{i}"]) for i in range(model.config.num_stages)]
    finally:
        logger.setLevel(level)
        model.train(was_training)
    return [sum(stages[: i + 1]) for i in range(len(stages))]


@contextmanager
def as_published(model: DVT) -> Iterator[None]:
    """Within the block, `model` computes what it always does, but step by step as the published code was seen to."""
    replaced: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, name: str, method: object) -> None:
        setattr(module, name, method)
        replaced.append((module, name))

    for stage in model.stages:
        assert isinstance(stage, Stage)
        replace(stage.norm, "forward", _norm_all_tokens(stage.norm, stage.pos_embed.shape[1]))
        for layer in stage.feature_reuse or ():
            if type(layer) is LayerFeatures:  # an ablation's own is counted as it is
                replace(layer, "forward", _reuse_features(layer))
        relations = stage.relation_reuse
        if relations is not None and type(relations).layer is RelationReuse.layer:
            replace(relations, "layer", _reuse_relations(relations))
    try:
        yield
    finally:
        for module, name in replaced:
            delattr(module, name)  # the class's own is seen again


def _upsample(x: Tensor, source: int, target: int) -> Tensor:
    """(B, C, source*source) -> (B, C, target*target): nearest to the grid between, then adaptive average pooling."""
    between = intermediate_grid(source, target)
    grid = x.reshape(*x.shape[:2], source, source)
    pooled = F.adaptive_avg_pool2d(F.interpolate(grid, size=(between, between), mode="nearest"), (target, target))
    return pooled.reshape(*x.shape[:2], target * target)


def _norm_all_tokens(norm: nn.LayerNorm, tokens: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        """(B, D), the class token, in the company of N-1 more."""
        every = x.unsqueeze(1).expand(-1, tokens, -1)
        return F.layer_norm(every, norm.normalized_shape, norm.weight, norm.bias, norm.eps)[:, 0]

    return forward


def _reuse_features(reuse: LayerFeatures) -> Callable[[Tensor], Tensor]:
    def forward(features: Tensor) -> Tensor:
        """The MLP on the class token as well; its row is dropped afterwards."""
        with_class = torch.cat((features[:, :1], features), dim=1)
        channels = reuse.mlp(reuse.norm(with_class))[:, 1:].transpose(1, 2)
        upsampled = _upsample(channels, reuse.source, reuse.target).transpose(1, 2)
        return torch.cat((torch.zeros_like(upsampled[:, :1]), upsampled), dim=1)

    return forward


def _reuse_relations(reuse: RelationReuse) -> Callable[[Tensor, int], Tensor]:
    def last_axis(x: Tensor) -> Tensor:
        """(B, h, R, 1+n) -> (B, h, R, 1+N)"""
        maps = x[..., 1:].flatten(1, 2)
        upsampled = _upsample(maps, reuse.source, reuse.target).reshape(*x.shape[:3], -1)
        return torch.cat((x[..., :1], upsampled), dim=-1)

    def layer(mixed: Tensor, layer: int) -> Tensor:
        own = mixed[:, layer * reuse.num_heads : (layer + 1) * reuse.num_heads]
        return last_axis(last_axis(own).transpose(2, 3)).transpose(2, 3)

    return layer
