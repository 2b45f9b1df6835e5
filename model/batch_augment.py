"""The same random changes as `augment` makes to one image, for batches on their device, and what mixes their images.

What is random is drawn on the host, for all images of an epoch at once, by a generator that the caller seeds: the same
images come out on every device, and the host never waits for the device. Crop, flip and what turns or moves an image
are one resampling. Shapes: N images of an epoch, B of a batch, b of those that get one operation, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.augment import FILL, OPERATIONS, crop_boxes, moves

NAMES = tuple(OPERATIONS)
SLOTS = 2  # operations of RandAugment that an image may get


def _grey(x: Tensor) -> Tensor:
    return x[:, 0:1] * 0.299 + x[:, 1:2] * 0.587 + x[:, 2:3] * 0.114


def _factor(m: Tensor, s: Tensor) -> Tensor:
    return (1 + s * 0.9 * m).clamp_min(0.1)


def _away_from(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """0: `base`, 1: x; beyond 1 what makes x differ from it is enhanced."""
    return base + (x - base) * factor


def _autocontrast(x: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * 255 / (high - low).clamp_min(1), x)


def _equalize(x: Tensor) -> Tensor:
    """Every channel of every image by the cumulated histogram of its own levels."""
    levels = x.flatten(2).long()  # (b, 3, S*S)
    histogram = torch.zeros(*levels.shape[:2], 256, device=x.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels, dtype=histogram.dtype))
    brightest = histogram.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - brightest).div(255, rounding_mode="floor")
    below = histogram.cumsum(2) - histogram
    table = (step.div(2, rounding_mode="floor") + below).div(step.clamp_min(1), rounding_mode="floor")
    equalized = table.gather(2, levels)
    return torch.where(step > 0, equalized, x.flatten(2)).view_as(x)


def _sharpen(x: Tensor, factor: Tensor) -> Tensor:
    smooth = x.clone()
    inner = x[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = (F.avg_pool2d(x, 3, stride=1) * 9 + inner * 4) / 13
    return _away_from(smooth, x, factor)


# x (b, 3, S, S) whole numbers from 0 to 255, m and s (b, 1, 1, 1). What leaves that range is cut off behind them.
COLOURS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "autocontrast": lambda x, m, s: _autocontrast(x),  # noqa: ARG005
    "equalize": lambda x, m, s: _equalize(x),  # noqa: ARG005
    "invert": lambda x, m, s: 255 - x,  # noqa: ARG005
    "posterize": lambda x, m, s: x - x % (2 ** (8 - (4 - (4 * m).floor()).clamp_min(1))),  # noqa: ARG005
    "solarize": lambda x, m, s: torch.where(x < 256 - (256 * m).floor(), x, 255 - x),  # noqa: ARG005
    "solarize-add": lambda x, m, s: torch.where(x < 128, x + (110 * m).floor(), x),  # noqa: ARG005
    "colour": lambda x, m, s: _away_from(_grey(x), x, _factor(m, s)),
    "contrast": lambda x, m, s: _away_from(_grey(x).mean((2, 3), keepdim=True).round(), x, _factor(m, s)),
    "brightness": lambda x, m, s: x * _factor(m, s),
    "sharpness": lambda x, m, s: _sharpen(x, _factor(m, s)),
}

# Where a point of the result comes from, in coordinates from -1 to 1: two rows of a matrix, for every a = m * s (k,).
Entry = NDArray[np.float64] | float
MOVES: dict[str, Callable[[NDArray[np.float64]], tuple[tuple[Entry, Entry, Entry], tuple[Entry, Entry, Entry]]]] = {
    "rotate": lambda a: (
        (np.cos(a * np.pi / 6), -np.sin(a * np.pi / 6), 0),
        (np.sin(a * np.pi / 6), np.cos(a * np.pi / 6), 0),
    ),
    "shear-x": lambda a: ((1, 0.3 * a, 0.3 * a), (0, 1, 0)),
    "shear-y": lambda a: ((1, 0, 0), (0.3 * a, 1, 0.3 * a)),
    "move-x": lambda a: ((1, 0, 0.9 * a), (0, 1, 0)),
    "move-y": lambda a: ((1, 0, 0), (0, 1, 0.9 * a)),
}


@dataclass(frozen=True)
class Draws:
    """What is random about each of N images, on the host."""

    maps: NDArray[np.float32]  # (N, 2, 3), from the result's coordinates to the source's, both from -1 to 1
    operations: NDArray[np.int64]  # (N, SLOTS), rows of NAMES that change colours, -1: none
    strengths: NDArray[np.float32]  # (N, SLOTS, 2), magnitude over 10 and sign
    jitter: NDArray[np.float32]  # (N, 3), factors of brightness, contrast and saturation


def draw(
    count: int, side: int, min_area: float, magnitude: float, colour: float, rng: np.random.Generator,
    padding: float = 0.0,
) -> Draws:  # fmt: skip
    """For square images of `side` pixels; RandAugment of `magnitude`, 0: without. With `padding` crops are padded ones,
    in place of resized ones."""
    if padding:
        left, top = moves(side, padding, rng, count).T
        right, bottom = left + side, top + side
    else:
        left, top, right, bottom = crop_boxes(side, side, min_area, rng, count).T
    maps = np.zeros((count, 3, 3))
    maps[:, 0, 0], maps[:, 0, 2] = (right - left) / side, (left + right) / side - 1
    maps[:, 1, 1], maps[:, 1, 2] = (bottom - top) / side, (top + bottom) / side - 1
    maps[:, 2, 2] = 1
    operations = np.where(rng.random((count, SLOTS)) < 0.5, rng.integers(len(NAMES), size=(count, SLOTS)), -1)
    m = np.clip(rng.normal(magnitude, 0.5, (count, SLOTS)), 0, 10) / 10
    s = np.where(rng.random((count, SLOTS)) < 0.5, 1.0, -1.0)
    flipped = rng.random(count) < 0.5
    jitter = rng.uniform(1 - colour, 1 + colour, (count, 3))
    if not magnitude:
        operations[:] = -1
    for slot in range(SLOTS):
        for name, rows in MOVES.items():
            theirs = np.flatnonzero(operations[:, slot] == NAMES.index(name))
            move = np.zeros((len(theirs), 3, 3))
            move[:, 2, 2] = 1
            for i, row in enumerate(rows((m * s)[theirs, slot])):
                for j, entry in enumerate(row):
                    move[:, i, j] = entry
            maps[theirs] = maps[theirs] @ move
    maps[flipped, :, 0] *= -1
    operations[np.isin(operations, [NAMES.index(name) for name in MOVES])] = -1
    return Draws(
        maps[:, :2].astype(np.float32),
        operations.astype(np.int64),
        np.stack((m, s), axis=-1).astype(np.float32),
        jitter.astype(np.float32),
    )


class Augment:
    """Applies the draws of an epoch to its batches."""

    def __init__(self, draws: Draws, size: int, device: torch.device) -> None:
        self.size, self.operations = size, draws.operations
        self.maps, self.strengths, self.jitter = (
            torch.from_numpy(a).to(device, non_blocking=True) for a in (draws.maps, draws.strengths, draws.jitter)
        )
        self.jitters = bool((draws.jitter != 1).any())
        self.fill = torch.tensor(FILL, dtype=torch.float32).view(1, 3, 1, 1).to(device, non_blocking=True)

    @torch.no_grad()
    def __call__(self, images: Tensor, numbers: NDArray[np.int64], indices: Tensor) -> Tensor:
        """images (B, 3, S, S) uint8, those that have these `numbers` in the epoch, which `indices` has on the device
        -> (B, 3, size, size), whole numbers from 0 to 255 in float32."""
        x = self._move(images.float(), self.maps[indices])
        for slot in range(SLOTS):
            self._recolour(x, self.operations[numbers, slot], self.strengths[indices, slot])
        return self._jitter(x, self.jitter[indices]) if self.jitters else x

    def _move(self, x: Tensor, maps: Tensor) -> Tensor:
        """No smoothing against aliasing: images are kept hardly larger than what is asked for."""
        grid = F.affine_grid(maps, [len(x), 3, self.size, self.size], align_corners=False)
        moved = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
        inside = (grid.abs() <= 1).all(dim=-1)[:, None]  # (B, 1, size, size)
        return torch.where(inside, _whole(moved), self.fill)

    def _recolour(self, x: Tensor, operations: NDArray[np.int64], strengths: Tensor) -> None:
        """In place. The host knows who gets what, so each operation runs on its own images only."""
        order = np.argsort(operations, kind="stable")
        order = order[np.searchsorted(operations[order], 0) :]  # those without (-1) come first
        on_device = torch.from_numpy(order).to(x.device, non_blocking=True)
        start = 0
        for number, count in zip(*np.unique(operations[order], return_counts=True), strict=True):
            some = on_device[start : start + int(count)]
            m, s = strengths[some].view(-1, 2, 1, 1, 1).unbind(1)
            x[some] = _whole(COLOURS[NAMES[number]](x[some], m, s))
            start += int(count)

    def _jitter(self, x: Tensor, factors: Tensor) -> Tensor:
        brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
        x = x * brightness
        x = _away_from(x.mean((1, 2, 3), keepdim=True), x, contrast)
        return _whole(_away_from(_grey(x), x, saturation))


def _whole(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255)


def mix(
    images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float, probability: float,
    smoothing: float, rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019), one of the two, for a whole batch with probability
    `probability`; labels become smoothed distributions. images (B, 3, H, W), labels (B,) -> same, (B, K).

    Each image is mixed with the one before it: batches come in an order drawn anew in every epoch.
    """
    off = smoothing / num_classes
    classes = torch.arange(num_classes, device=labels.device)
    targets = (labels[:, None] == classes).float() * (1 - smoothing) + off
    choices = [name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0]
    if not choices or rng.random() >= probability:
        return images, targets
    others = images.roll(1, 0)
    if choices[rng.integers(len(choices))] == "mixup":
        lam = float(rng.beta(mixup, mixup))
        images = images * lam + others * (1 - lam)
    else:
        lam = float(rng.beta(cutmix, cutmix))
        H, W = images.shape[-2:]
        h, w = int(H * math.sqrt(1 - lam)), int(W * math.sqrt(1 - lam))
        top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        images = images.clone()
        images[..., top : top + h, left : left + w] = others[..., top : top + h, left : left + w]
        lam = 1 - h * w / (H * W)
    return images, targets * lam + targets.roll(1, 0) * (1 - lam)


