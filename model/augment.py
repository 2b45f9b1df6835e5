"""Random changes to one training image, with Pillow and numpy; `batch_augment` has the same for batches.

Every draw comes from a generator that the caller seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)  # what a turned or moved image leaves bare: the mean colour of ImageNet


def crop_boxes(width: int, height: int, min_area: float, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Random parts of an image, each of at least `min_area` of it, sides 3:4 to 4:3 (Szegedy et al., 2015):
    (count, 4), left, top, right, bottom. Of ten tries the first that fits, else a square."""
    area = width * height * rng.uniform(min_area, 1.0, (count, 10))
    ratio = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), (count, 10)))
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (w <= width) & (h <= height)
    rows, first, square = np.arange(count), fits.argmax(axis=1), float(min(width, height))
    w = np.where(fits.any(axis=1), w[rows, first], square)
    h = np.where(fits.any(axis=1), h[rows, first], square)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return np.stack((left, top, left + w, top + h), axis=1)


def moves(side: int, padding: float, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """By how many pixels, right and down, a padded crop lies from the middle: (count, 2). What an image is padded with
    on each side is the share `padding` of its own."""
    most = round(padding * side)
    return rng.integers(-most, most + 1, (count, 2))


def padded_crop(image: Image.Image, size: int, padding: float, rng: np.random.Generator) -> Image.Image:
    """The middle square of the image, padded, of which a part as large as it was is resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    right, down = moves(side, padding, rng, 1)[0].tolist()
    moved = Image.new("RGB", (side, side), FILL)
    moved.paste(image.crop((left, top, left + side, top + side)), (-right, -down))
    return moved.resize((size, size), Image.Resampling.BICUBIC)


def random_resized_crop(image: Image.Image, size: int, min_area: float, rng: np.random.Generator) -> Image.Image:
    """A random part of the image, resized to size x size."""
    left, top, right, bottom = crop_boxes(*image.size, min_area, rng, 1)[0].tolist()
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation, each times 1 +- strength. image (H, W, 3) uint8."""
    x = image.astype(np.float32)
    x *= rng.uniform(1 - strength, 1 + strength)
    mean = x.mean()
    x = (x - mean) * rng.uniform(1 - strength, 1 + strength) + mean
    grey = x @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    x = (x - grey[..., None]) * rng.uniform(1 - strength, 1 + strength) + grey[..., None]
    return np.clip(x, 0, 255).astype(np.uint8)


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    """Brighten what is darker than the middle."""
    pixels = np.asarray(image).astype(np.int16)
    return Image.fromarray(np.where(pixels < 128, np.minimum(pixels + add, 255), pixels).astype(np.uint8))


# RandAugment's operations with "increasing" magnitudes; m is the magnitude over 10, s a random sign.
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "autocontrast": lambda image, m, s: ImageOps.autocontrast(image),  # noqa: ARG005
    "equalize": lambda image, m, s: ImageOps.equalize(image),  # noqa: ARG005
    "invert": lambda image, m, s: ImageOps.invert(image),  # noqa: ARG005
    "rotate": lambda image, m, s: image.rotate(s * 30 * m, Image.Resampling.BICUBIC, fillcolor=FILL),
    "posterize": lambda image, m, s: ImageOps.posterize(image, max(1, 4 - int(4 * m))),  # noqa: ARG005
    "solarize": lambda image, m, s: ImageOps.solarize(image, 256 - int(256 * m)),  # noqa: ARG005
    "solarize-add": lambda image, m, s: _solarize_add(image, int(110 * m)),  # noqa: ARG005
    "colour": lambda image, m, s: ImageEnhance.Color(image).enhance(max(0.1, 1 + s * 0.9 * m)),
    "contrast": lambda image, m, s: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + s * 0.9 * m)),
    "brightness": lambda image, m, s: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + s * 0.9 * m)),
    "sharpness": lambda image, m, s: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + s * 0.9 * m)),
    "shear-x": lambda image, m, s: _affine(image, (1, s * 0.3 * m, 0, 0, 1, 0)),
    "shear-y": lambda image, m, s: _affine(image, (1, 0, 0, s * 0.3 * m, 1, 0)),
    "move-x": lambda image, m, s: _affine(image, (1, 0, s * 0.45 * m * image.width, 0, 1, 0)),
    "move-y": lambda image, m, s: _affine(image, (1, 0, 0, 0, 1, s * 0.45 * m * image.height)),
}


def rand_augment(image: Image.Image, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """RandAugment (Cubuk et al., 2020) as DeiT and T2T-ViT use it: two operations, each with probability 1/2, of a
    magnitude (0 to 10) that varies by 0.5 around the given one."""
    for name in rng.choice(list(OPERATIONS), size=2):
        if rng.random() < 0.5:
            m = float(np.clip(rng.normal(magnitude, 0.5), 0, 10)) / 10
            image = OPERATIONS[name](image, m, _sign(rng))
    return image
