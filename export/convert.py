"""From a plain ViT and a folder of images to a calibrated bundle, in steps that each leave one thing in the folder:

    convert.json            what was asked, written first: another wish is another folder
    vit/model.safetensors   the ViT alone, for these classes: as it came, or trained first where its head knows others
    run/model.safetensors   the cascade, begun with it and taught by it
    bundle/                 exported and verified
    bundle/frontier.json    calibrated
    summary.json            what it bought, on images that neither training nor calibration saw

A step is done when its thing is there; each appears at once or not at all. So whatever ends a conversion, the same
command goes on with what is left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from export.int8 import BundlePrecision
from export.write import export_checkpoint
from model.checkpoint import CheckpointError, load_model, save_model
from model.config import DVTConfig
from model.data import Normalize, Sample, eval_loader, held_out, scan_image_folder
from model.dvt import DVT
from model.evaluate import exit_accuracy
from model.flops import cumulative_macs
from model.recipes import Recipe
from model.resample import cascade_of
from model.start import Start, read_start, take_weights
from model.train import Device, train
from server.bundle.frontier import FrontierRow, evaluate_thresholds
from server.bundle.manifest import FRONTIER, Bundle
from server.calibration.calibrate import Example, calibrate, read_image_folder, record
from server.calibration.evaluate import Evaluation, evaluate
from server.engines import load_engine

STEPS = ("vit", "train", "export", "calibrate", "evaluate")
ASKED, SUMMARY = "convert.json", "summary.json"
IN_MEMORY_SIDE = 96  # photographs up to this are decoded once and stay in memory

Progress = Callable[[int, int], None]  # so many of so many


@dataclass(frozen=True)
class Wish:
    """What is asked for. `grids`, `image_size`, `mean`, `std` and `resize` are the ViT's where they are not given."""

    vit: Path
    images: Path
    out: Path
    recipe: Recipe
    test: Path | None = None  # images to judge on; without them half of the held-out slice is kept for that
    grids: tuple[int, ...] = ()
    image_size: int | None = None
    heads: int | None = None
    resize: int | None = None
    teacher: bool = True
    precision: BundlePrecision = "fp32"
    device: Device = "auto"
    minutes: float = math.inf
    loaders: int = 0


@dataclass(frozen=True)
class Bought:
    """A bundle beside the ViT alone, on `images` images: every exit, and the cheapest operating point that calibration
    held to be as accurate as the ViT (the most accurate one where none was)."""

    bundle: str
    images: int
    vit_accuracy: float
    vit_gmacs: float
    vit_trained_here: bool
    grids: tuple[int, ...]
    point: FrontierRow
    evaluation: Evaluation

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def lines(document: dict[str, Any]) -> Iterator[str]:
        """`to_json`, for people; the last line is what it bought."""
        judged, point = document["evaluation"], document["point"]
        rows = zip(document["grids"], judged["exit_accuracy"], judged["stage_gmacs"], strict=True)
        for number, (grid, accuracy, gmacs) in enumerate(rows, start=1):
            yield f"  exit {number}: {grid}x{grid} tokens, {accuracy:.2%} at {gmacs:.4g} GMAC"
        gmacs = document["vit_gmacs"]
        yield f"next: dvt serve {document['bundle']}"
        ratio = gmacs / point["gmacs"]
        bought = f"{ratio:.2f} times fewer" if ratio >= 1 else f"{1 / ratio:.2f} times more, so nothing is bought"
        yield (
            f"{point['accuracy']:.2%} at {point['gmacs']:.4g} GMAC an image, where the ViT alone has "
            f"{document['vit_accuracy']:.2%} at {gmacs:.4g}: {bought} (on {document['images']} unseen images)"
        )


