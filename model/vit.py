"""Plain ViTs of other making, read into ours as a backbone of one stage: timm's layout of ViT, DeiT and DINOv2, and
Hugging Face's.

Sizes are read off the tensors. What tensors do not tell (heads, epsilon, activation, how images are normalised) is
taken from the `config.json` and `preprocessor_config.json` beside the file, in either making; what is not there is
assumed, and told. What such a file has and ours does not compute is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import CheckpointError
from model.config import IMAGENET_MEAN, IMAGENET_STD, DVTConfig
from model.dvt import DVT
from model.published import name_of, some

HEAD_DIM = 64  # in nearly all ViTs
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder as these libraries save it

# Hugging Face's names -> timm's, behind the name of the model that all of them may begin with.
_MODELS = ("vit.", "deit.", "dinov2.")
_NAMES = (
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.mask_token$", "mask_token"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(norm[12]|mlp\.\w+)\.", r"blocks.\1.\2."),
    (r"layernorm\.", "norm."),
    (r"classifier\.", "head."),
)

# What ours does not compute, by timm's names.
_REFUSED = (
    (r"dist_token$|head_dist\.|cls_classifier\.|distillation_classifier\.", "it has a distillation token"),
    (r"reg_token$|register_tokens$|storage_tokens$", "it has register tokens"),
    (r"blocks\.\d+\.mlp\.(w12|w3|weights_in|weights_out|w1|w2|fc1_g|fc1_x)\.", "its MLPs are gated (SwiGLU)"),
    (r"blocks\.\d+\.attn\.[qk]_norm\.", "it normalises queries and keys"),
    (r"blocks\.\d+\.(attn|mlp)\.norm\.", "it has norms inside its blocks' branches"),
    (r"norm_pre\.|patch_embed\.norm\.", "it has a norm in front of its blocks"),
    (r"fc_norm\.", "it averages its tokens where ours reads the class token"),
    (r"attn_pool\.", "it pools its tokens by attention"),
)

# What may be there and is not needed: a token of pre-training, and what a model without a classifier ends in.
_IGNORED = re.compile(r"mask_token$|pooler\.|pre_logits\.")


@dataclass(frozen=True)
class Vit:
    """One stage on one grid, by the names of our state dict, and what was assumed of it or left out, one line each."""

    config: DVTConfig
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def is_vit(names: Any) -> bool:
    """Whether tensors of these names are a ViT's, or something like one."""
    return any(re.search(r"(^|\.)(patch_embed\.|patch_embeddings\.)", str(name)) for name in names)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def vit_from(path: Path, tensors: Mapping[str, Tensor], heads: int | None = None) -> Vit:
    """The ViT whose state dict was found in `path`. Raises CheckpointError, in one line, for what cannot be taken."""
    try:
        return _vit(tensors, _Beside.of(path.parent), heads)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


@dataclass(frozen=True)
class _Beside:
    """What the files beside the weights tell, {} where there are none."""

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> _Beside:
        return cls(*(_document(folder / name) for name in (CONFIG, PREPROCESSOR)))

    def number(self, name: str, kind: type[int] | type[float]) -> Any:
        value = self.config.get(name)
        if value is None or (type(value) in (int, kind) and 0 < value < 1e9):
            return value
        raise ValueError(f"{CONFIG}: {name} is {_shown(value)}, no such number")


def _document(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} beside it cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} beside it holds no object")
    return value


