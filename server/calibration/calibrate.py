"""Calibration: held-out images through the deployed preprocessing and the deployed engine, then the sweep.

It must be the deployed ones: another precision or another resize moves confidences across thresholds. And the images
must be held out: on images that training saw the cascade looks surer, and better, than it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from server.bundle.frontier import NEVER, Frontier, FrontierRow, Records
from server.bundle.manifest import Bundle, Preprocessing
from server.calibration.evaluate import SHARES
from server.calibration.every_stage import every_stage
from server.calibration.guarantee import certify, losses, split, upper_bound
from server.calibration.sweep import sweep
from server.core import Engine, Floats
from server.documents import cause, read_file
from server.engines import load_engine
from server.errors import EngineFailed, ServeError
from server.frontend.images import SUFFIXES, ImageLimits, decode

Example = tuple[Path, int]  # image file, class id

_SEED = 0
_MAX_IMAGE_BYTES = 256 * 2**20  # 25 megapixels are 75 MB as BMP, twice that as PNG of 16 bits


class CalibrationError(Exception):
    """Images that cannot be calibrated on. The message, one line, names the file or folder and the cause."""


@dataclass(frozen=True, slots=True)
class Promise:
    """Lose at most this much accuracy against the last exit, with this confidence; both between 0 and 1."""

    max_accuracy_loss: float
    confidence: float = 0.95


def held_out(relative_path: str, fraction: float) -> bool:
    """Whether training leaves this image out, told from its path `class/name` inside the image folder.

    `model.data` has the same rule, so that both sides find the same slice on any machine, with no list to keep.
    """
    return int(hashlib.sha256(os.fsencode(relative_path)).hexdigest()[:8], 16) / 2**32 < fraction


def read_image_folder(
    root: Path, labels: Sequence[str], *, fraction: float = 1.0, limit: int | None = None
) -> list[Example]:
    """The images of root/<label>/..., sorted by path, with the class id of their label.

    `fraction` < 1 takes only the held-out slice. `limit` takes at most so many, drawn with a fixed seed so that every
    class keeps its share. Raises CalibrationError for a folder that is no label, and where no image is left.
    """
    if not os.path.isdir(root):  # Path.is_dir raises for what can be no path
        raise CalibrationError(f"{root}: no such folder")
    ids = {label: number for number, label in enumerate(labels)}
    examples: list[Example] = []
    for folder in (entry for entry in _entries(root) if entry.is_dir() and not entry.name.startswith(".")):
        if folder.name not in ids:
            raise CalibrationError(f"{folder}: {folder.name!r} is not a label of this bundle ({_some(labels)})")
        for file in _entries(folder):
            if file.suffix.lower() in SUFFIXES and held_out(file.relative_to(root).as_posix(), fraction):
                examples.append((file, ids[folder.name]))
    if not examples:
        slice_ = "" if fraction >= 1 else f" in the held-out slice of {fraction:g}"
        raise CalibrationError(f"{root}: no images{slice_}; expected <label>/<name>.jpg")
    return examples if limit is None or limit >= len(examples) else _stratified(examples, limit)


def calibrate(
    bundle: Bundle,
    engine: Engine,
    images: Iterable[Example],
    *,
    promise: Promise | None = None,
    limits: ImageLimits | None = None,
    threads: int = 1,
    progress: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Frontier:
    """Run every image through every stage, solve the frontier, and write it into the bundle.

    With a `promise`, half of the images solve and the other half certify. Raises as `record`, and CalibrationError
    where not even the most accurate row can be certified; then nothing is written.
    """
    records = record(bundle, engine, images, limits=limits, threads=threads, progress=progress, advance=advance)
    manifest = bundle.manifest
    solving, testing = (records, records) if promise is None else split(records)
    frontier = sweep(
        solving.confidence,
        solving.correct,
        manifest.stage_gmacs,
        key=manifest.frontier_key,
        criterion=manifest.criterion,
    )
    if promise is not None:
        certificate = certify(frontier.rows, testing, promise.max_accuracy_loss, promise.confidence)
        if certificate is None:
            bound = upper_bound(losses(testing, frontier.knee.thresholds), promise.confidence)
            raise CalibrationError(
                f"a loss of at most {promise.max_accuracy_loss:g} cannot be certified: with {testing.correct.shape[1]} "
                f"images it is below {bound:.4f} for the most accurate thresholds; use more images or allow more"
            )
        frontier = replace(frontier, certificate=certificate)
    bundle.write_frontier(frontier)
    return frontier


def record(
    bundle: Bundle,
    engine: Engine,
    images: Iterable[Example],
    *,
    limits: ImageLimits | None = None,
    threads: int = 1,
    progress: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Records:
    """What every exit says of every image, through the deployed preprocessing and engine.

    `threads` batches are decoded and run at once; `advance` is told the images of each that is done. Raises
    CalibrationError for an image that cannot be read, and whatever the engine raises.
    """
    examples = list(images)
    if not examples:
        raise CalibrationError("no images")
    size = min(engine.max_batch_sizes)
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    limits = limits or ImageLimits()

    def run(batch: Sequence[Example]) -> tuple[Floats, NDArray[np.bool_]]:
        pixels = [read_pixels(file, bundle.preprocessing, limits) for file, _ in batch]
        return _judge(engine, pixels, np.array([label for _, label in batch]))

    with (
        ThreadPoolExecutor(threads, thread_name_prefix="images") as pool,
        tqdm(total=len(examples), unit="image", desc="images", disable=not progress, file=sys.stderr) as bar,
    ):
        parts = []
        try:
            for part in pool.map(run, batches):
                parts.append(part)
                bar.update(part[1].shape[1])
                advance(part[1].shape[1])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # one bad image: do not run the thousands behind it first
            raise
    return Records(
        np.concatenate([confidence for confidence, _ in parts], axis=1),
        np.concatenate([correct for _, correct in parts], axis=1),
    )


def calibrate_folder(
    path: Path, images: Path, fraction: float, limit: int | None, promise: Promise | None = None, engine: str = "auto"
) -> Frontier:
    """`dvt calibrate`: the bundle at `path` on the image folder `images`. Raises BundleError and CalibrationError."""
    bundle = Bundle.load(path, need_frontier=False)
    examples = read_image_folder(images, bundle.manifest.labels, fraction=fraction, limit=limit)
    loaded = load_engine(bundle, engine=engine)
    try:
        return calibrate(
            bundle, loaded, examples, promise=promise, threads=loaded.executors, progress=sys.stderr.isatty()
        )
    finally:
        loaded.close()


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CalibrationError(f"{folder}: {cause(error)}") from None


def read_pixels(file: Path, how: Preprocessing, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
    """As the server would see the image. Raises CalibrationError for one that cannot be read."""
    try:
        return decode(read_file(file, _MAX_IMAGE_BYTES), None, how, limits or ImageLimits())
    except ServeError as error:
        raise CalibrationError(f"{file}: {error.detail}") from error
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{file}: {cause(error)}") from error


def _judge(
    engine: Engine, pixels: Sequence[NDArray[np.uint8]], labels: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Confidence (E-1, B) and correctness (E, B) at every exit."""
    confidence, correct = [], []
    try:
        for output in every_stage(engine, pixels):
            confidence.append(output.confidence)
            correct.append(output.probabilities.argmax(axis=1) == labels)
    except EngineFailed as error:
        raise CalibrationError(str(error)) from None
    return np.stack(confidence)[:-1], np.stack(correct)


