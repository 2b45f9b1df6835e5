"""Small ViTs as timm and Hugging Face write them, and what such a one computes: an independent witness."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, GRID, CLASSES = 32, 2, 2, 48, 12, 4, 4
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
HF_CONFIG = {
    "model_type": "vit", "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "patch_size": PATCH, "image_size": PATCH * GRID, "qkv_bias": True,
}  # fmt: skip
HF_PREPROCESSOR = {
    "do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": STD, "size": {"height": 48, "width": 48},
}  # fmt: skip
TIMM_CONFIG = {
    "architecture": "vit_micro", "num_features": WIDTH, "global_pool": "token", "model_args": {"num_heads": HEADS},
    "pretrained_cfg": {"mean": MEAN, "std": STD, "crop_pct": 1.0, "input_size": [3, 48, 48]},
}  # fmt: skip


def timm(scale: bool = False, classes: int | None = CLASSES, grid: int = GRID, patch: int = PATCH) -> dict[str, Tensor]:
    """A state dict as timm has it, lively enough that every part matters; `scale`: with LayerScale."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int, around: float = 0.0, std: float = 0.2) -> Tensor:
        return around + std * torch.randn(*shape, generator=draw)

    state = {
        "cls_token": some(1, 1, WIDTH, around=0.3),
        "pos_embed": some(1, 1 + grid * grid, WIDTH, around=-0.2),
        "patch_embed.proj.weight": some(WIDTH, 3, patch, patch, std=0.05),
        "patch_embed.proj.bias": some(WIDTH, around=0.1),
        "norm.weight": some(WIDTH, around=1.0),
        "norm.bias": some(WIDTH),
    }
    for layer in range(DEPTH):
        own = {
            "norm1.weight": some(WIDTH, around=1.0), "norm1.bias": some(WIDTH),
            "attn.qkv.weight": some(3 * WIDTH, WIDTH), "attn.qkv.bias": some(3 * WIDTH),
            "attn.proj.weight": some(WIDTH, WIDTH), "attn.proj.bias": some(WIDTH),
            "norm2.weight": some(WIDTH, around=1.0), "norm2.bias": some(WIDTH),
            "mlp.fc1.weight": some(HIDDEN, WIDTH), "mlp.fc1.bias": some(HIDDEN),
            "mlp.fc2.weight": some(WIDTH, HIDDEN), "mlp.fc2.bias": some(WIDTH),
        }  # fmt: skip
        if scale:
            own |= {"ls1.gamma": some(WIDTH, around=0.5), "ls2.gamma": some(WIDTH, around=0.5)}
        state |= {f"blocks.{layer}.{name}": tensor for name, tensor in own.items()}
    if classes is not None:
        state |= {"head.weight": some(classes, WIDTH), "head.bias": some(classes)}
    return state


def hugging_face(state: dict[str, Tensor], prefix: str = "vit.") -> dict[str, Tensor]:
    """The same as Hugging Face has it; with LayerScale as its DINOv2 does, whose layers are named otherwise."""
    dino = any("ls1" in name for name in state)
    inside = {
        "norm1.": "norm1." if dino else "layernorm_before.", "norm2.": "norm2." if dino else "layernorm_after.",
        "attn.proj.": "attention.output.dense.",
        "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1.": "mlp.fc1." if dino else "intermediate.dense.", "mlp.fc2.": "mlp.fc2." if dino else "output.dense.",
    }  # fmt: skip
    outside = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "norm.": "layernorm.",
    }  # fmt: skip
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.match(r"blocks\.(\d+)\.(.*)", name)
        if name.startswith("head."):
            renamed[name.replace("head.", "classifier.")] = tensor
        elif block is None:
            old = next(key for key in outside if name.startswith(key))
            renamed[prefix + name.replace(old, outside[old])] = tensor
        elif block[2].startswith("attn.qkv."):
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                own = block[2].replace("attn.qkv.", f"attention.attention.{part}.")
                renamed[f"{prefix}encoder.layer.{block[1]}.{own}"] = third.clone()
        else:
            old = next(key for key in inside if block[2].startswith(key))
            renamed[f"{prefix}encoder.layer.{block[1]}.{block[2].replace(old, inside[old])}"] = tensor
    return renamed


def saved_vit(folder: Path, state: dict[str, Tensor], config: dict | None = None, more: dict | None = None) -> Path:
    """`state` as safetensors in a folder, with the documents beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in (("config.json", config), ("preprocessor_config.json", more)):
        if document is not None:
            (folder / name).write_text(json.dumps(document))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def in_timm(folder: Path, **changes: Tensor) -> Path:
    return saved_vit(folder, timm() | changes, TIMM_CONFIG)


def answers(state: dict[str, Tensor], images: Tensor, eps: float = 1e-6) -> Tensor:
    """The logits of a ViT in timm's layout, in float64."""
    s = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    patch = s["patch_embed.proj.weight"].shape[-1]
    tokens = F.conv2d(images.double(), s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    x = (
        torch.cat((s["cls_token"].expand(len(images), -1, -1), tokens.flatten(2).transpose(1, 2)), dim=1)
        + s["pos_embed"]
    )
    for layer in range(DEPTH):
        at = f"blocks.{layer}"
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").chunk(3, dim=-1)
        )
        mixed = linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{at}.attn.proj")
        x = x + mixed * s.get(f"{at}.ls1.gamma", 1.0)
        y = linear(F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        x = x + y * s.get(f"{at}.ls2.gamma", 1.0)
    return linear(norm(x[:, 0], "norm"), "head")
