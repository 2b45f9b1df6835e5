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

    features: Tensor  # (B, n, D), last block's output before the final norm, class token dropped (see `features_shape`)
    relations: Tensor  # (B, L*h, n+1, n+1), every softmax input, layer-major, class row and column included


def features_shape(config: DVTConfig, grid: int) -> tuple[int, ...]:
    """The shape, without the batch, of the features that a stage on this grid hands on."""
    n, D = grid * grid, config.embed_dim
    match config.feature_design:
        case "layer-wise":
            return (config.depth, n, D)
        case "class-token":
            return (n + 1, D)
    return (n, D)


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


def _stretch_matrix(source: int, target: int) -> Tensor:
    """Linear interpolation of a list of `source` values to `target`, pixel centres aligned: (target, source)."""
    return F.interpolate(torch.eye(source)[None], size=target, mode="linear")[0].T.contiguous()


class LayerFeatures(nn.Module):
    """f_l of one layer: LN -> MLP on the upstream's tokens, then upsampling; the class token's row is zeros
    (paper, Eq. 3)."""

    upsample: Tensor

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        if config.feature_design == "no-norm":
            self.norm = nn.Identity()  # type: ignore[assignment]
        self.mlp = Mlp(config.embed_dim, config.reuse_hidden, config.reuse_dim)
        axis = upsample_matrix(source, target)
        square = torch.kron(axis, axis)  # (N, n)
        if config.feature_design == "class-token":
            upsample = torch.block_diag(torch.ones(1, 1), square)  # (N+1, n+1)
        else:
            upsample = torch.cat((torch.zeros(1, source * source), square))  # (N+1, n)
        self.register_buffer("upsample", upsample, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, n, D) -> (B, N+1, C)."""
        return self.upsample @ self.mlp(self.norm(features))


class FeatureReuse(nn.ModuleList):
    """f_l of every layer of a stage, each with weights of its own, all on the same features."""

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        self.design, self.depth = config.feature_design, config.depth
        layers = 1 if self.design == "first-layer" else config.depth
        super().__init__(LayerFeatures(config, source, target) for _ in range(layers))

    def forward(self, features: Tensor) -> list[Tensor | None]:
        """(B, n, D) -> (B, N+1, C) for each layer, None where a layer reuses nothing."""
        if self.design == "layer-wise":
            return [layer(own) for layer, own in zip(self, features.unbind(1), strict=True)]
        reused = [layer(features) for layer in self]
        return [*reused, *[None] * (self.depth - len(reused))]


class RelationReuse(nn.Module):
    """r_l of all layers of a stage: one MLP over the L*h logits of every (query, key) pair, then, per layer,
    upsampling over keys and queries; the class row and column pass through unscaled (paper, Eq. 5 and 6)."""

    upsample: Tensor

    def __init__(self, config: DVTConfig, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = source, target
        channels = config.depth * config.num_heads
        self.num_heads = config.num_heads
        self.design = config.relation_design
        taken = config.num_heads if self.design == "final-layer" else channels
        groups = config.depth if self.design == "layer-wise" else 1
        self.mlp = nn.Sequential(
            nn.Conv2d(taken, 3 * channels, kernel_size=1, groups=groups),
            nn.GELU(),
            nn.Conv2d(3 * channels, channels, kernel_size=1, groups=groups),
        )
        if self.design == "linear":
            self.mlp = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1))
        if self.design == "naive-upsampling":
            square = _stretch_matrix(source * source, target * target)
        else:
            axis = upsample_matrix(source, target)
            square = torch.kron(axis, axis)
        self.register_buffer("upsample", torch.block_diag(torch.ones(1, 1), square), persistent=False)

    def forward(self, relations: Tensor) -> Tensor:
        """(B, L*h, n+1, n+1) -> the same shape, before upsampling."""
        mixed: Tensor = self.mlp(relations[:, -self.num_heads :] if self.design == "final-layer" else relations)
        return mixed

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        """The bias of one layer, (B, h, N+1, N+1). Per layer, since all layers at once would hold 7-13 MB an image."""
        own = mixed[:, layer * self.num_heads : (layer + 1) * self.num_heads]
        return self.upsample @ (own @ self.upsample.T)
