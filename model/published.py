"""Checkpoints of other making, read into ours: the paper's published files, and those of its authors' training script.

Such a file is a pickle, so it is read by PyTorch's restricted unpickler: only tensors, plain containers, numpy arrays
and an `argparse.Namespace` come in, and no code runs. What the file holds decides the configuration (sizes are read
off its tensors), and then every expected tensor has to be there, in its shape, and nothing else.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import CheckpointError
from model.config import VARIANTS, DVTConfig, backbone
from model.dvt import DVT

PREFIXES = ("less_less_token.", "less_token.", "normal_token.")  # coarse to fine; a file of two exits leaves one out
HEAD_DIM = 64  # in every backbone of the paper; a file does not tell it

# Where a state dict may be, best first: of a training run the average, which is what its authors evaluate.
_STATES = ("model_state_dict", "state_dict_ema", "state_dict", "model")

# Ours -> theirs, within one stage.
_NAMES = (
    (re.compile(r"^tokenizer\.performer([12])\."), r"tokens_to_token.attention\1."),
    (re.compile(r"^tokenizer\.project\."), "tokens_to_token.project."),
    (re.compile(r"^tokenizer\.proj\."), "patch_embed.proj."),
    (re.compile(r"^feature_reuse\.(\d+)\.norm\."), r"blocks.\1.feature_resuse_mlp.0."),  # spelled so
    (re.compile(r"^feature_reuse\.(\d+)\.mlp\."), r"blocks.\1.feature_resuse_mlp.1."),
    (re.compile(r"^relation_reuse\.mlp\."), "relation_reuse_conv."),
)


def import_checkpoint(path: Path, **changes: Any) -> tuple[DVT, dict[str, Any]]:
    """The network of a foreign checkpoint, in eval mode, and what else in the file is worth keeping.

    `changes` are configuration fields that the file cannot tell: labels, mean, std, resize.
    Raises CheckpointError, naming the file, the cause, and the tensors in the file's own spelling.
    """
    return from_state(path, *read_state(path), **changes)


def read_state(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor], str]:
    """What a pickle holds, the state dict in it, and the name of the entry that it was found in."""
    document = _read(path)
    return document, *_state_dict(path, document)


def from_state(
    path: Path, document: Mapping[str, Any], found: Mapping[str, Tensor], source: str, **changes: Any
) -> tuple[DVT, dict[str, Any]]:
    """`import_checkpoint`, of what was read already."""
    prefixes = [prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in found)]
    if len(prefixes) < 2:
        raise CheckpointError(
            f"{path}: not a DVT: its tensors do not begin with {', '.join(PREFIXES)} (they are {some(found)})"
        )
    args = document.get("args")
    if isinstance(args, argparse.Namespace):  # the statistics that the training run normalised with
        for field in ("mean", "std"):
            given = getattr(args, field, None)
            if field not in changes and isinstance(given, (list, tuple)) and len(given) == 3:
                changes[field] = tuple(float(v) for v in given)
    try:
        config = _configuration(found, prefixes, changes)
    except KeyError as error:
        raise CheckpointError(f"{path}: missing tensors: {error.args[0]}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    model = DVT(config)
    wanted = model.state_dict()
    theirs = {key: published_key(key, prefixes) for key in wanted}
    if missing := [name for name in theirs.values() if name not in found]:
        raise CheckpointError(f"{path}: missing tensors: {some(missing)}")
    if unexpected := [name for name in found if name not in set(theirs.values())]:
        raise CheckpointError(f"{path}: unexpected tensors: {some(unexpected)}")
    tensors = {}
    for key, name in theirs.items():
        if found[name].shape != wanted[key].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, expected {tuple(wanted[key].shape)}"
            )
        tensors[key] = found[name].to(torch.float32)
        if not tensors[key].isfinite().all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
    model.load_state_dict(tensors)
    return model.eval(), {"imported": {"file": path.name, "from": source, **_kept(document)}}


def published_key(key: str, prefixes: list[str]) -> str:
    """Our name of a tensor -> its published one, as in "less_token.patch_embed.proj.bias"."""
    _, number, name = key.split(".", 2)
    for pattern, replacement in _NAMES:
        name, replaced = pattern.subn(replacement, name)
        if replaced:
            break
    return prefixes[int(number)] + name


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_globals()]):
            document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?i)unsupported (?:global|class) ([\w.]+)|global:? ([\w.]+) was not", str(error))
        what = f"it wants to call {named[1] or named[2]}" if named else "it is no plain pickle of tensors"
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely: {what}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is broken, cut short, or no PyTorch file: {cause}") from None
    if not isinstance(document, Mapping):
        raise CheckpointError(f"{path} holds a {type(document).__name__}, not a dict of tensors")
    return document


def _numpy_globals() -> list[Any]:
    """What numpy's arrays and numbers are pickled with, under its old and its new name."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    functions = [
        (function, f"{module}.multiarray.{function.__name__}")
        for module in ("numpy.core", "numpy._core")
        for function in (multiarray._reconstruct, multiarray.scalar)
    ]
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "uint8", "bool")]
    return [*functions, np.ndarray, np.dtype, *dtypes]


