"""Classify a folder with Ray Data: each actor holds a whole cascade, and streams its blocks through it.

    python -m examples.ray_serve.dataset photos answers --budget gmacs=0.04 --actors 2

On one machine `dvt batch` does the same with less around it. This is for data that lies where Ray reads from, and for
more machines than one.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray

from server.core import ImageResult
from server.offline.cascade import Cascade

BLOCK = 1024  # files a call: at its end the later stages' last batches go as they are, so small blocks fill them badly


class Classifier:
    """An actor of `map_batches`. Takes rows with `path` and `bytes`, and gives one row back for each."""

    def __init__(self, bundle: str | None, target: dict[str, Any] | None, threads: int) -> None:
        self._cascade = Cascade.open(bundle, target=target, decode_threads=threads)
        self._labels = self._cascade.bundle.manifest.labels

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        answers = self._cascade.classify(zip(block["path"], block["bytes"], strict=True))
        rows: dict[str, list[Any]] = {name: [] for name in ("path", "label", "confidence", "exit", "error")}
        for path, answer in answers:
            found = isinstance(answer, ImageResult)
            rows["path"].append(str(path))
            rows["label"].append(self._labels[int(answer.probabilities.argmax())] if found else "")
            rows["confidence"].append(answer.confidence if found else 0.0)
            rows["exit"].append(answer.exit if found else 0)
            rows["error"].append("" if found else answer.detail)
        return rows


def classify(
    folder: str, *, bundle: str | None = None, target: dict[str, Any] | None = None, actors: int = 1, cores: int = 1
) -> ray.data.Dataset:
    """Lazy: what is made of it (`write_parquet`, `iter_rows`) runs it."""
    files = ray.data.read_binary_files(folder, include_paths=True)
    return files.map_batches(
        Classifier,
        fn_constructor_args=(bundle, target, cores),
        batch_size=BLOCK,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cores,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("out", help="folder for Parquet files")
    parser.add_argument("--budget", metavar="TARGET", help="gmacs=0.04 or accuracy=0.75")
    parser.add_argument("--bundle")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--cores", type=int, default=1, help="of each actor (default %(default)s)")
    options = parser.parse_args()
    target = None
    if options.budget:
        name, _, number = options.budget.partition("=")
        target = {name: float(number)}
    classify(
        options.folder, bundle=options.bundle, target=target, actors=options.actors, cores=options.cores
    ).write_parquet(options.out)


if __name__ == "__main__":
    main()
