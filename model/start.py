"""Weights to begin with: those of a checkpoint, put into a network that need not be the one they come from.

A stage takes the weights of the stage on the same token grid, or on the nearest, resampled; a ViT of a single grid, of
whatever making, begins every stage (`model.resample`). What the checkpoint does not have, or has in another shape,
begins anew. Of heads that is no surprise: there are other classes. Of anything else it is refused, unless it is asked
for, and then it is told. Whoever reads another kind of file adds a reader here, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint import CheckpointError, load_model, under
from model.config import DVTConfig
from model.dvt import DVT
from model.published import PREFIXES, from_state, read_state
from model.resample import cascade_of, grown, nearest_grid, resampled
from model.vit import WEIGHTS, is_vit, read_safetensors, vit_from

NAMED = 4  # of the tensors that a message is about


@dataclass(frozen=True)
class Start:
    """What a file offers."""

    path: Path
    config: DVTConfig  # of the network that the tensors are from
    tensors: Mapping[str, Tensor]  # by the names of our state dict
    notes: tuple[str, ...] = ()  # what was assumed of it or left out
    becomes: DVTConfig | None = None  # what is made of it unless another is asked for; by default the same network


@dataclass(frozen=True)
class Taken:
    """What became of it: the names of the network's tensors that began anew, and of the file's that found no place."""

    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()  # the start's, and which stages were resampled

    def __str__(self) -> str:
        parts = [f"begins anew: {_some(self.fresh)}"] if self.fresh else []
        parts += [f"not used: {_some(self.unused)}"] if self.unused else []
        return "; ".join((*self.notes, *parts))


def read_start(path: Path, heads: int | None = None) -> Start:
    """A checkpoint of ours, one that `dvt import` reads, or a plain ViT of timm's or Hugging Face's making (also the
    folder that such a one is saved as); `heads` are the ViT's, where nothing beside it tells. Raises CheckpointError.
    """
    if path.is_dir():
        path = _weights_in(path)
    if _pickled(path):
        document, found, source = read_state(path)
        if any(name.startswith(PREFIXES) for name in found) or not is_vit(found):
            model, _ = from_state(path, document, found, source)
            return Start(path, model.config, model.state_dict())
    elif is_vit(_foreign(path)):
        found = read_safetensors(path)
    else:
        model, _ = load_model(path)
        return Start(path, model.config, model.state_dict())
    vit = vit_from(path, found, heads)
    return Start(path, vit.config, vit.tensors, vit.notes, cascade_of(vit.config))


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no {' and no '.join(WEIGHTS)}")


def _pickled(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            magic = file.read(2)
    except OSError:
        magic = b""  # the reader says what is wrong
    # torch.save writes a zip archive, once it was a bare pickle; a file of ours begins with the length of its header.
    return magic in (b"PK", b"\x80\x02")


def _foreign(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file that is none of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            return [] if "dvt" in (file.metadata() or {}) else list(file.keys())
    except (SafetensorError, OSError):
        return []


def take_weights(model: DVT, start: Start, fresh: bool = False) -> Taken:
    """Put what fits into `model`. Raises CheckpointError, by name, where anything but a head would begin anew and
    `fresh` does not allow it."""
    wanted = model.state_dict()
    notes = list(start.notes)
    if _grows(start.config, model.config):
        renamed: dict[str, str | None] = {key: key for key in start.tensors}
        offered = grown(start.tensors, model.config, wanted)
    else:
        renamed = {key: _renamed(key, start, model) for key in start.tensors}
        offered = {name: start.tensors[key] for key, name in renamed.items() if name is not None}
        for number, grid in enumerate(model.config.grids):
            if grid not in start.config.grids:
                near = nearest_grid(grid, start.config.grids)
                source, target = f"stages.{start.config.grids.index(near)}.", f"stages.{number}."
                found = resampled(under(start.tensors, source), model.config, number, under(wanted, target))
                offered |= {target + name: tensor for name, tensor in found.items()}
                renamed |= {source + name: renamed[source + name] or target + name for name in found}
                notes.append(f"the stage on {grid}x{grid} tokens begins as that on {near}x{near}, resampled")
    offered = {
        name: tensor
        for name, found in offered.items()
        if (tensor := _reordered(found, start.config.labels, model.config.labels) if _of_head(name) else found)
        is not None
    }
    fits = {name: offered[name] for name, own in wanted.items() if name in offered and offered[name].shape == own.shape}
    anew = [name for name in wanted if name not in fits]
    if not fresh and (surprising := [name for name in anew if not _of_head(name)]):
        said = _some(_difference(name, offered, wanted) for name in surprising)
        raise CheckpointError(f"{start.path} does not fit: {said}; to begin these anew: --fresh")
    with torch.no_grad():
        model.load_state_dict(fits, strict=False)
    return Taken(tuple(anew), tuple(key for key, name in renamed.items() if name not in fits), tuple(notes))


def _grows(source: DVTConfig, target: DVTConfig) -> bool:
    """Whether a ViT of a single grid becomes a network of other grids, or for another size of images."""
    alone = source.num_stages == 1 and source.tokenizer == "patch"
    return alone and not target.ablates and (source.grids, source.image_size) != (target.grids, target.image_size)


def _renamed(key: str, start: Start, model: DVT) -> str | None:
    """The same tensor of the stage on the same grid; None where there is no such stage."""
    _, number, name = key.split(".", 2)
    grid = start.config.grids[int(number)]
    grids = model.config.grids
    return f"stages.{grids.index(grid)}.{name}" if grid in grids else None


def _reordered(head: Tensor, theirs: tuple[str, ...], ours: tuple[str, ...]) -> Tensor | None:
    """A head's tensor in the order of our classes; None where it knows others. Where names are missing on one side,
    and for ImageNet's numbers, whose order is that of its classes, as many classes are the same classes."""
    if len(theirs) != len(ours) or theirs == ours:
        return head
    if set(theirs) == set(ours):
        return head[[theirs.index(name) for name in ours]]
    return head if all(re.fullmatch(r"n\d{8}", name) for name in ours) else None


def _of_head(name: str) -> bool:
    return name.split(".")[2] == "head"


def _difference(name: str, offered: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    if name not in offered:
        return f"it has no {name}"
    return f"{name} has shape {tuple(offered[name].shape)}, wanted is {tuple(wanted[name].shape)}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
