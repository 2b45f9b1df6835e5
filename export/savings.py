"""Work that the last stage may leave out without changing an answer. Done on the exported copy, never on the trained
model; what it is worth, and what was tried and is worth nothing, is measured in `benchmarks/savings.py`.

Nobody reads the last stage's tokens but the class token. So its last block needs keys and values of all tokens, but the
query, the projection and the MLP of one; and no reused features, which are zero there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Attend, Block
from model.reuse import RelationReuse
from model.stage import Stage

# Rows that stand for the class token's one: engines multiply a single row by another routine than several rows, and
# a batch of one image would differ from others in the last bit.
ROWS = 2


def keep_class_row(stage: Stage, attend: Attend) -> None:
    """Rebuild the last stage in place. `attend` is the target's attention operator."""
    block = stage.blocks[-1]
    assert isinstance(block, Block)
    stage.blocks[-1] = ClassRowBlock(block, attend)
    if stage.relation_reuse is not None:
        stage.relation_reuse = ClassRowRelations(stage.relation_reuse, len(stage.blocks))  # type: ignore[assignment]


class ClassRowBlock(nn.Module):
    """The last block of the last stage, for its first ROWS tokens."""

    def __init__(self, block: Block, attend: Attend) -> None:
        super().__init__()
        attention = block.attn
        dim = attention.proj.in_features
        self.norm1, self.proj, self.norm2, self.mlp = block.norm1, attention.proj, block.norm2, block.mlp
        self.query = _rows(attention.qkv, slice(None, dim))
        self.key_value = _rows(attention.qkv, slice(dim, None))
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.reuse_dim = block.mlp.fc1.in_features - dim
        self.attend = attend

    def forward(self, x: Tensor, relation: Tensor | None, feature: Tensor | None) -> tuple[Tensor, None]:  # noqa: ARG002
        """x (B, N, D), relation (B, h, ROWS, N) -> x (B, ROWS, D); `feature` is not looked at."""
        B, N, D = x.shape
        y = self.norm1(x)
        q = self.query(y[:, :ROWS]).reshape(B, ROWS, self.num_heads, self.head_dim).transpose(1, 2)
        key_value = self.key_value(y).reshape(B, N, 2, self.num_heads, self.head_dim)
        k, v = key_value.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)
        mixed, _ = self.attend(q, k, v, relation, self.head_dim**-0.5)
        x = x[:, :ROWS] + self.proj(mixed.transpose(1, 2).reshape(B, ROWS, D))
        # The class token's reused features are zeros. The second row is no answer, whatever it computes.
        widened = F.pad(x, (0, self.reuse_dim)) if self.reuse_dim else x
        return x + self.mlp(self.norm2(widened)), None


class ClassRowRelations(nn.Module):
    """Relation reuse whose last layer gives only the rows of `ClassRowBlock`."""

    def __init__(self, reuse: RelationReuse, depth: int) -> None:
        super().__init__()
        self.reuse = reuse
        self.last = depth - 1

    def forward(self, relations: Tensor) -> Tensor:
        mixed: Tensor = self.reuse(relations)
        return mixed

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        """(B, L*h, n+1, n+1) -> (B, h, N+1, N+1), of the last layer (B, h, ROWS, N+1)."""
        if layer != self.last:
            return self.reuse.layer(mixed, layer)
        own = mixed[:, layer * self.reuse.num_heads :]
        return (self.reuse.upsample[:ROWS] @ own) @ self.reuse.upsample.T


def _rows(linear: nn.Linear, rows: slice) -> nn.Linear:
    """The part of a linear layer that computes these outputs."""
    weight = linear.weight[rows]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    with torch.no_grad():
        part.weight.copy_(weight)
        if linear.bias is not None:
            part.bias.copy_(linear.bias[rows])
    return part
