"""Attention, MLP and the transformer block, with the two places where a block takes in reuse.

Shapes: B images, N tokens (class token first), D embed_dim, h heads, d head dim, C reuse_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
"""(q, k, v, bias, scale) -> (mixed values (B, h, N, d), logits (B, h, N, N)); see `attend`."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention that also gives its logits: what the next stage reuses is the softmax's *input*, scaled and
    with this stage's own bias already added (paper, section 3.2)."""
    logits = (q * scale) @ k.transpose(-2, -1)  # (B, h, N, N)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v, logits


class Attention(nn.Module):
    """Multi-head self-attention. `attend` may be exchanged by an exporter for an operator of its target."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.attend: Attend = attend

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), bias (B, h, N, N) or None -> (B, N, D), logits (B, h, N, N)."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)
        mixed, logits = self.attend(q, k, v, bias, self.head_dim**-0.5)
        return self.proj(mixed.transpose(1, 2).reshape(B, N, D)), logits


class Mlp(nn.Module):
    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden)
        self.act = nn.GELU()  # the erf form
        self.fc2 = nn.Linear(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drop a residual branch for some images of the batch, while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(kept).div_(kept)


class Block(nn.Module):
    """Pre-norm block. Relation reuse enters as a bias on the attention logits, feature reuse as `reuse_dim` more
    channels in front of norm2 and fc1; the residual stays the plain x (paper, Eq. 5)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        qkv_bias: bool,
        norm_eps: float,
        reuse_dim: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim + reuse_dim, eps=norm_eps)
        self.mlp = Mlp(dim + reuse_dim, mlp_hidden, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, relation: Tensor | None, feature: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), relation (B, h, N, N), feature (B, N, C) -> x (B, N, D), logits (B, h, N, N)."""
        mixed, logits = self.attn(self.norm1(x), relation)
        x = x + self.drop_path(mixed)
        widened = x if feature is None else torch.cat((x, feature), dim=-1)  # (B, N, D + C)
        return x + self.drop_path(self.mlp(self.norm2(widened))), logits