def _stratified(examples: list[Example], limit: int) -> list[Example]:
    """`limit` of the examples: each class in proportion, drawn at random with a fixed seed, order kept."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for at, (_, label) in enumerate(examples):
        by_class[label].append(at)
    rng = np.random.default_rng(_SEED)
    # Each image gets its place, 0..1, in a shuffle of its class; the `limit` smallest places are a fair share of each.
    places = np.empty(len(examples))
    for members in by_class.values():
        places[members] = (rng.permutation(len(members)) + rng.random()) / len(members)
    return [examples[at] for at in np.sort(np.argsort(places, kind="stable")[:limit])]


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")


def _summary_rows(frontier: Frontier) -> Iterator[tuple[str, FrontierRow]]:
    """What a reader wants of 257 rows: the best at shares of the last exit's cost, and the knee."""
    for share in SHARES:
        if row := frontier.by_gmacs(share * frontier.stage_gmacs[-1]):
            yield f"{share:.0%}", row
    yield "knee", frontier.knee


def as_json(frontier: Frontier) -> str:
    rows = {
        name: {"accuracy": row.accuracy, "gmacs": row.gmacs, "thresholds": row.thresholds}
        for name, row in _summary_rows(frontier)
    }
    head = {"key": frontier.key, "samples": frontier.samples, "rows": len(frontier.rows)}
    exits = {"exit_accuracy": frontier.exit_accuracy, "stage_gmacs": frontier.stage_gmacs}
    certificate = asdict(frontier.certificate) if frontier.certificate else None
    return json.dumps({**head, **exits, "points": rows, "certificate": certificate}, indent=2)


def as_table(frontier: Frontier) -> str:
    lines = [f"{frontier.samples} images, {len(frontier.rows)} operating points"]
    for number, (accuracy, gmacs) in enumerate(zip(frontier.exit_accuracy, frontier.stage_gmacs, strict=True), start=1):
        lines.append(f"{f'all leave at exit {number}':<40} {accuracy:7.2%} {gmacs:#10.4g} GMAC")
    for name, row in _summary_rows(frontier):
        shown = ", ".join("never" if t == NEVER else f"{t:.4f}" for t in row.thresholds[:-1])
        label = name if name == "knee" else f"within {name} of the last exit's cost"
        thresholds = f"   thresholds {shown}" if shown else ""  # a single exit has none
        lines.append(f"{label:<40} {row.accuracy:7.2%} {row.gmacs:#10.4g} GMAC{thresholds}")
    if (certificate := frontier.certificate) is not None:
        lines.append(
            f"certified on {certificate.samples} other images: from {certificate.gmacs:.4g} GMAC on, at most "
            f"{certificate.max_accuracy_loss:.2%} less than the last exit, at {certificate.confidence:.0%} confidence"
        )
    return "\n".join(lines)
