"""Image folders for training: ROOT/<class>/<file>, read with Pillow. Either image by image, in every epoch, or once,
to stay in the device's memory.

Every random draw comes from a generator seeded by (seed, epoch, image) or (seed, epoch): the same images come out
whatever the number of loading processes, and a resumed run sees exactly what an uninterrupted one would have seen.
Normalisation is not done here: pixels go from 0 to 255.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from model.augment import jitter, padded_crop, rand_augment, random_resized_crop
from model.batch_augment import Augment, draw

IN_MEMORY_BYTES = 8_000_000_000  # of decoded images, at most; twice that while they are decoded
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def held_out(relative_path: str, fraction: float) -> bool:
    """Whether an image, named "<class>/<file>", belongs to the slice kept out of training for calibration.

    A hash of the name decides, so that training and calibration agree without sharing a list. The server's
    calibration applies the same rule.
    """
    return int(hashlib.sha256(os.fsencode(relative_path)).hexdigest()[:8], 16) / 2**32 < fraction


@dataclass(frozen=True)
class Sample:
    path: Path
    label: int


def scan_image_folder(root: Path) -> tuple[tuple[str, ...], list[Sample]]:
    """Class names in alphabetical order, and all samples in a stable order.

    Raises FileNotFoundError or ValueError, naming the folder, where there are no classes or no images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no such image folder: {root}")
    labels = tuple(sorted(d.name for d in root.iterdir() if d.is_dir()))
    if not labels:
        raise ValueError(f"{root} holds no class folders (expected {root}/<class>/<image>)")
    samples = [
        Sample(path, index)
        for index, name in enumerate(labels)
        for path in sorted((root / name).iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not samples:
        raise ValueError(f"{root} holds class folders but no images ({', '.join(sorted(SUFFIXES))})")
    return labels, samples


Split = Literal["train", "held-out", "all"]


def select(root: Path, samples: list[Sample], fraction: float, split: Split) -> list[Sample]:
    if split == "all":
        return samples
    wanted = split == "held-out"
    return [s for s in samples if held_out(s.path.relative_to(root).as_posix(), fraction) == wanted]


def resize_and_crop(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """Short side to `resize`, centre crop of `crop`, in one bicubic resampling."""
    scale = min(image.size) / resize
    side = crop * scale
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((crop, crop), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def upright(image: Image.Image) -> Image.Image:
    """In RGB, turned as its EXIF orientation says: as the server and its calibration see it."""
    return ImageOps.exif_transpose(image).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class EvalImages(Dataset[tuple[Tensor, int]]):
    """The evaluation transform: (3, crop, crop) uint8."""

    def __init__(self, samples: list[Sample], resize: int, crop: int) -> None:
        self.samples, self.resize, self.crop = samples, resize, crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        with Image.open(sample.path) as image:
            return to_tensor(resize_and_crop(upright(image), self.resize, self.crop)), sample.label


class TrainImages(Dataset[tuple[Tensor, int]]):
    """The training transform: random resized crop, or with `padding` a padded one, RandAugment of magnitude
    `rand_augment`, colour, flip; 0 is without. Set `epoch` before each pass."""

    def __init__(
        self, samples: list[Sample], size: int, min_area: float, colour: float, seed: int, rand_augment: float = 0.0,
        padding: float = 0.0,
    ) -> None:  # fmt: skip
        self.samples, self.size, self.min_area, self.colour, self.seed = samples, size, min_area, colour, seed
        self.rand_augment, self.padding = rand_augment, padding
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        with Image.open(sample.path) as file:
            photo = upright(file)
        if self.padding:
            image = padded_crop(photo, self.size, self.padding, rng)
        else:
            image = random_resized_crop(photo, self.size, self.min_area, rng)
        if self.rand_augment:
            image = rand_augment(image, self.rand_augment, rng)
        pixels = np.asarray(image)
        if self.colour:
            pixels = jitter(pixels, self.colour, rng)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), sample.label


class EpochSampler(Sampler[int]):
    """A permutation drawn from (seed, epoch), shared out over the processes of a distributed run, cut to whole batches
    of the whole run."""

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.kept = length // (batch_size * world) * batch_size * world
        self.epoch = 0
        if not self.kept:
            raise ValueError(f"{length} training images do not fill one batch of {batch_size * world}")

    def __len__(self) -> int:
        return self.kept // self.world

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)[: self.kept]
        return iter(order[self.rank :: self.world].tolist())


def decoded(samples: list[Sample], resize: int, crop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images as the evaluation sees them, decoded once: (N, 3, crop, crop) uint8, and labels (N,). Raises
    ValueError where they would take too much memory."""
    if (size := len(samples) * 3 * crop * crop) > IN_MEMORY_BYTES:
        limit = f"{IN_MEMORY_BYTES / 1e9:.0f} GB"
        raise ValueError(f"{len(samples)} images of {crop} pixels a side take {size / 1e9:.0f} GB, more than {limit}: "
                         "set in_memory=false")  # fmt: skip
    images = EvalImages(samples, resize, crop)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets other threads run while it decodes
        pixels = torch.stack([image for image, _ in pool.map(images.__getitem__, range(len(samples)))])
    return pixels.to(device), torch.tensor([sample.label for sample in samples], device=device)


class InMemory:
    """The batches of an epoch, from images that were decoded once to squares of `side` pixels (the middle of what is
    not square) and stay on the device: photographs of few pixels, which Pillow could not augment fast enough for a GPU.
    Set `epoch` before each pass."""

    def __init__(
        self, samples: list[Sample], side: int, size: int, batch_size: int, order: EpochSampler, min_area: float,
        colour: float, seed: int, rand_augment: float, padding: float, device: torch.device,
    ) -> None:  # fmt: skip
        self.images, self.labels = decoded(samples, side, side, device)
        self.side, self.size, self.batch_size, self.order = side, size, batch_size, order
        self.min_area, self.colour, self.seed, self.rand_augment = min_area, colour, seed, rand_augment
        self.padding = padding
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, 3, size, size) float32, whole numbers from 0 to 255, and labels (B,)."""
        rng = np.random.default_rng((self.seed, self.epoch, 2))
        draws = draw(len(self.images), self.side, self.min_area, self.rand_augment, self.colour, rng, self.padding)
        augment = Augment(draws, self.size, self.images.device)
        order = np.array(list(self.order))
        batches = torch.from_numpy(order).to(self.images.device, non_blocking=True).split(self.batch_size)
        for numbers, indices in zip(np.split(order, len(self)), batches, strict=True):
            yield augment(self.images[indices], numbers, indices), self.labels[indices]


class Normalize:
    """Pixels from 0 to 255, (B, 3, H, W) -> float32, zero mean and unit variance by the model's own statistics."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.device, non_blocking=True).float() - self.mean) / self.std


def eval_loader(
    samples: list[Sample], resize: int, crop: int, batch_size: int, num_workers: int = 0
) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(EvalImages(samples, resize, crop), batch_size=batch_size, num_workers=num_workers)  # type: ignore[arg-type]