def erase(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Random erasing (Zhong et al., 2020): in some images of the batch a rectangle of 2 to 33 % becomes noise.
    images (B, 3, H, W), normalised. The noise is drawn on the device."""
    B, _, H, W = images.shape
    area = H * W * rng.uniform(0.02, 1 / 3, (B, 10))
    ratio = np.exp(rng.uniform(math.log(0.3), math.log(3.3), (B, 10)))
    h, w = np.sqrt(area * ratio).round(), np.sqrt(area / ratio).round()
    fits = (h > 0) & (h < H) & (w > 0) & (w < W)
    rows, first = np.arange(B), fits.argmax(axis=1)
    chosen = (rng.random(B) < probability) & fits.any(axis=1)
    h, w = h[rows, first] * chosen, w[rows, first] * chosen
    top, left = np.floor(rng.random(B) * (H - h + 1)), np.floor(rng.random(B) * (W - w + 1))
    boxes = np.stack((top, top + h, left, left + w)).astype(np.float32)
    start, end, begin, stop = torch.from_numpy(boxes).to(images.device, non_blocking=True).unsqueeze(-1)
    y, x = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
    down, across = (y >= start) & (y < end), (x >= begin) & (x < stop)  # (B, H), (B, W)
    gone = down[:, None, :, None] & across[:, None, None, :]
    return torch.where(gone, torch.randn_like(images), images)
