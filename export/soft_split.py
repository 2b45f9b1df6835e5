"""T2T's soft splits by slices instead of gathers. Done on the exported copy, never on the trained model; what it is
worth is measured in `benchmarks/cpu_peak.py`.

`F.unfold` exports as a gather of every single pixel, a fifth of a stage's time. But a window of a split is never larger
than two strides: cut into blocks as large as a stride, it is a block and the beginning of the next one, along either
axis. With the channels last these are copies of whole rows, and what follows takes them as they lie, once its weights
are in that order: `unfold` counts channel, row, column, this counts row, column, channel.

Shapes: B images, C channels, H x W pixels or tokens, T windows a side, k kernel, s stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.t2t_vit import TOKEN_DIM, TokensToToken

SECOND = (3, 2, 1)  # kernel, stride, padding of the second and the third split


class ChannelsLastTokens(nn.Module):
    """`TokensToToken` for images with the channels last, (B, S, S, 3). Takes over its weights and reorders them."""

    def __init__(self, tokens: TokensToToken) -> None:
        super().__init__()
        self.first, self.sides = tokens.first, tokens.sides
        self.performers = nn.ModuleList((tokens.performer1, tokens.performer2))
        self.project = tokens.project
        pixels, inner = _channels_last(self.first[0], 3), _channels_last(SECOND[0], TOKEN_DIM)
        for performer, order in ((tokens.performer1, pixels), (tokens.performer2, inner)):
            _permute(performer.norm1, order)
            _permute(performer.kqv, order)
        _permute(self.project, inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, S, 3) -> (B, grid*grid, D)."""
        x = soft_split(x, *self.first)  # (B, T1*T1, k*k*3)
        for performer, side in zip(self.performers, self.sides, strict=True):
            x = performer(x).unflatten(1, (side, side))  # (B, T, T, 64)
            x = soft_split(x, *SECOND)
        tokens: Tensor = self.project(x)
        return tokens


def soft_split(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """`F.unfold` of an image with the channels last, (B, H, H, C) -> (B, T*T, k*k*C). Needs s <= k <= 2*s."""
    _, H, _, C = x.shape
    T = (H + 2 * padding - kernel) // stride + 1
    blocks, overlap = T + 1, kernel - stride  # the last block lends its beginning alone
    kept = min(H, blocks * stride - padding)  # the windows may leave out an edge
    if kept < H:
        x = x[:, :kept, :kept]
    after = blocks * stride - padding - kept
    x = F.pad(x, (0, 0, padding, after, padding, after))
    x = x.reshape(-1, blocks * stride, blocks, stride * C)
    x = torch.cat((x[:, :, :T], x[..., : overlap * C][:, :, 1:]), dim=3)  # (B, blocks*s, T, k*C)
    x = x.reshape(-1, blocks, stride, T, kernel * C).transpose(2, 3).reshape(-1, blocks, T, stride * kernel * C)
    x = torch.cat((x[:, :T], x[..., : overlap * kernel * C][:, 1:]), dim=3)  # (B, T, T, k*k*C)
    return x.reshape(-1, T * T, kernel * kernel * C)


def _channels_last(kernel: int, channels: int) -> Tensor:
    """Where the columns of a channels-last window are among those of `unfold`."""
    return torch.arange(channels * kernel * kernel).view(channels, kernel, kernel).permute(1, 2, 0).flatten()


@torch.no_grad()
def _permute(layer: nn.Linear | nn.LayerNorm, order: Tensor) -> None:
    """Let a layer take its input's columns in another order."""
    layer.weight.copy_(layer.weight[..., order])
    if isinstance(layer, nn.LayerNorm):
        layer.bias.copy_(layer.bias[order])
