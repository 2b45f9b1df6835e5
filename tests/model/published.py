"""The published checkpoint layout and its forward pass, written a second time, from the description alone.

Nothing of `model` is used here: tensors are read by the published names, and every step is the plainest form of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PREFIXES = {7: "less_less_token", 10: "less_token", 14: "normal_token"}
SOFT_SPLITS = {7: (14, 8, 3), 10: (11, 6, 5), 14: (7, 4, 2)}
PATCHES = {7: (32, 0), 10: (23, 3), 14: (16, 0)}


@dataclass(frozen=True)
class Layout:
    kind: str  # "t2t" or "deit"
    dim: int
    depth: int
    hidden: int
    classes: int = 1000
    grids: tuple[int, ...] = (7, 10, 14)
    features: bool = True
    relations: bool = True

    @property
    def heads(self) -> int:
        return self.dim // 64

    def shapes(self) -> dict[str, tuple[int, ...]]:
        D, H, maps = self.dim, self.hidden, self.heads * self.depth
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, out: int, into: int, bias: bool = True) -> None:
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        def norm(name: str, size: int) -> None:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

        for stage, grid in enumerate(self.grids):
            p = PREFIXES[grid]
            shapes[f"{p}.cls_token"] = (1, 1, D)
            shapes[f"{p}.pos_embed"] = (1, grid * grid + 1, D)
            norm(f"{p}.norm", D)
            linear(f"{p}.head", self.classes, D)
            for layer in range(self.depth):
                b = f"{p}.blocks.{layer}"
                wide = D + (48 if stage and self.features else 0)
                norm(f"{b}.norm1", D)
                linear(f"{b}.attn.qkv", 3 * D, D, bias=self.kind == "deit")
                linear(f"{b}.attn.proj", D, D)
                norm(f"{b}.norm2", wide)
                linear(f"{b}.mlp.fc1", H, wide)
                linear(f"{b}.mlp.fc2", D, H)
                if stage and self.features:
                    norm(f"{b}.feature_resuse_mlp.0", D)
                    linear(f"{b}.feature_resuse_mlp.1.fc1", 128, D)
                    linear(f"{b}.feature_resuse_mlp.1.fc2", 48, 128)
            if stage and self.relations:
                for n, (out, into) in (("0", (3 * maps, maps)), ("2", (maps, 3 * maps))):
                    shapes[f"{p}.relation_reuse_conv.{n}.weight"] = (out, into, 1, 1)
                    shapes[f"{p}.relation_reuse_conv.{n}.bias"] = (out,)
            if self.kind == "deit":
                k, _ = PATCHES[grid]
                shapes[f"{p}.patch_embed.proj.weight"] = (D, 3, k, k)
                shapes[f"{p}.patch_embed.proj.bias"] = (D,)
                continue
            linear(f"{p}.tokens_to_token.project", D, 576)
            for n, into in (("1", 3 * SOFT_SPLITS[grid][0] ** 2), ("2", 576)):
                a = f"{p}.tokens_to_token.attention{n}"
                shapes[f"{a}.w"] = (32, 64)
                linear(f"{a}.kqv", 192, into)
                linear(f"{a}.proj", 64, 64)
                norm(f"{a}.norm1", into)
                norm(f"{a}.norm2", 64)
                linear(f"{a}.mlp.0", 64, 64)
                linear(f"{a}.mlp.2", 64, 64)
        return shapes

    def random(self, seed: int = 0) -> dict[str, Tensor]:
        """Weights of ordinary size: neither does anything vanish, nor does the softmax saturate."""
        torch.manual_seed(seed)
        tensors = {}
        for name, shape in self.shapes().items():
            if len(shape) > 1 and not name.endswith(("cls_token", "pos_embed", ".w")):
                tensors[name] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
            elif "norm" in name or "feature_resuse_mlp.0" in name:
                tensors[name] = torch.randn(shape) * 0.2 + (1.0 if name.endswith("weight") else 0.0)
            elif name.endswith(".w"):
                tensors[name] = torch.nn.init.orthogonal_(torch.empty(shape)) * math.sqrt(32)
            else:
                tensors[name] = torch.randn(shape) * 0.2
        return tensors


def forward(layout: Layout, tensors: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Normalised images (B, 3, 224, 224) -> logits of every exit."""
    eps = 1e-6 if layout.kind == "deit" else 1e-5
    B, D, h, L = len(images), layout.dim, layout.heads, layout.depth
    exits: list[Tensor] = []
    before: tuple[int, Tensor, list[Tensor]] | None = None  # grid, features, softmax inputs of every layer
    for grid in layout.grids:
        p = PREFIXES[grid]

        def linear(x: Tensor, name: str, p: str = p) -> Tensor:
            return F.linear(x, tensors[f"{p}.{name}.weight"], tensors.get(f"{p}.{name}.bias"))

        def norm(x: Tensor, name: str, eps: float = eps, p: str = p) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], tensors[f"{p}.{name}.weight"], tensors[f"{p}.{name}.bias"], eps)

        def performer(x: Tensor, name: str, p: str = p) -> Tensor:
            k, q, v = linear(norm(x, f"{name}.norm1", 1e-5), f"{name}.kqv").split(64, dim=-1)
            w = tensors[f"{p}.{name}.w"]
            kf, qf = (torch.exp(t @ w.T - t.square().sum(-1, keepdim=True) / 2) / math.sqrt(32) for t in (k, q))
            total = torch.einsum("bti,bi->bt", qf, kf.sum(dim=1)) + 1e-8
            y = torch.einsum("bti,bid->btd", qf, torch.einsum("btd,bti->bid", v, kf)) / total[..., None]
            y = v + linear(y, f"{name}.proj")
            z = F.gelu(linear(norm(y, f"{name}.norm2", 1e-5), f"{name}.mlp.0"))
            return y + linear(z, f"{name}.mlp.2")

        if layout.kind == "deit":
            kernel, padding = PATCHES[grid]
            weight, bias = (tensors[f"{p}.patch_embed.proj.{n}"] for n in ("weight", "bias"))
            x = F.conv2d(images, weight, bias, stride=kernel, padding=padding).flatten(2).transpose(1, 2)
        else:
            kernel, stride, padding = SOFT_SPLITS[grid]
            x = F.unfold(images, kernel, stride=stride, padding=padding).transpose(1, 2)
            for n in ("1", "2"):
                x = performer(x, f"tokens_to_token.attention{n}")
                side = math.isqrt(x.shape[1])
                x = F.unfold(x.transpose(1, 2).reshape(B, 64, side, side), 3, stride=2, padding=1).transpose(1, 2)
            x = linear(x, "tokens_to_token.project")
        x = torch.cat((tensors[f"{p}.cls_token"].expand(B, -1, -1), x), dim=1) + tensors[f"{p}.pos_embed"]

        biases: list[Tensor] = []
        if before is not None and layout.relations:
            coarse, _, maps = before
            stacked = torch.cat(maps, dim=1)
            for n in ("0", "2"):
                weight, bias = (tensors[f"{p}.relation_reuse_conv.{n}.{what}"] for what in ("weight", "bias"))
                stacked = F.conv2d(F.gelu(stacked) if n == "2" else stacked, weight, bias)
            biases = list(_upsample_both(stacked, coarse, grid).split(h, dim=1))
        handed_on: list[Tensor] = []
        for layer in range(L):
            b = f"blocks.{layer}"
            q, k, v = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").split(D, dim=-1)
            q, k, v = (t.reshape(B, -1, h, 64).transpose(1, 2) for t in (q, k, v))
            logits = q @ k.transpose(-2, -1) * 64**-0.5
            if biases:
                logits = logits + biases[layer]
            handed_on.append(logits)
            x = x + linear((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, -1, D), f"{b}.attn.proj")
            wide = x
            if before is not None and layout.features:
                coarse, source, _ = before
                z = norm(source, f"{b}.feature_resuse_mlp.0")
                z = linear(F.gelu(linear(z, f"{b}.feature_resuse_mlp.1.fc1")), f"{b}.feature_resuse_mlp.1.fc2")
                z = z[:, 1:].transpose(1, 2).reshape(B, 48, coarse, coarse)
                z = _resize(z, grid).flatten(2).transpose(1, 2)
                wide = torch.cat((x, torch.cat((torch.zeros(B, 1, 48), z), dim=1)), dim=-1)
            x = x + linear(F.gelu(linear(norm(wide, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        before = (grid, x, handed_on)
        exits.append(linear(norm(x, "norm")[:, 0], "head"))
    return exits


def _resize(x: Tensor, grid: int) -> Tensor:
    between = 14 if grid == 10 else 20
    return F.adaptive_avg_pool2d(F.interpolate(x, size=(between, between), mode="nearest"), (grid, grid))


def _upsample_both(x: Tensor, coarse: int, grid: int) -> Tensor:
    """(B, C, 1+n, 1+n) -> (B, C, 1+N, 1+N): over keys, then over queries."""
    for _ in range(2):
        maps = x[..., 1:].reshape(-1, 1, coarse, coarse)
        fine = _resize(maps, grid).reshape(*x.shape[:-1], grid * grid)
        x = torch.cat((x[..., :1], fine), dim=-1).transpose(2, 3)
    return x
