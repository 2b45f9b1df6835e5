"""The same stage in operators that ONNX Runtime's CPU kernels run faster. Done on the exported copy, never on the
trained model; what it is worth is measured in `benchmarks/cpu_peak.py`.

Shapes: B images, N tokens with the class token, D embed_dim, h heads, n upstream tokens, g x g and G x G the grids of
the stage before and of this one.
"""

from __future__ import annotations

import torch
import torch.onnx.ops
from torch import Tensor, nn

from model.layers import Attention, Mlp
from model.reuse import RelationReuse, upsample_matrix


def suit_cpu(module: nn.Module) -> None:
    """Rebuild a stage in place."""
    for name, child in module.named_children():
        if isinstance(child, Attention):
            setattr(module, name, OperatorAttention(child))
        elif isinstance(child, Mlp) or (isinstance(child, nn.Linear) and child.bias is not None):
            setattr(module, name, Flat(child))
        elif isinstance(child, RelationReuse):
            setattr(module, name, AxisRelations(child))
        else:
            suit_cpu(child)


class OperatorAttention(nn.Module):
    """`Attention` that leaves the heads to ONNX's operator (opset 23), which needs no transposes for them."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv = attention.qkv
        self.proj = Flat(attention.proj)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), bias (B, h, N, N) or None -> (B, N, D), logits (B, h, N, N)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, N, D)
        mixed, _, _, logits = torch.onnx.ops.attention(
            q,
            k,
            v,
            bias,
            q_num_heads=self.num_heads,
            kv_num_heads=self.num_heads,
            scale=self.head_dim**-0.5,
            qk_matmul_output_mode=2,  # scaled logits plus mask, which is what relation reuse hands on
        )
        return self.proj(mixed), logits


class Flat(nn.Module):
    """A part that looks at single tokens, on a matrix of all of them: there a linear layer is one operator, Gemm, which
    begins with the bias, and not a product and an addition."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D')."""
        y: Tensor = self.part(x.flatten(0, 1))
        return y.reshape(*x.shape[:2], -1)


class AxisRelations(nn.Module):
    """Relation reuse that upsamples queries along one axis of the grid, then along the other. Keys it upsamples as
    before: one product for all queries."""

    axis: Tensor

    def __init__(self, reuse: RelationReuse) -> None:
        super().__init__()
        self.reuse = reuse
        self.num_heads, self.upsample = reuse.num_heads, reuse.upsample
        self.register_buffer("axis", upsample_matrix(reuse.source, reuse.target), persistent=False)  # (G, g)

    def forward(self, relations: Tensor) -> Tensor:
        mixed: Tensor = self.reuse(relations)
        return mixed

    def layer(self, mixed: Tensor, layer: int) -> Tensor:
        """The bias of one layer, (B, h, N, N)."""
        h, N = self.num_heads, len(self.upsample)
        G, g = self.axis.shape
        own = mixed[:, layer * h : (layer + 1) * h]
        class_row, rows = (part @ self.upsample.T for part in (own[:, :, :1], own[:, :, 1:]))  # (B, h, 1 and n, N)
        rows = self.axis @ rows.reshape(-1, h, g, g * N)
        rows = self.axis @ rows.reshape(-1, h, G, g, N)  # (B, h, G, G, N)
        return torch.cat((class_row, rows.reshape(-1, h, G * G, N)), dim=2)
