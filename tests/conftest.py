"""A tiny DVT, trained, exported and calibrated once per test session: the code path that users take, in moments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("blue", "checks", "green", "stripes")  # in alphabetical order, as an image folder gives them
HELD_OUT = 0.25


def draw(label: int, rng: np.random.Generator, size: int = 48) -> Image.Image:
    """A picture of its class: a colour or a pattern under noise."""
    pixels = rng.integers(0, 120, (size, size, 3))
    rows, columns = np.mgrid[:size, :size] // 8 % 2
    match CLASSES[label]:
        case "blue":
            pixels[..., 2] += 130
        case "green":
            pixels[..., 1] += 130
        case "checks":
            pixels += 130 * (rows ^ columns)[..., None]
        case "stripes":
            pixels += 130 * rows[..., None]
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 pictures in four classes, root/<class>/<n>.png."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(40):
            draw(label, rng).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def micro_checkpoint(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro variant after six epochs."""
    from model.train import RECIPES, train

    recipe = replace(RECIPES["micro"], epochs=6, lr=3e-3, held_out=HELD_OUT, mix_probability=0.0)
    return train(image_folder, tmp_path_factory.mktemp("run"), recipe)


@pytest.fixture(scope="session")
def micro_bundle(micro_checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, with a frontier solved on the held-out pictures through the exported engine."""
    from export.write import export_checkpoint
    from server.calibrate import calibrate, read_image_folder
    from server.engines import load_engine

    bundle = export_checkpoint(micro_checkpoint, tmp_path_factory.mktemp("bundles") / "micro")
    engine = load_engine(bundle)
    calibrate(bundle, engine, read_image_folder(image_folder, CLASSES, fraction=HELD_OUT))
    engine.close()
    return bundle.path
