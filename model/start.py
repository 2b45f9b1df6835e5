"""Weights to begin with: those of a checkpoint, put into a network that need not be the one they come from.

A stage takes the weights of the stage on the same token grid. What the checkpoint does not have, or has in another
shape, begins anew. Of heads that is no surprise: there are other classes. Of anything else it is refused, unless it is
asked for, and then it is told. Whoever reads another kind of file adds a reader here, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import CheckpointError, load_model
from model.config import DVTConfig
from model.dvt import DVT
from model.published import import_checkpoint

NAMED = 4  # of the tensors that a message is about


@dataclass(frozen=True)
class Start:
    """What a file offers."""

    path: Path
    config: DVTConfig  # of the network that the tensors are from
    tensors: Mapping[str, Tensor]  # by the names of our state dict


@dataclass(frozen=True)
class Taken:
    """What became of it: the names of the network's tensors that began anew, and of the file's that found no place."""

    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"begins anew: {_some(self.fresh)}"] if self.fresh else []
        parts += [f"not used: {_some(self.unused)}"] if self.unused else []
        return "; ".join(parts)


def read_start(path: Path) -> Start:
    """A checkpoint of ours, or one that `dvt import` reads. Raises CheckpointError."""
    model, _ = _reader(path)(path)
    return Start(path, model.config, model.state_dict())


def _reader(path: Path) -> Callable[[Path], tuple[DVT, object]]:
    try:
        with path.open("rb") as file:
            magic = file.read(2)
    except OSError:
        magic = b""  # the reader says what is wrong
    # torch.save writes a zip archive, once it was a bare pickle; a file of ours begins with the length of its header.
    return import_checkpoint if magic in (b"PK", b"\x80\x02") else load_model


def take_weights(model: DVT, start: Start, fresh: bool = False) -> Taken:
    """Put what fits into `model`. Raises CheckpointError, by name, where anything but a head would begin anew and
    `fresh` does not allow it."""
    renamed = {_renamed(key, start, model): key for key in start.tensors}
    offered = {name: start.tensors[key] for name, key in renamed.items() if name is not None}
    wanted = model.state_dict()
    fits = {name: offered[name] for name, own in wanted.items() if name in offered and offered[name].shape == own.shape}
    anew = [name for name in wanted if name not in fits]
    if not fresh and (surprising := [name for name in anew if not _of_head(name)]):
        said = _some(_difference(name, offered, wanted) for name in surprising)
        raise CheckpointError(f"{start.path} does not fit: {said}; to begin these anew: --fresh")
    with torch.no_grad():
        model.load_state_dict(fits, strict=False)
    used = {renamed[name] for name in fits}
    return Taken(tuple(anew), tuple(key for key in start.tensors if key not in used))


def _renamed(key: str, start: Start, model: DVT) -> str | None:
    """The same tensor of the stage on the same grid; None where there is no such stage."""
    _, number, name = key.split(".", 2)
    grid = start.config.grids[int(number)]
    grids = model.config.grids
    return f"stages.{grids.index(grid)}.{name}" if grid in grids else None


def _of_head(name: str) -> bool:
    return name.split(".")[2] == "head"


def _difference(name: str, offered: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    if name not in offered:
        return f"it has no {name}"
    return f"{name} has shape {tuple(offered[name].shape)}, wanted is {tuple(wanted[name].shape)}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
