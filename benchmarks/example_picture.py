"""Draws docs/example.jpg: something to send to a fresh server. Hills under a sky, all by code.

python -m benchmarks.example_picture docs/example.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Random grey, smooth over `cell` pixels: (height, width), 0 to 1."""
    coarse = rng.integers(0, 256, (height // cell + 2, width // cell + 2)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 255


def draw(width: int = 480, height: int = 360, seed: int = 3) -> Image.Image:
    rng = np.random.default_rng(seed)
    y = np.linspace(0, 1, height)[:, None]
    sky = np.stack([110 + 110 * y, 160 + 70 * y, 225 + 20 * y], axis=-1) * np.ones((1, width, 1))
    clouds = np.clip(
        smooth_noise(rng, height, width, 60) * 0.6 + smooth_noise(rng, height, width, 20) * 0.4 - 0.5, 0, 1
    )
    picture = sky + (255 - sky) * (clouds * 1.6 * (1 - y))[..., None].clip(0, 1)
    x = np.arange(width)
    for base, swing, period, colour in (
        (0.45, 0.12, 210, (105, 125, 150)),
        (0.58, 0.08, 150, (75, 110, 85)),
        (0.70, 0.05, 260, (70, 120, 50)),
        (0.84, 0.03, 340, (85, 140, 45)),
    ):
        ridge = base + swing * (
            np.sin(x / period * 2 * np.pi + base * 20) * 0.6 + smooth_noise(rng, 1, width, 25)[0] - 0.5
        )
        inside = y > ridge[None, :]
        texture = 0.75 + 0.5 * smooth_noise(rng, height, width, 6) * (0.5 + 0.5 * smooth_noise(rng, height, width, 40))
        picture = np.where(inside[..., None], np.array(colour) * texture[..., None], picture)
    grain = rng.normal(0, 4, picture.shape)
    return Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


if __name__ == "__main__":
    draw().save(Path(sys.argv[1]), quality=88)