def _vit(found: Mapping[str, Tensor], beside: _Beside, heads: int | None) -> Vit:
    notes: list[str] = []
    theirs = {_timm_name(name): name for name in found}  # to tell what is wrong in the file's own spelling
    tensors = {name: found[own] for name, own in theirs.items()}
    for pattern, why in _REFUSED:
        if named := [theirs[name] for name in tensors if re.match(pattern, name)]:
            raise ValueError(f"{why}, which is not computed here ({some(named)})")
    ignored = [name for name in tensors if _IGNORED.match(name)]
    if ignored:
        notes.append(f"not used: {some(theirs[name] for name in ignored)}")
    behind_more = any(name.startswith("pre_logits.") for name in ignored)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{theirs[name]} holds {tensor.dtype}, no weights")
        if not tensor.isfinite().all():
            raise ValueError(f"{theirs[name]} holds values that are not finite")
    tensors = _one_qkv({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    _check_settings(beside)
    config = _configuration(tensors, beside, heads, notes)
    if behind_more or not _head_fits(tensors, config):
        dropped = [name for name in tensors if name.startswith("head.")]
        if dropped:
            notes.append("its head is left out: it reads more than the class token")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    tensors = _folded(tensors)
    if config.labels and "head.weight" not in tensors:
        config = replace(config, labels=())
    if "cls_token" in tensors and tensors["pos_embed"].shape[1] == config.grids[0] ** 2:  # DeiT-III: none for that
        tensors["pos_embed"] = torch.cat((torch.zeros(1, 1, config.embed_dim), tensors["pos_embed"]), dim=1)
    return Vit(config, _ours(tensors, config, theirs), tuple(notes))


def _timm_name(name: str) -> str:
    for start in _MODELS:
        name = name.removeprefix(start)
    for pattern, replacement in _NAMES:
        name, replaced = re.subn("^" + pattern, replacement, name)
        if replaced:
            break
    return name


def _one_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one matrix, and one bias, as timm has them."""
    joined = dict(tensors)
    for name in tensors:
        if match := re.match(r"(blocks\.\d+\.attn)\.query\.(weight|bias)$", name):
            parts = [f"{match[1]}.{part}.{match[2]}" for part in ("query", "key", "value")]
            if missing := [part for part in parts if part not in joined]:
                raise ValueError(f"missing tensors: {some(missing)}")
            joined[f"{match[1]}.qkv.{match[2]}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LayerScale, a factor on each channel of a branch (Touvron et al., 2021), in the layer that the branch ends in."""
    folded = dict(tensors)
    for name in tensors:
        if match := re.match(r"(blocks\.\d+)\.ls([12])\.gamma$", name):
            gamma = folded.pop(name)
            last = f"{match[1]}.{'attn.proj' if match[2] == '1' else 'mlp.fc2'}"
            for part in (f"{last}.weight", f"{last}.bias"):
                if part not in folded or folded[part].shape[:1] != gamma.shape:
                    raise ValueError(f"{name} does not fit {part}")
                folded[part] = folded[part] * gamma.reshape(-1, *[1] * (folded[part].ndim - 1))
    return folded


def _check_settings(beside: _Beside) -> None:
    """Raises ValueError, by name, for settings of a function that is not ours."""
    config = beside.config
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise ValueError(f"{CONFIG}: hidden_act is {_shown(activation)}, computed here is gelu, the erf form, alone")
    if "quickgelu" in str(config.get("architecture")):
        raise ValueError(f"{CONFIG}: architecture {_shown(config['architecture'])}: its activation is not the erf form")
    if (pool := config.get("global_pool", "token")) not in ("token", ""):
        raise ValueError(f"{CONFIG}: global_pool is {_shown(pool)}, ours reads the class token")
    if config.get("use_swiglu_ffn"):
        raise ValueError(f"{CONFIG}: use_swiglu_ffn: gated MLPs are not computed here")
    args = config.get("model_args")
    for name in ("act_layer", "norm_layer", "mlp_layer") if isinstance(args, dict) else ():
        if name in args:  # type: ignore[operator]
            raise ValueError(f"{CONFIG}: model_args has {name}, computed here is the default alone")


def _configuration(tensors: Mapping[str, Tensor], beside: _Beside, heads: int | None, notes: list[str]) -> DVTConfig:
    for needed, ndim in (("cls_token", 3), ("pos_embed", 3), ("patch_embed.proj.weight", 4)):
        if needed not in tensors:
            raise ValueError(f"it has no {needed}, nothing of that meaning")
        if tensors[needed].ndim != ndim:
            raise ValueError(f"{needed} has shape {tuple(tensors[needed].shape)}")
    width, channels, patch, across = tensors["patch_embed.proj.weight"].shape
    if channels != 3:
        raise ValueError(f"its patches have {channels} channels, images here have 3")
    if patch != across:
        raise ValueError(f"its patches are {patch} x {across} pixels, not square")
    grid = _grid(tensors["pos_embed"].shape[1])
    layers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    if "blocks.0.mlp.fc1.weight" not in tensors:
        raise ValueError("it has no blocks.0.mlp.fc1.weight, nothing of that meaning")
    side = grid * patch
    _check_sizes(beside, width, len(layers), patch, side)
    config = DVTConfig(
        name="",
        image_size=side,
        grids=(grid,),
        tokenizer="patch",
        embed_dim=width,
        depth=max(layers) + 1,
        num_heads=_heads(width, heads, beside, notes),
        mlp_hidden=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        norm_eps=_epsilon(beside, notes),
        num_classes=len(tensors["head.weight"]) if "head.weight" in tensors else 1,
        **_preprocessing(beside, side, notes),
    )
    return replace(config, name=name_of(config), labels=_labels(beside, config.num_classes))


def _grid(positions: int) -> int:
    """With or without one for the class token. No square and its successor are both squares but 0 and 1."""
    for tokens in (positions - 1, positions):
        if tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
            return math.isqrt(tokens)
    raise ValueError(f"pos_embed has {positions} positions, not those of a square and the class token")


def _check_sizes(beside: _Beside, width: int, depth: int, patch: int, side: int) -> None:
    told = {"hidden_size": width, "num_features": width, "num_hidden_layers": depth, "patch_size": patch}
    for name, found in {**told, "image_size": side}.items():
        value = beside.config.get(name)
        if isinstance(value, int) and value != found:
            raise ValueError(f"{CONFIG}: {name} is {value}, but the tensors say {found}")


def _heads(width: int, heads: int | None, beside: _Beside, notes: list[str]) -> int:
    args = beside.config.get("model_args")
    if heads is None:
        heads = beside.number("num_attention_heads", int)
    if heads is None and isinstance(args, dict) and isinstance(args.get("num_heads"), int):
        heads = args["num_heads"]
    if heads is None:
        if width % HEAD_DIM:
            raise ValueError(f"its {width} channels are no multiple of {HEAD_DIM}: tell its heads with --heads")
        heads = width // HEAD_DIM
        notes.append(f"assumed: {heads} heads, {HEAD_DIM} channels wide (--heads)")
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide its {width} channels")
    return heads


def _epsilon(beside: _Beside, notes: list[str]) -> float:
    if (told := beside.number("layer_norm_eps", float)) is not None:
        return float(told)
    if "architecture" not in beside.config:  # timm's all have it
        notes.append("assumed: an epsilon of 1e-6 in its norms")
    return 1e-6


def _preprocessing(beside: _Beside, side: int, notes: list[str]) -> dict[str, Any]:
    """Mean, std and resize."""
    timm = beside.config.get("pretrained_cfg")
    timm = timm if isinstance(timm, dict) else {}
    theirs = beside.preprocessor
    mean, std = (timm.get(name, theirs.get(f"image_{name}")) for name in ("mean", "std"))
    if theirs.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = theirs.get("rescale_factor", 1 / 255)
    scaled = type(factor) is float and abs(factor - 1 / 255) < 1e-5
    if theirs.get("do_rescale") is False or not scaled:
        raise ValueError(f"{PREPROCESSOR}: pixels are not scaled to 0 to 1 there, as they are here")
    if mean is None or std is None:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        notes.append("assumed: images normalised with ImageNet's mean and std (--mean, --std)")
    for name, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, list | tuple) and all(type(v) in (int, float) and abs(v) < 1e9 for v in values)
        if not numbers or len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ValueError(f"the {name} of its images is {_shown(values)}, not three numbers")
    return {
        "mean": tuple(map(float, mean)),
        "std": tuple(map(float, std)),
        "resize": _resize(timm, theirs, side, notes),
    }


def _resize(timm: Mapping[str, Any], theirs: Mapping[str, Any], side: int, notes: list[str]) -> int:
    """The short side before the centre crop."""
    share = timm.get("crop_pct")
    if isinstance(share, int | float) and 0 < share <= 1:
        return max(side, math.floor(side / share))
    size = theirs.get("size")
    if theirs.get("do_resize") is False or isinstance(size, int):
        return side
    if isinstance(size, dict):
        short, crop = size.get("shortest_edge"), theirs.get("crop_size")
        crop = crop.get("height") if isinstance(crop, dict) else crop
        if isinstance(short, int) and isinstance(crop, int) and 0 < crop <= short:
            return max(side, round(side * short / crop))  # the crop may be another than the position embedding's
        return side
    notes.append("assumed: images resized to 8/7 of the crop")
    return side * 8 // 7


def _labels(beside: _Beside, classes: int) -> tuple[str, ...]:
    """The names of its classes; none where they are only numbered."""
    names = beside.config.get("id2label")
    if not isinstance(names, dict) or len(names) != classes:
        return ()
    labels = tuple(str(names.get(str(number), "")) for number in range(classes))
    plain = not all(labels) or all(label == f"LABEL_{number}" for number, label in enumerate(labels))
    return () if plain or len(set(labels)) != classes else labels


def _head_fits(tensors: Mapping[str, Tensor], config: DVTConfig) -> bool:
    return "head.weight" not in tensors or tensors["head.weight"].shape == (config.num_classes, config.embed_dim)


def _ours(tensors: Mapping[str, Tensor], config: DVTConfig, theirs: Mapping[str, str]) -> dict[str, Tensor]:
    """By our names; every tensor that our backbone has, in its shape, and no other."""
    wanted = {
        name.removeprefix("stages.0.").replace("tokenizer.proj", "patch_embed.proj"): tensor.shape
        for name, tensor in DVT(replace(config, labels=())).state_dict().items()
    }
    optional = ("head.weight", "head.bias")
    if missing := [name for name in wanted if name not in tensors and name not in optional]:
        raise ValueError(f"missing tensors: {some(missing)}")
    if unexpected := [theirs.get(name, name) for name in tensors if name not in wanted]:
        raise ValueError(f"unexpected tensors: {some(unexpected)}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            told = theirs.get(name, name)
            raise ValueError(f"{told} has shape {tuple(tensor.shape)}, expected {tuple(wanted[name])}")
    return {f"stages.0.{name.replace('patch_embed.proj', 'tokenizer.proj')}": value for name, value in tensors.items()}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
