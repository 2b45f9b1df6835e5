"""A tiny DVT, trained, exported and calibrated once per test session: the code path that users take, in moments."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

# The same examples every time: a test that fails fails for everybody. No database of examples is left behind.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Commands that run in this process set logging up for a server; no other test is to see it."""
    root, raises = logging.getLogger(), logging.raiseExceptions
    handlers = list(root.handlers)
    named = [logging.getLogger(name) for name in ("", "server", "PIL", "uvicorn.error")]
    before = [(logger, logger.level, list(logger.filters)) for logger in named]
    yield
    logging.captureWarnings(False)
    logging.raiseExceptions = raises
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    for logger, level, filters in before:
        logger.setLevel(level)
        logger.filters[:] = filters


CLASSES = ("blue", "green", "red", "white")  # in alphabetical order, as an image folder gives them
HELD_OUT = 0.25


def draw(label: int, rng: np.random.Generator, size: int = 48) -> Image.Image:
    """A noisy picture in the colour of its class."""
    tint = {"blue": (0, 0, 100), "green": (0, 100, 0), "red": (100, 0, 0), "white": (80, 80, 80)}[CLASSES[label]]
    return Image.fromarray((rng.integers(0, 150, (size, size, 3)) + tint).astype(np.uint8))


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
    """The micro variant after eight epochs."""
    from model.recipes import RECIPES
    from model.train import train

    recipe = replace(RECIPES["micro"], epochs=8, lr=4e-3, held_out=HELD_OUT, mix_probability=0.0)
    return train(image_folder, tmp_path_factory.mktemp("run"), recipe)


@pytest.fixture(scope="session")
def micro_bundle(micro_checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, with a frontier solved on the held-out pictures through the exported engine."""
    from export.write import export_checkpoint
    from server.calibration.calibrate import calibrate, read_image_folder
    from server.engines import load_engine

    bundle = export_checkpoint(micro_checkpoint, tmp_path_factory.mktemp("bundles") / "micro")
    engine = load_engine(bundle)
    calibrate(bundle, engine, read_image_folder(image_folder, CLASSES, fraction=HELD_OUT))
    engine.close()
    return bundle.path