class Conversion:
    """One folder's. Raises ValueError, FileExistsError or CheckpointError, in one line, for what cannot be done."""

    def __init__(self, wish: Wish) -> None:
        self.wish, self.out = wish, wish.out
        if wish.precision == "bf16" and not torch.cuda.is_available():
            raise ValueError("a bundle in bf16 is calibrated on a GPU, and there is none")
        if wish.images.resolve() in (wish.out.resolve(), *wish.out.resolve().parents):
            raise ValueError(f"{wish.out} lies in {wish.images}, where it would be taken for a class")
        self.start = read_start(wish.vit, wish.heads)
        self.labels, samples = scan_image_folder(wish.images)
        if len(self.labels) < 2:
            raise ValueError(f"{wish.images} holds the class {self.labels[0]} alone")
        self.alone = _backbone(self.start, wish, self.labels)
        widest = cascade_of(self.alone)
        self.cascade = replace(widest, grids=wish.grids or widest.grids)
        fraction = wish.recipe.held_out
        training = sum(not held_out(s.path.relative_to(wish.images).as_posix(), fraction) for s in samples)
        small = self.alone.image_size <= IN_MEMORY_SIDE
        self.recipe = replace(
            wish.recipe,
            batch_size=max(1, min(wish.recipe.batch_size, training)),
            in_memory=wish.recipe.in_memory or small,
            mean=(),
            std=(),
        )
        self.solving, self.judging = _slices(wish, self.labels, fraction)
        self.photos = len(samples)

    @property
    def vit(self) -> Path:
        return self.out / "vit" / "model.safetensors"

    @property
    def model(self) -> Path:
        return self.out / "run" / "model.safetensors"

    @property
    def bundle(self) -> Path:
        return self.out / "bundle"

    def left(self) -> list[str]:
        return what_is_left(self.out)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Own the folder while it is worked in; make it where it is not there. Raises FileExistsError for one that is
        something else, that another wish made, or that another process works in."""
        self.out.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.out, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(f"{self.out}: another conversion works in it") from None
            self._claim()
            yield
        finally:
            os.close(folder)

    def _claim(self) -> None:
        asked, partial = self.out / ASKED, self.out / f".{ASKED}"
        mine = json.loads(json.dumps(self._asked()))
        if not asked.exists():
            if set(self.out.iterdir()) - {partial}:
                raise FileExistsError(f"{self.out} holds something else; name another folder")
            partial.write_text(json.dumps(mine, indent=2))
            partial.replace(asked)
        try:
            theirs = json.loads(asked.read_bytes())
            differs = [name for name in mine if theirs.get(name) != mine[name]]
        except (ValueError, AttributeError):
            raise FileExistsError(f"{asked} is not what a conversion leaves; name another folder") from None
        if differs:
            raise FileExistsError(f"{self.out} was made by another command: {', '.join(differs)}; name another folder")

    def _asked(self) -> dict[str, Any]:
        wish = self.wish
        with self.start.path.open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "vit": weights, "classes": self.labels, "images": self.photos, "alone": self.alone.to_dict(),
            "cascade": self.cascade.to_dict(), "recipe": asdict(self.recipe), "teacher": wish.teacher,
            "precision": wish.precision, "test": None if wish.test is None else str(wish.test),
        }  # fmt: skip

    def run(self, step: str, progress: Progress) -> None:
        """One step; nothing where it is done."""
        {
            "vit": self._vit, "train": self._train, "export": self._export,
            "calibrate": self._calibrate, "evaluate": self._evaluate,
        }[step](progress)  # fmt: skip

    def cost(self, step: str) -> float:
        """About how long a step takes beside the others: tokens that pass through blocks, three times to learn."""
        alone, all_ = (sum(grid * grid for grid in c.grids) for c in (self.alone, self.cascade))
        learning = 3 * self.recipe.all_epochs * self.photos
        return {
            "vit": 1.0 if self._knows_these_classes() else learning * alone,
            "train": learning * (all_ + alone / 3 * self.wish.teacher),
            "export": 1000.0 * all_,
            "calibrate": len(self.solving) * float(all_),
            "evaluate": len(self.judging) * float(all_ + 2 * alone),
        }[step]

    def _knows_these_classes(self) -> bool:
        taken = take_weights(DVT(self.alone), self.start)
        return not any(name.split(".")[2] == "head" for name in taken.fresh)

    def _vit(self, progress: Progress) -> None:
        if self._knows_these_classes():
            model = DVT(self.alone).eval()
            take_weights(model, self.start)
            self.vit.parent.mkdir(exist_ok=True)
            save_model(self.vit, model, epochs=0)
        else:
            self._learn(self.vit, self.alone, self.start.path, None, self.wish.minutes / 3, progress)

    def _train(self, progress: Progress) -> None:
        teacher = self.vit if self.wish.teacher else None
        self._learn(self.model, self.cascade, self.vit, teacher, self.wish.minutes / 1.5, progress)

    def _learn(
        self, model: Path, config: DVTConfig, start: Path, teacher: Path | None, minutes: float, progress: Progress
    ) -> None:
        differing = ("grids", "image_size", "mean", "std", "resize", "reuse_hidden", "reuse_dim")
        changes = self.recipe.changes | {name: getattr(config, name) for name in differing}
        wish = self.wish
        train(
            wish.images, model.parent, replace(self.recipe, changes=changes), resume=True, num_workers=wish.loaders,
            start=start, minutes=minutes, teacher=teacher, heads=wish.heads, device=wish.device, progress=progress,
        )  # fmt: skip

    def _export(self, progress: Progress) -> None:
        for unfinished in self.out.glob(f".{self.bundle.name}.*"):  # of one that was killed
            shutil.rmtree(unfinished)
        said = 0
        steps = len(self.cascade.grids) + 3

        def one_more(_: str) -> None:
            nonlocal said
            said += 1
            progress(min(said, steps), steps)

        images = self.wish.images if self.wish.precision == "int8" else None
        export_checkpoint(self.model, self.bundle, one_more, precision=self.wish.precision, images=images)

    def _calibrate(self, progress: Progress) -> None:
        bundle = Bundle.load(self.bundle, need_frontier=False)
        with self._engine(bundle) as engine:
            advance = _counting(len(self.solving), progress)
            calibrate(bundle, engine, self.solving, threads=engine.executors, advance=advance)

    def _evaluate(self, progress: Progress) -> None:
        bundle = Bundle.load(self.bundle)
        total = len(self.judging)
        with self._engine(bundle) as engine:
            records = record(bundle, engine, self.judging, threads=engine.executors, advance=_counting(total, progress))
        model, header = load_model(self.vit)
        solved_at, accuracy = (self._accuracy(model, examples) for examples in (self.solving, self.judging))
        frontier = bundle.frontier
        row = frontier.by_accuracy(solved_at) or frontier.knee
        bought = Bought(
            bundle=str(self.bundle),
            images=total,
            vit_accuracy=accuracy,
            vit_gmacs=cumulative_macs(model)[-1] / 1e9,
            vit_trained_here=header.get("epochs", 0) > 0,
            grids=self.cascade.grids,
            point=evaluate_thresholds(records, row.thresholds, frontier.stage_gmacs),
            evaluation=evaluate(frontier, records),
        )
        partial = self.out / f".{SUMMARY}"
        partial.write_text(bought.to_json())
        partial.replace(self.out / SUMMARY)

    def _accuracy(self, model: DVT, examples: list[Example]) -> float:
        config = model.config
        samples = [Sample(path, label) for path, label in examples]
        device = next(model.parameters()).device
        loader = eval_loader(samples, config.resize, config.image_size, 64)
        return exit_accuracy(model, loader, Normalize(config.mean, config.std, device))[-1]

    @contextmanager
    def _engine(self, bundle: Bundle) -> Iterator[Any]:
        engine = load_engine(bundle, engine="onnx" if self.wish.device == "cpu" else "auto")
        try:
            yield engine
        finally:
            engine.close()


def convert(wish: Wish, bar: tqdm[Any], told: Callable[[str], None]) -> dict[str, Any]:
    """All that is left, and what it bought. `told` gets lines for people as it goes."""
    conversion = Conversion(wish)
    with conversion.held():
        left = conversion.left()
        for note in conversion.start.notes if "vit" in left else ():
            told(f"{wish.vit}: {note}")
        if left:
            told(f"left to do: {', '.join(left)}")
        bar.total = sum(conversion.cost(step) for step in left)
        begun = 0.0
        for step in left:
            cost = conversion.cost(step)

            def progress(done: int, of: int, begun: float = begun, cost: float = cost) -> None:
                bar.update(begun + cost * done / of - bar.n)

            bar.set_description(f"{step} ({STEPS.index(step) + 1} of {len(STEPS)})")
            conversion.run(step, progress)
            begun += cost
            bar.update(begun - bar.n)
        document = json.loads((conversion.out / SUMMARY).read_bytes())
        assert isinstance(document, dict)
        return document


def what_is_left(out: Path) -> list[str]:
    """The steps whose thing is not there yet."""
    things = ("vit/model.safetensors", "run/model.safetensors", "bundle", f"bundle/{FRONTIER}", SUMMARY)
    return [step for step, thing in zip(STEPS, things, strict=True) if not (out / thing).exists()]


def _backbone(start: Start, wish: Wish, labels: tuple[str, ...]) -> DVTConfig:
    """The ViT alone, for these classes and images. Raises CheckpointError for what is no plain ViT."""
    config = start.config
    if config.num_stages > 1:
        raise CheckpointError(f"{start.path} is a cascade already: dvt export {start.path} BUNDLE")
    if config.tokenizer != "patch":
        raise CheckpointError(f"{start.path}: its tokeniser is {config.tokenizer}, only plain patches are resampled")
    size = wish.image_size or config.image_size
    grid = max(1, round(config.grids[0] * size / config.image_size))
    resize = wish.resize or max(size, round(config.resize * size / config.image_size))
    given = {name: value for name in ("mean", "std") if (value := getattr(wish.recipe, name))}
    return replace(
        config, image_size=size, grids=(grid,), resize=resize, labels=labels, num_classes=len(labels), **given
    )


def _slices(wish: Wish, labels: tuple[str, ...], fraction: float) -> tuple[list[Example], list[Example]]:
    """Images that training leaves out: to solve on, and to judge on. Raises CalibrationError where there are none."""
    if wish.test is not None:
        return read_image_folder(wish.images, labels, fraction=fraction), read_image_folder(wish.test, labels)
    solving = read_image_folder(wish.images, labels, fraction=fraction / 2)
    kept = set(solving)
    judging = [example for example in read_image_folder(wish.images, labels, fraction=fraction) if example not in kept]
    if not judging:
        raise ValueError(f"{wish.images}: too few images to keep some for judging; name others with --test")
    return solving, judging


def _counting(total: int, progress: Progress) -> Callable[[int], None]:
    seen = 0

    def advance(images: int) -> None:
        nonlocal seen
        seen += images
        progress(seen, total)

    return advance
