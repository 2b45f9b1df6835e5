"""Checkpoints: safetensors with a JSON header. No pickle, so reading one never runs code.

A file holds tensors under prefixes ("model.", and in a resumable one also "live.", "optimizer.") and one metadata
entry, "dvt", a JSON object with the configuration and whatever a training run wants back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import DVTConfig
from model.dvt import DVT


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one of this model. The message names the file and the cause."""


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write all or nothing: a run that dies while saving leaves the file before. Raises OSError."""
    temporary = path.with_suffix(".partial")
    try:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"dvt": json.dumps(header)}
        )
    except SafetensorError as error:  # a full disk, too
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from None
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["dvt"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is not a DVT checkpoint: {error}") from error
    if not isinstance(header, dict) or not all(
        isinstance(header.get(name, {}), dict) for name in ("config", "imported")
    ):
        raise CheckpointError(f"{path} is not a DVT checkpoint: its header has no members")
    return tensors, header


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def save_model(path: Path, model: DVT, **header: Any) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    save_tensors(path, tensors, {"config": model.config.to_dict(), **header})


def load_model(path: Path) -> tuple[DVT, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on the CPU, and the file's header. Raises CheckpointError."""
    tensors, header = load_tensors(path)
    try:
        config = DVTConfig.from_dict(header["config"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: unusable configuration: {error}") from error
    model = DVT(config)
    found, wanted = under(tensors, "model."), model.state_dict()
    if missing := sorted(set(wanted) - set(found)):
        raise CheckpointError(f"{path}: missing tensors: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}")
    if unexpected := sorted(set(found) - set(wanted)):
        raise CheckpointError(
            f"{path}: unexpected tensors: {', '.join(unexpected[:5])}{' …' if len(unexpected) > 5 else ''}"
        )
    for key, value in wanted.items():
        if found[key].shape != value.shape:
            raise CheckpointError(f"{path}: {key} has shape {tuple(found[key].shape)}, expected {tuple(value.shape)}")
    with torch.no_grad():
        model.load_state_dict(found)
    return model.eval(), header