def _state_dict(path: Path, document: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors, and the name of the entry that held them."""
    for name in (*_STATES, ""):
        state = document.get(name) if name else document
        if isinstance(state, Mapping) and state and all(isinstance(v, Tensor) for v in state.values()):
            keys = [str(key) for key in state]
            start = len("module.") if all(key.startswith("module.") for key in keys) else 0
            return {key[start:]: value for key, value in zip(keys, state.values(), strict=True)}, name or "the file"
    raise CheckpointError(f"{path} holds no state dict: expected one of {', '.join(_STATES)}, found {some(document)}")


def _configuration(found: Mapping[str, Tensor], prefixes: list[str], changes: dict[str, Any]) -> DVTConfig:
    """Read off the tensors' shapes. Raises KeyError with the name of a tensor that is not there, ValueError."""
    first, last = prefixes[0], prefixes[-1]
    embed_dim = found[f"{first}cls_token"].shape[-1]
    if embed_dim % HEAD_DIM:
        raise ValueError(f"{first}cls_token has {embed_dim} channels, not a multiple of {HEAD_DIM}")
    grids = []
    for prefix in prefixes:
        positions = found[f"{prefix}pos_embed"].shape[1]
        grid = math.isqrt(max(positions - 1, 0))
        if grid * grid + 1 != positions:
            raise ValueError(f"{prefix}pos_embed has {positions} positions, not a square and one")
        grids.append(grid)
    plain = f"{first}patch_embed.proj.weight" in found
    layers = {int(m.group(1)) for key in found if (m := re.match(re.escape(first) + r"blocks\.(\d+)\.", key))}
    fields: dict[str, Any] = {
        "grids": tuple(grids),
        "qkv_bias": f"{first}blocks.0.attn.qkv.bias" in found,
        "num_classes": found[f"{first}head.weight"].shape[0],
        "feature_reuse": any(".feature_resuse_mlp." in key for key in found),
        "relation_reuse": any(".relation_reuse_conv." in key for key in found),
    }
    if fields["feature_reuse"]:
        hidden = found[f"{last}blocks.0.feature_resuse_mlp.1.fc2.weight"].shape
        fields |= {"reuse_dim": hidden[0], "reuse_hidden": hidden[1]}
    config = backbone(
        "",
        "patch" if plain else "t2t",
        embed_dim,
        max(layers, default=0) + 1,
        found[f"{first}blocks.0.mlp.fc1.weight"].shape[0],
        **fields,
        **changes,
    )
    return replace(config, name=name_of(config))


def name_of(config: DVTConfig) -> str:
    for known in VARIANTS.values():
        if all(getattr(known, f) == getattr(config, f) for f in ("tokenizer", "embed_dim", "depth", "mlp_hidden")):
            return known.name
    return f"{config.tokenizer}-{config.embed_dim}x{config.depth}"


def _kept(document: Mapping[str, Any]) -> dict[str, Any]:
    """Thresholds and costs that a published file brings along, as lists for JSON."""
    kept = {}
    for name in ("flops", "dynamic_threshold", "anytime_classification", "budgeted_batch_classification"):
        value = _plain(document.get(name))
        if isinstance(value, list):
            kept[name] = value
    return kept


def _plain(value: Any) -> Any:
    """Lists of numbers for tensors, arrays and lists of such."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def some(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
