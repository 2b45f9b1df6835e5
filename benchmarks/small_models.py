"""Small models that benchmarks train, and what their exits say of the images that judge them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from model.checkpoint import load_model
from model.data import Normalize, Sample, eval_loader, scan_image_folder, select
from model.dvt import DVT
from model.recipes import Recipe
from model.train import train
from server.bundle.frontier import Criterion, Records


def trained(images: Path, out: Path, recipe: Recipe) -> DVT:
    """The averaged model of a run in the folder `out`: one that was finished is read, an interrupted one goes on."""
    finished = out / "model.safetensors"
    if not finished.exists():
        print(f"training {out.name}", file=sys.stderr)
        train(images, out, recipe, resume=(out / "last.safetensors").exists())
    return load_model(finished)[0]


def epochs_of(out: Path) -> int:
    """That the run in the folder `out` took; one that began with other weights does not count theirs."""
    return int(load_model(out / "model.safetensors")[1]["epochs"])


Logged = dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]
"""Per slice, "held-out" and "test": logits (E, N, K) and labels (N,)."""


def log(model: DVT, recipe: Recipe, train_images: Path, test_images: Path) -> Logged:
    """The held-out slice of the training images, by which thresholds are solved, and the test images, that judge."""
    _, samples = scan_image_folder(train_images)
    _, test = scan_image_folder(test_images)
    return {
        "held-out": run(model, select(train_images, samples, recipe.held_out, "held-out")),
        "test": run(model, test),
    }


@torch.inference_mode()
def run(model: DVT, samples: list[Sample]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits (E, N, K) and labels (N,)."""
    config = model.config
    normalize = Normalize(config.mean, config.std, torch.device("cpu"))
    logits, labels = [], []
    for images, classes in eval_loader(samples, config.resize, config.image_size, 256):
        logits.append(torch.stack(model(normalize(images))))
        labels.append(classes)
    return torch.cat(logits, dim=1).numpy(), torch.cat(labels).numpy()


CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


def records(logged: tuple[NDArray[np.float32], NDArray[np.int64]], criterion: Criterion = "max_probability") -> Records:
    """What exported graphs compute as confidence by a criterion, and what is right."""
    logits, labels = logged
    probabilities = torch.from_numpy(logits).double().softmax(dim=-1).numpy()
    if criterion == "max_probability":
        score = probabilities.max(axis=-1)
    elif criterion == "entropy":
        score = 1 + (probabilities * np.log(probabilities + 1e-30)).sum(axis=-1) / np.log(probabilities.shape[-1])
    else:
        second, first = np.moveaxis(np.sort(probabilities, axis=-1)[..., -2:], -1, 0)
        score = first - second
    return Records(np.clip(score[:-1], 0, 1).astype(np.float32), logits.argmax(axis=-1) == labels)
