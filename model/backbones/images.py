"""What all tokenisers ask of the images that they are given."""

from __future__ import annotations

from torch import Tensor


def check_images(images: Tensor, size: int) -> None:
    """Raises ValueError, which names both shapes, for another than (B, 3, size, size)."""
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images have shape {tuple(images.shape)}, the model takes (B, 3, {size}, {size})")
