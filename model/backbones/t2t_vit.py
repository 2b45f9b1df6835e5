"""Tokens-to-token: three overlapping soft splits with a one-head performer after the first two (Yuan et al., 2021),
and the fixed sinusoid position embedding of T2T-ViT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.images import check_images

TOKEN_DIM = 64  # width inside the T2T module
FEATURES = 32  # random features of the performer
NORM_EPS = 1e-5

# The performer's guard is 1e-8 in its denominator. Numerator and denominator are both computed times this power of two,
# which changes no bit of the quotient: as a plain "+ 1e-8" the ONNX exporter's optimiser takes the guard for "+ 0" and
# drops it, and 0/0 follows where all random features underflow.
SCALE = 2.0**27
GUARD = 1e-8 * SCALE

# First soft split at 224 pixels: grid -> (kernel, stride, padding). As published but for 4, of which the paper prints
# only a cost, 0.21 G (its Table 1). A hundred splits of seven costs come to that; this one, 0.213 G, is the one that
# continues 7/4 and 14/8.
_AT_224 = {4: (28, 16, 6), 7: (14, 8, 3), 10: (11, 6, 5), 14: (7, 4, 2)}


def soft_split_geometry(size: int, grid: int) -> tuple[int, int, int]:
    """(kernel, stride, padding) of the first soft split; two 3/2/1 splits follow and each halves the side, rounded up.

    As published for 224 pixels; elsewhere the largest overlapping split that leads to the grid, with the least padding.
    Raises ValueError where there is none.
    """
    if size == 224 and grid in _AT_224:
        return _AT_224[grid]
    for side in range(4 * grid, 4 * grid - 4, -1):  # all of them become `grid` after two halvings
        for stride in range(size // side + 1, 1, -1):
            kernel = 2 * stride - 1
            for padding in range(stride):
                if (size + 2 * padding - kernel) // stride + 1 == side:
                    return kernel, stride, padding
    raise ValueError(f"no T2T soft split leads from {size} pixels to a {grid}x{grid} grid")


class TokenPerformer(nn.Module):
    """Linear attention by random features (Choromanski et al., 2021), then an MLP. Runs in fp32 throughout: its
    guard is zero in fp16."""

    def __init__(self, in_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.kqv = nn.Linear(in_dim, 3 * TOKEN_DIM)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)
        self.norm1 = nn.LayerNorm(in_dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(TOKEN_DIM, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(TOKEN_DIM, TOKEN_DIM), nn.GELU(), nn.Linear(TOKEN_DIM, TOKEN_DIM), nn.Dropout(dropout)
        )
        w = nn.init.orthogonal_(torch.empty(FEATURES, TOKEN_DIM)) * math.sqrt(FEATURES)
        self.w = nn.Parameter(w, requires_grad=False)  # (m, 64), drawn once, frozen, part of the checkpoint

    def _features(self, x: Tensor) -> Tensor:
        """exp(w.x - |x|^2/2) / sqrt(m): (B, T, 64) -> (B, T, m)."""
        half_norm = (x * x).sum(dim=-1, keepdim=True) / 2
        return torch.exp(x @ self.w.T - half_norm) / math.sqrt(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in_dim) -> (B, T, 64)."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # in this order
        kf, qf = self._features(k), self._features(q) * SCALE  # (B, T, m)
        # Summed along the last axis of a matrix: there, engines add in an order that does not depend on the batch.
        total = kf.transpose(1, 2).flatten(0, 1).sum(dim=-1).view(-1, FEATURES, 1)  # (B, m, 1)
        denominator = qf @ total + GUARD  # (B, T, 1)
        summary = v.transpose(1, 2) @ kf  # (B, 64, m)
        y = (qf @ summary.transpose(1, 2)) / denominator  # (B, T, 64)
        y = v + self.dropout(self.proj(y))  # the residual is V, not the input
        return y + self.mlp(self.norm2(y))


class TokensToToken(nn.Module):
    def __init__(self, size: int, grid: int, embed_dim: int) -> None:
        super().__init__()
        self.size = size
        kernel, stride, padding = soft_split_geometry(size, grid)
        self.first = (kernel, stride, padding)
        side = (size + 2 * padding - kernel) // stride + 1
        self.sides = (side, (side - 1) // 2 + 1)  # after the first and the second split
        self.performer1 = TokenPerformer(3 * kernel * kernel)
        self.performer2 = TokenPerformer(TOKEN_DIM * 9)
        self.project = nn.Linear(TOKEN_DIM * 9, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, grid*grid, D). In fp32, also under autocast."""
        check_images(x, self.size)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            kernel, stride, padding = self.first
            x = F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2)  # (B, T1, 3*k*k)
            for performer, side in zip((self.performer1, self.performer2), self.sides, strict=True):
                x = performer(x)  # (B, side*side, 64)
                x = x.transpose(1, 2).reshape(-1, TOKEN_DIM, side, side)
                x = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2)  # (B, T, 576)
            tokens: Tensor = self.project(x)
            return tokens


def sinusoid(positions: int, dim: int) -> Tensor:
    """Fixed 1-D sine/cosine table over the flat index, class token at 0: (1, positions, dim)."""
    rate = torch.pow(10000.0, -(torch.arange(dim, dtype=torch.float64) // 2 * 2) / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return table.float()[None]
