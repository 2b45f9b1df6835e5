"""Feature reuse and relation reuse: how a stage takes in what the coarser one before it has computed.

Shapes: n tokens of the upstream grid g x g, N of this stage's grid (both without the class token), D embed_dim,
C reuse_dim, L layers, h heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DVTConfig
from model.layers import Mlp


class ReuseState(NamedTuple):
    """What a stage hands on. Nothing is detached: gradients of later exits reach earlier stages."""

    features: Tensor  # (B, n, D), last block's output before the final norm, class token dropped
    relations: Tensor  # (B, L*h, n+1, n+1), every softmax input, layer-major, class row and column included


def intermediate_grid(source: int, target: int) -> int:
    """The side between source and target: 10/7 of the target, rounded, which gives 14 for a 10x10 target and 20 for a
    14x14 one, the two that the paper's models use. The same proportion serves other grids."""
    return max(round(target * 10 / 7), source)


def upsample_matrix(source: int, target: int) -> Tensor:
    """The fixed upsampling along one axis, (target, source): nearest to the intermediate grid, then adaptive average
    pooling to the target."""
    between = intermediate_grid(source, target)
    nearest = F.one_hot(torch.arange(between) * source // between, source).to(torch.float64)  # (between, source)
    rows = []
    for i in range(target):
        start, end = i * between // target, -(-(i + 1) * between // target)
        rows.append(nearest[start:end].mean(dim=0))
    return torch.stack(rows).float()


class LayerFeatures(nn.Module):
    """f_l of one layer: LN -> MLP on the upstream's tokens, then upsampling; the class token's row is zeros
    (paper, Eq. 4)."""

    upsample: Tensor

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config.embed_dim, config.reuse_hidden, config.reuse_dim)
        axis = upsample_matrix(source, target)
        square = torch.kron(axis, axis)  # (N, n)
        self.register_buffer("upsample", torch.cat((torch.zeros(1, source * source), square)), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, n, D) -> (B, N+1, C)."""
        return self.upsample @ self.mlp(self.norm(features))


class FeatureReuse(nn.ModuleList):
    """f_l of every layer of a stage, each with weights of its own, all on the same features."""

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__(LayerFeatures(config, source, target) for _ in range(config.depth))

    def forward(self, features: Tensor) -> list[Tensor]:
        """(B, n, D) -> (B, N+1, C) for each layer."""
        return [layer(features) for layer in self]


class RelationReuse(nn.Module):
    """r_l of all layers of a stage: one MLP over the L*h logits of every (query, key) pair, then, per layer,
    upsampling over keys and queries; the class row and column pass through unscaled (paper, Eq. 8 and 9)."""

    upsample: Tensor

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.num_heads = config.num_heads
        channels = config.depth * config.num_heads
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 3 * channels, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(3 * channels, channels, kernel_size=1),
        )
        axis = upsample_matrix(source, target)
        square = torch.kron(axis, axis)  # (N, n)
        self.register_buffer("upsample", torch.block_diag(torch.ones(1, 1), square), persistent=False)

    def forward(self, relations: Tensor) -> Tensor:
        """(B, L*h, n+1, n+1) -> the same shape, before upsampling."""
        mixed: Tensor = self.mlp(relations)
        return mixed

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        """The bias of one layer, (B, h, N+1, N+1). Per layer, since all layers at once would hold 7-13 MB an image."""
        own = mixed[:, layer * self.num_heads : (layer + 1) * self.num_heads]
        return self.upsample @ (own @ self.upsample.T)
