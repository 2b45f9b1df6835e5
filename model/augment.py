"""Random changes to training images: to one image (Pillow, numpy) and to a batch on its device.

Every draw comes from a generator that the caller seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

FILL = (124, 116, 104)  # what a turned or moved image leaves bare: the mean colour of ImageNet


def random_resized_crop(image: Image.Image, size: int, min_area: float, rng: np.random.Generator) -> Image.Image:
    """A random part of at least `min_area` of the image, sides 3:4 to 4:3, resized to size x size
    (Szegedy et al., 2015)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            break
    else:
        w = h = float(min(width, height))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


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
OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, m, s: ImageOps.autocontrast(image),  # noqa: ARG005
    lambda image, m, s: ImageOps.equalize(image),  # noqa: ARG005
    lambda image, m, s: ImageOps.invert(image),  # noqa: ARG005
    lambda image, m, s: image.rotate(s * 30 * m, Image.Resampling.BICUBIC, fillcolor=FILL),
    lambda image, m, s: ImageOps.posterize(image, max(1, 4 - int(4 * m))),  # noqa: ARG005
    lambda image, m, s: ImageOps.solarize(image, 256 - int(256 * m)),  # noqa: ARG005
    lambda image, m, s: _solarize_add(image, int(110 * m)),  # noqa: ARG005
    lambda image, m, s: ImageEnhance.Color(image).enhance(max(0.1, 1 + s * 0.9 * m)),
    lambda image, m, s: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + s * 0.9 * m)),
    lambda image, m, s: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + s * 0.9 * m)),
    lambda image, m, s: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + s * 0.9 * m)),
    lambda image, m, s: _affine(image, (1, s * 0.3 * m, 0, 0, 1, 0)),
    lambda image, m, s: _affine(image, (1, 0, 0, s * 0.3 * m, 1, 0)),
    lambda image, m, s: _affine(image, (1, 0, s * 0.45 * m * image.width, 0, 1, 0)),
    lambda image, m, s: _affine(image, (1, 0, 0, 0, 1, s * 0.45 * m * image.height)),
)


def rand_augment(image: Image.Image, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """RandAugment (Cubuk et al., 2020) as DeiT and T2T-ViT use it: two operations, each with probability 1/2, of a
    magnitude (0 to 10) that varies by 0.5 around the given one."""
    for number in rng.integers(len(OPERATIONS), size=2):
        if rng.random() < 0.5:
            m = float(np.clip(rng.normal(magnitude, 0.5), 0, 10)) / 10
            image = OPERATIONS[number](image, m, _sign(rng))
    return image


def mix(
    images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float, probability: float,
    smoothing: float, rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019), one of the two, for a whole batch with probability
    `probability`; labels become smoothed distributions. images (B, 3, H, W), labels (B,) -> same, (B, K)."""
    off = smoothing / num_classes
    targets = F.one_hot(labels, num_classes).float() * (1 - smoothing) + off
    choices = [name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0]
    if not choices or rng.random() >= probability:
        return images, targets
    order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    if choices[rng.integers(len(choices))] == "mixup":
        lam = float(rng.beta(mixup, mixup))
        images = images * lam + images[order] * (1 - lam)
    else:
        lam = float(rng.beta(cutmix, cutmix))
        H, W = images.shape[-2:]
        h, w = int(H * math.sqrt(1 - lam)), int(W * math.sqrt(1 - lam))
        top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        images = images.clone()
        images[..., top : top + h, left : left + w] = images[order][..., top : top + h, left : left + w]
        lam = 1 - h * w / (H * W)
    return images, targets * lam + targets[order] * (1 - lam)


def erase(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Random erasing (Zhong et al., 2020): in some images of the batch a rectangle of 2 to 33 % becomes noise.
    images (B, 3, H, W), normalised."""
    H, W = images.shape[-2:]
    chosen = np.flatnonzero(rng.random(len(images)) < probability)
    if not len(chosen):
        return images
    images = images.clone()
    for index in chosen.tolist():
        for _ in range(10):
            area, ratio = H * W * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < H and 0 < w < W:
                top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
                noise = torch.from_numpy(rng.standard_normal((images.shape[1], h, w), dtype=np.float32))
                images[index, :, top : top + h, left : left + w] = noise.to(images.device)
                break
    return images
