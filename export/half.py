"""A stage in half precision, for GPUs. Done on the exported copy, never on the trained model.

Every cast is an operator of the graph: TensorRT 11 takes the types as they stand there, and has no flags for precision.
In fp32 stay
- the tokeniser: T2T's performer multiplies by 2^27, beyond fp16, and in bf16 its sums are off by a percent;
- every LayerNorm: a sum of squares over hundreds of channels passes fp16's largest number, 65504, where values do 15;
- the last norm, the head, the softmax and the confidence, which thresholds judge to a thousandth.
The residual stream, attention, MLPs, both reuses and the state between stages are in half.

Attention stays as it is written in `model.layers`: TensorRT's parser takes the operator only with one output, and the
logits are wanted, too. Its shapes are those of `export.aligned`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from model.stage import Stage

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def halve(stage: Stage, dtype: torch.dtype) -> None:
    """Rebuild the stage in place, so that it computes in `dtype` what may be computed in it."""
    _halve(stage, dtype, wide=("tokenizer", "norm", "head"))
    stage.tokenizer = Rounding(stage.tokenizer, dtype)
    stage.norm = Widening(stage.norm)  # type: ignore[assignment]


def _halve(module: nn.Module, dtype: torch.dtype, wide: Sequence[str] = ()) -> None:
    """Weights and buffers, but for those of norms and of the children named in `wide`."""
    for name, child in module.named_children():
        if name in wide:
            continue
        if isinstance(child, nn.LayerNorm):
            setattr(module, name, Rounding(Widening(child), dtype))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, Pointwise(child, dtype))
        else:
            _halve(child, dtype)
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(dtype))


class Widening(nn.Module):
    """A part in fp32 that is given half."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x.float())
        return y


class Rounding(nn.Module):
    """A part in fp32 whose result is rounded to half."""

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.part = part
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        return y.to(self.dtype)


class Pointwise(nn.Module):
    """A 1x1 convolution as a matrix product: ONNX knows convolutions of bfloat16 only from opset 22 on."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        assert conv.kernel_size == (1, 1)
        assert conv.bias is not None
        G = conv.groups
        self.register_buffer("weight", conv.weight.detach().reshape(G, -1, conv.in_channels // G).to(dtype))
        self.register_buffer("bias", conv.bias.detach().reshape(G, -1, 1).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        B, C, H, W = x.shape
        G = len(self.weight)
        y = self.weight @ x.reshape(B, G, C // G, H * W) + self.bias  # (B, G, C' / G, H * W)
        return y.reshape(B, -1, H, W)
