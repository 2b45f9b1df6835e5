"""Photo-like JPEGs made by code, so that a benchmark needs no data set. The same number gives the same photo."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZES = ((500, 375), (375, 500), (500, 333), (480, 360), (400, 400))  # (width, height)
OCTAVES = (2, 5, 12, 30, 80, 200)  # cells along the width; amplitude falls with frequency, as in real photos
SHAPES = 6


def photos(count: int) -> list[bytes]:
    """JPEG files of about 400 x 400 pixels and 20 to 60 KB."""
    return [photo(number) for number in range(count)]


def photo(number: int) -> bytes:
    rng = np.random.default_rng(number)
    width, height = SIZES[rng.integers(len(SIZES))]
    texture = Image.fromarray(_texture(rng, width, height))
    image = texture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    draw = ImageDraw.Draw(image)
    for _ in range(SHAPES):
        x, y = rng.integers(0, (width, height)).tolist()
        box = (x, y, x + int(rng.integers(20, width // 2)), y + int(rng.integers(20, height // 2)))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    image = Image.blend(image, texture, 0.35)  # no shape is wholly flat
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(rng.integers(75, 91)))
    return stream.getvalue()


def _texture(rng: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """Smoothed random fields, coarse to fine, (height, width, 3): mostly brightness, a little colour."""
    total = np.full((height, width, 3), 128.0, np.float32)
    total += rng.normal(0, 30, 3).astype(np.float32)  # the light of the scene
    for cells in OCTAVES:
        rows = max(2, cells * height // width)
        brightness = rng.normal(0, 1, (rows, cells, 1))
        colour = rng.normal(0, 0.4, (rows, cells, 3)) if cells <= 30 else 0.0
        field = (np.broadcast_to(brightness + colour, (rows, cells, 3)) * 40 + 128).clip(0, 255).astype(np.uint8)
        smooth = Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth, np.float32) - 128) * (2 / cells) ** 0.3
    return total.clip(0, 255).astype(np.uint8)
