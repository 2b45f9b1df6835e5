"""`dvt batch`: files through the cascade, answers into a file, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from server.core import ImageResult
from server.errors import ServeError
from server.offline.cascade import Cascade


class Sink(Protocol):
    """Where lines go. `done`: images that had theirs before, `failed` of them bad."""

    done: set[str]
    failed: int

    def add(self, image: str, answer: ImageResult | ServeError) -> None: ...

    def flush(self) -> None: ...


@dataclass(slots=True)
class Summary:
    """What came of one run. `images`: answered and failed in it; `skipped`: done before, `failed_before` of them."""

    images: int
    failed: int
    skipped: int
    failed_before: int
    seconds: float
    images_per_s: float
    exits: list[int]
    gmacs: float | None  # mean of those that were answered
    batch_fill: list[float | None]  # mean, by stage
    model: str
    version: str
    engine: str
    device: str
    target: dict[str, Any]
    thresholds: tuple[float, ...]
    clamped: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.images - self.failed} answered"]
        if self.gmacs is not None:
            parts += [f"{count} at exit {number}" for number, count in enumerate(self.exits, start=1)]
            parts.append(f"mean {self.gmacs:.4g} GMAC")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.skipped:
            before = f", {self.failed_before} of them failed" if self.failed_before else ""
            parts.append(f"{self.skipped} were done before{before}")
        speed = f"{self.seconds:.1f} s, {self.images_per_s:.1f} images/s"
        return f"{self.images} images in {speed}: {', '.join(parts)}"


def classify_files(
    cascade: Cascade,
    files: Iterable[str],
    sink: Sink,
    *,
    failed: Callable[[str, ServeError], None],
    advance: Callable[[], object],
) -> Summary:
    """Every file that the sink has no line for, in order. `failed` is told of bad images, `advance` called with every
    image. However it ends, what was answered is flushed, unless it is the sink that failed."""
    skipped = failures = 0
    exits = [0] * cascade.engine.num_stages

    def left() -> Iterable[tuple[str, str]]:
        nonlocal skipped
        for file in files:
            if file in sink.done:
                skipped += 1
                advance()
            else:
                yield file, file

    began = time.monotonic()
    try:
        with closing(cascade.classify(left())) as answers:
            for file, answer in answers:
                sink.add(file, answer)
                if isinstance(answer, ServeError):
                    failures += 1
                    failed(file, answer)
                else:
                    exits[answer.exit - 1] += 1
                advance()
    finally:
        sink.flush()
    seconds = time.monotonic() - began
    answered, costs = sum(exits), cascade.bundle.manifest.stage_gmacs
    fill = [rows / batches if batches else None for rows, batches in zip(cascade.rows, cascade.batches, strict=True)]
    return Summary(
        images=answered + failures,
        failed=failures,
        skipped=skipped,
        failed_before=sink.failed,
        seconds=seconds,
        images_per_s=(answered + failures) / seconds,
        exits=exits,
        gmacs=sum(n * cost for n, cost in zip(exits, costs, strict=True)) / answered if answered else None,
        batch_fill=fill,
        model=cascade.bundle.manifest.name,
        version=cascade.bundle.manifest.version,
        engine=cascade.engine.name,
        device=cascade.engine.device,
        target=cascade.solution.target,
        thresholds=cascade.point.thresholds,
        clamped=cascade.solution.clamped,
    )
