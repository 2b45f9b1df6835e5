"""Stages on another token grid than the one that they learnt on: a ViT of one grid grown into a cascade, every stage of
which begins as that ViT, resampled to its own grid; or a stage of a cascade, resampled to a grid that is new in it.

Patches are resized by the pseudo-inverse (Beyer et al., "FlexiViT: One Model for All Patch Sizes", 2023), position
embeddings interpolated, blocks copied. Where a ViT grows, reuse begins without effect: what closes its MLPs is zero. So
the first forward of each stage is that of the resampled ViT alone. A stage of a cascade keeps its reuse, whose weights
know no grid.

For that, norm2 has to see through the C channels that feature reuse adds to D, which are zero at first. They would
shift the mean; but nobody reads the mean of a token, all that read tokens are LayerNorms, so it can be taken out of all
that writes them (as in Ashkboos et al., "SliceGPT", 2024). Then only the variance is smaller, D / (D + C) of what it
was, and a factor on norm2's weight makes up for it. (Not for its epsilon; but tokens vary far more.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DVTConfig

_WRITES_TOKENS = re.compile(r"(tokenizer\.proj|attn\.proj|mlp\.fc2)\.(weight|bias)$|(cls_token|pos_embed)$")
_IS_PATCHES = re.compile(r"tokenizer\.(proj|layers\.6)\.weight$")  # of plain patches, and behind a convolutional stem
_CLOSES_REUSE = re.compile(r"feature_reuse\.\d+\.mlp\.fc2\.|relation_reuse\.mlp\.2\.")


def grid_ladder(grid: int) -> tuple[int, ...]:
    """Grids of a cascade whose last stage has `grid` tokens a side: half of them, half as many in all, and those.
    14 gives the paper's 7, 10, 14."""
    return tuple(sorted({max(1, round(grid * share)) for share in (0.5, math.sqrt(0.5), 1.0)}))


def cascade_of(backbone: DVTConfig) -> DVTConfig:
    """What a backbone becomes where nothing else is asked for. Reuse is as wide as the paper's, in narrow networks as
    wide as befits them."""
    width = backbone.embed_dim
    return replace(
        backbone,
        grids=grid_ladder(backbone.grids[-1]),
        reuse_hidden=min(128, max(width // 2, 1)),
        reuse_dim=min(48, max(width // 4, 1)),
    )


def grown(tensors: Mapping[str, Tensor], config: DVTConfig, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `tensors`, of one stage on a single grid, offer to a cascade of `config`, whose fresh tensors `own` are: the
    reuse parts stay as fresh as they are, but end in zeros. A tensor that does not fit is offered as it is."""
    stage = {name.partition(".")[2].partition(".")[2]: tensor for name, tensor in tensors.items()}
    stage = {name: _centred(name, tensor) for name, tensor in stage.items()}
    offered = {}
    for name, fresh in own.items():
        _, number, within = name.split(".", 2)
        if within.startswith(("feature_reuse.", "relation_reuse.")):
            offered[name] = torch.zeros_like(fresh) if _CLOSES_REUSE.match(within) else fresh
        elif within in stage:
            offered[name] = _fitted(within, stage[within], config, int(number), fresh)
    return offered


def nearest_grid(grid: int, grids: Iterable[int]) -> int:
    """Of `grids` the one that is the fewest times as fine or as coarse; of two the coarser."""
    return min(grids, key=lambda one: (abs(math.log(one / grid)), one))


def resampled(
    stage: Mapping[str, Tensor], config: DVTConfig, number: int, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the tensors of a stage on another grid offer to stage `number` of `config`, whose fresh tensors `own` are;
    the names of both are within the stage. A tensor that does not fit is offered as it is."""
    return {name: _on_grid(name, tensor, config, number, own[name]) for name, tensor in stage.items() if name in own}


def _on_grid(name: str, tensor: Tensor, config: DVTConfig, number: int, fresh: Tensor) -> Tensor:
    if name == "pos_embed":  # T2T's are a formula
        return fresh if config.tokenizer == "t2t" else resized_positions(tensor, config.grids[number])
    if _IS_PATCHES.match(name) and fresh.ndim == tensor.ndim == 4 and fresh.shape[:2] == tensor.shape[:2]:
        return resized_patch(tensor, fresh.shape[-1])
    return tensor


def _fitted(name: str, tensor: Tensor, config: DVTConfig, number: int, fresh: Tensor) -> Tensor:
    if re.search(r"norm2\.|mlp\.fc1\.weight$", name) and fresh.ndim == tensor.ndim:
        return _widened(name, tensor, fresh)
    return _on_grid(name, tensor, config, number, fresh)


def _widened(name: str, tensor: Tensor, fresh: Tensor) -> Tensor:
    """With the channels of feature reuse behind its own, as the fresh network has them."""
    own, all_ = tensor.shape[-1], fresh.shape[-1]
    if own >= all_ or fresh.shape[:-1] != tensor.shape[:-1]:
        return tensor
    if name.endswith("norm2.weight"):
        tensor = tensor * math.sqrt(own / all_)
    return torch.cat((tensor, fresh[..., own:]), dim=-1)


def _centred(name: str, tensor: Tensor) -> Tensor:
    """Without what it writes to the mean of a token's channels."""
    if not _WRITES_TOKENS.search(name):
        return tensor
    channels = -1 if name.endswith(("cls_token", "pos_embed")) else 0
    exact = tensor.double()
    return (exact - exact.mean(dim=channels, keepdim=True)).to(tensor.dtype)


def resize_matrix(old: int, new: int) -> Tensor:
    """Bicubic resizing along one axis, (new, old), float64."""
    basis = torch.eye(old, dtype=torch.float64)[None, None]  # an image whose columns are the unit vectors
    return F.interpolate(basis, size=(new, old), mode="bicubic", antialias=True)[0, 0]


def resized_patch(weight: Tensor, size: int) -> Tensor:
    """(D, 3, p, p) -> (D, 3, size, size): of all patch embeddings the one that says of enlarged patches, as nearly as
    can be, what the old one says of the patches; exactly, where `size` is no smaller."""
    old = weight.shape[-1]
    if old == size:
        return weight
    axis = torch.linalg.pinv(resize_matrix(old, size)).T  # (size, old)
    return (axis @ weight.double() @ axis.T).to(weight.dtype)


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, 1 + g*g, D) -> (1, 1 + grid*grid, D); the class token's stays."""
    old = math.isqrt(positions.shape[1] - 1)
    if old == grid:
        return positions
    square = positions[:, 1:].double().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat((positions[:, :1], square.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)
