"""The frontier: for every mean cost the thresholds of best accuracy, and what they come to. Calibration solves it
(`server.calibration.sweep`); here a budget is a look-up.

Only numbers live here: no I/O, no clock. Legend: N calibration images, E exits, M bins of confidence per exit.

Theory of operation. An image leaves at the first exit whose confidence is >= that exit's threshold, so the mean cost is

    F = C1 + (C2-C1) P(c1<t1) + (C3-C2) P(c1<t1, c2<t2)

with C the cumulative cost of a stage, and the accuracy has the same form with the change in correctness from exit to
exit in place of the cost.

Confidences are float32 and a frontier's thresholds are confidences that were seen, exactly representable in float32
as well as in float64: it makes no difference in which of the two an engine compares, and ties fall as they did here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from server.documents import parse_json, shown

FORMAT_VERSION = 1
Criterion = Literal["max_probability", "entropy", "margin"]
"""What an exit's confidence is: the largest probability; 1 - H(p) / log K of all K; or the largest less the second.
From 0 to 1, larger is surer.

The exported graph computes it; a frontier's thresholds, and a request's min_confidence, are on that scale."""
Source = Literal["calibration", "imported"]
"""Whose thresholds: solved from records of images, or brought along by a published checkpoint, without any."""
NEVER = 2.0
"""A threshold that no confidence reaches: nobody leaves at this exit."""

MAX_RECORDS = 16_384  # as float32 for three exits 180 KB of frontier.json
_Z_95 = 1.6448536269514722  # one-sided 95 % point of the normal distribution
NDIGITS = 9  # of costs and accuracies; 1e-9 GMAC is one MAC


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """One operating point on the frontier, with what calibration says of it."""

    thresholds: tuple[float, ...]  # one per exit, the last is 0.0; NEVER where nobody leaves
    accuracy: float
    accuracy_lower: float | None  # one-sided 95 % Wilson bound, for this row taken alone; None: images unknown
    gmacs: float  # mean per image
    exit_fractions: tuple[float, ...]  # one per exit
    ms: float | None = None  # mean engine time per image; not kept with the rest: it is another on every machine


@dataclass(frozen=True, slots=True)
class Mixture:
    """Two rows of which every request meets one, chosen at random, and what that comes to on average."""

    cheaper: FrontierRow
    dearer: FrontierRow
    share: float  # of the requests that meet the dearer row, 0 to 1

    @property
    def accuracy(self) -> float:
        return self._mean(self.cheaper.accuracy, self.dearer.accuracy)

    @property
    def gmacs(self) -> float:
        return self._mean(self.cheaper.gmacs, self.dearer.gmacs)

    @property
    def exit_fractions(self) -> tuple[float, ...]:
        return tuple(map(self._mean, self.cheaper.exit_fractions, self.dearer.exit_fractions))

    def _mean(self, cheaper: float, dearer: float) -> float:
        return round((1 - self.share) * cheaper + self.share * dearer, NDIGITS)


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """What calibration saw, image by image."""

    confidence: NDArray[np.float32]  # (E-1, N); the last exit takes all, whatever its confidence
    correct: NDArray[np.bool_]  # (E, N)


@dataclass(frozen=True, slots=True)
class Certificate:
    """With probability `confidence` over the draw of the `samples` images, every row of the frontier that costs `gmacs`
    or more loses at most `max_accuracy_loss` against the last exit, on traffic like those images."""

    max_accuracy_loss: float
    confidence: float
    samples: int
    gmacs: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """Rows from cheapest to most accurate: cost and accuracy both rise strictly. The last row is the knee."""

    rows: tuple[FrontierRow, ...]
    stage_gmacs: tuple[float, ...]  # (E,) cumulative
    samples: int  # images calibrated on; 0 where it was imported
    key: str  # what it was calibrated for, see Manifest.frontier_key
    exit_accuracy: tuple[float, ...]  # (E,) were every image to leave there
    records: Records | None = field(compare=False, repr=False)  # at most MAX_RECORDS of the samples, evenly drawn
    criterion: str = "max_probability"  # see Criterion
    source: Source = "calibration"
    certificate: Certificate | None = None
    hull: tuple[FrontierRow, ...] = field(init=False, compare=False, repr=False)  # see upper_hull

    def __post_init__(self) -> None:
        object.__setattr__(self, "hull", tuple(upper_hull(self.rows)))

    @property
    def num_exits(self) -> int:
        return len(self.stage_gmacs)

    @property
    def knee(self) -> FrontierRow:
        """The most accurate row; beyond its cost, more cost buys nothing."""
        return self.rows[-1]

    def by_gmacs(self, gmacs: float) -> FrontierRow | None:
        """The best row that costs at most `gmacs` (the knee for any above); None where even row 0 costs more."""
        at = bisect_right(self.rows, gmacs, key=lambda row: row.gmacs)
        return self.rows[at - 1] if at else None

    def by_accuracy(self, accuracy: float) -> FrontierRow | None:
        """The cheapest row that is at least this accurate; None where even the knee is not."""
        at = bisect_left(self.rows, accuracy, key=lambda row: row.accuracy)
        return self.rows[at] if at < len(self.rows) else None

    def mixture(self, gmacs: float) -> Mixture | None:
        """The most accurate mixture of rows whose mean cost is `gmacs`: no other random choice among rows does better.

        It mixes the two vertices of the upper hull on either side. The knee alone for any cost above it; None where
        even row 0 costs more.
        """
        hull = self.hull
        at = bisect_right(hull, gmacs, key=lambda row: row.gmacs)
        if at == 0:
            return None
        if at == len(hull):
            return Mixture(self.knee, self.knee, 0.0)
        cheaper, dearer = hull[at - 1], hull[at]
        return Mixture(cheaper, dearer, (gmacs - cheaper.gmacs) / (dearer.gmacs - cheaper.gmacs))

    def predict(self, thresholds: Sequence[float]) -> FrontierRow | None:
        """What any thresholds would do on the calibration records: E of them, or E-1 (the last is 0). None where there
        are no records."""
        return None if self.records is None else evaluate_thresholds(self.records, thresholds, self.stage_gmacs)

    def to_json(self) -> str:
        """Stable text, one row a line."""
        head = {
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "criterion": self.criterion,
            "source": self.source,
            "samples": self.samples,
            "stage_gmacs": self.stage_gmacs,
            "exit_accuracy": self.exit_accuracy,
            "certificate": asdict(self.certificate) if self.certificate else None,
        }
        rows, records = [asdict(row) for row in self.rows], _describe_records(self.records)
        head["sha256"] = _digest({**head, "rows": rows, "records": records})
        lines = [f'"{name}": {_dump(value)},' for name, value in head.items()]
        lines += ['"rows": [', ",\n".join(map(_dump, rows)), "],"]
        lines += [f'"records": {_dump(records)}']
        return "{\n" + "\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, content: bytes | str) -> Frontier:
        """Raises ValueError, with the cause in one line, for anything but a sound frontier."""
        document = parse_json(content.encode() if isinstance(content, str) else content)
        try:
            found = document["format_version"]
            if type(found) is not int or found != FORMAT_VERSION:
                raise ValueError(f"format version {shown(found)}, this server reads {FORMAT_VERSION}")
            if document.pop("sha256", None) != _digest(document):
                raise ValueError("its sha256 does not fit: it was changed since it was calibrated; see: dvt calibrate")
            stage_gmacs = tuple(map(float, document["stage_gmacs"]))
            frontier = cls(
                rows=tuple(_parserow_of(row) for row in document["rows"]),
                stage_gmacs=stage_gmacs,
                samples=_whole(document["samples"]),
                key=str(document["key"]),
                exit_accuracy=tuple(map(float, document["exit_accuracy"])),
                records=_parse_records(document["records"], len(stage_gmacs)),
                criterion=str(document["criterion"]),
                source=document["source"],
                certificate=_parse_certificate(document["certificate"]),
            )
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a frontier ({type(error).__name__}: {error})") from None
        frontier._check()
        return frontier

    def _check(self) -> None:
        if not self.rows:
            raise ValueError("no rows")
        if not all(map(math.isfinite, (*self.stage_gmacs, *self.exit_accuracy))) or self.samples < 0:
            raise ValueError("costs, accuracies or samples are no sound numbers")
        if not all(a < b for a, b in pairwise((0.0, *self.stage_gmacs))):
            raise ValueError("stage_gmacs do not rise from above 0")
        exits = self.num_exits
        for number, row in enumerate(self.rows):
            lower = row.accuracy if row.accuracy_lower is None else row.accuracy_lower
            numbers = (*row.thresholds, *row.exit_fractions, row.accuracy, lower, row.gmacs)
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"row {number} holds a number that is not finite")
            if len(row.thresholds) != exits or len(row.exit_fractions) != exits or row.thresholds[-1] != 0:
                raise ValueError(f"row {number} does not have {exits} thresholds and fractions, the last threshold 0")
        if not all(a.gmacs < b.gmacs and a.accuracy < b.accuracy for a, b in pairwise(self.rows)):
            raise ValueError("rows do not rise in cost and accuracy")
        if self.rows[0].gmacs <= 0:  # loops divide by what an image costs
            raise ValueError("row 0 costs nothing")
        if len(self.exit_accuracy) != exits:
            raise ValueError(f"exit_accuracy does not have {exits} values")
        if self.source not in get_args(Source):
            raise ValueError(f"source {shown(self.source)} is none of {', '.join(get_args(Source))}")


def with_ms(rows: Sequence[FrontierRow], stage_ms: Sequence[float]) -> tuple[FrontierRow, ...]:
    """The rows with their milliseconds. stage_ms (E,): what an image takes in each stage that it reaches."""
    return tuple(
        replace(row, ms=sum(sum(row.exit_fractions[stage:]) * ms for stage, ms in enumerate(stage_ms))) for row in rows
    )


def upper_hull(rows: Sequence[FrontierRow]) -> list[FrontierRow]:
    """The rows, of those that rise in cost and accuracy, that no mixture of two others matches: ends included, accuracy
    gained per cost falls from each to the next (Andrew's monotone chain, 1979)."""
    hull: list[FrontierRow] = []
    for row in rows:
        while len(hull) >= 2 and _on_or_below(hull[-1], hull[-2], row):
            hull.pop()
        hull.append(row)
    return hull


def _on_or_below(row: FrontierRow, left: FrontierRow, right: FrontierRow) -> bool:
    """Whether `row` does not rise above the straight line from `left` to `right`."""
    rise, run = right.accuracy - left.accuracy, right.gmacs - left.gmacs
    return (row.accuracy - left.accuracy) * run <= rise * (row.gmacs - left.gmacs)


def wilson_lower(hits: int, samples: int) -> float:
    """One-sided 95 % lower bound on a rate (Wilson 1927): stays sound near 0 and 1, where mean - z*sigma does not."""
    rate, z2 = hits / samples, _Z_95**2
    spread = _Z_95 * math.sqrt(rate * (1 - rate) / samples + z2 / (4 * samples**2))
    return max(0.0, (rate + z2 / (2 * samples) - spread) / (1 + z2 / samples))


def evaluate_thresholds(records: Records, thresholds: Sequence[float], stage_gmacs: ArrayLike) -> FrontierRow:
    """What thresholds do to recorded images: E of them, or E-1 (the last is 0). Raises ValueError for another count."""
    exits = len(records.correct)
    leaving = who_leaves(records, thresholds)
    counts = [int(np.count_nonzero(here)) for here in leaving]
    hits = sum(int(np.count_nonzero(here & right)) for here, right in zip(leaving, records.correct, strict=True))
    return row_of((*map(float, thresholds[: exits - 1]), 0.0), counts, hits, np.asarray(stage_gmacs, dtype=np.float64))


def exits_taken(records: Records, thresholds: Sequence[float]) -> NDArray[np.intp]:
    """(N,) where thresholds let each recorded image out: the first exit from 0 on that is sure. Raises as above."""
    taken: NDArray[np.intp] = np.stack(who_leaves(records, thresholds)).argmax(axis=0)
    return taken


def who_leaves(records: Records, thresholds: Sequence[float]) -> list[NDArray[np.bool_]]:
    """By exit, (N,) whether each recorded image leaves there: one exit of every image. Raises as above.

    Bits and no indices: of 16 thousand images in some 25 microseconds, which a server has on its event loop.
    """
    exits = len(records.correct)
    if len(thresholds) not in (exits - 1, exits):
        raise ValueError(f"{len(thresholds)} thresholds for {exits} exits")
    leaving, left = [], np.ones(records.correct.shape[1], dtype=np.bool_)
    for confidence, threshold in zip(records.confidence, thresholds, strict=False):
        sure = confidence >= _least_float32(threshold)
        sure &= left
        left ^= sure
        leaving.append(sure)
    return [*leaving, left]


def _least_float32(threshold: float) -> np.float32:
    """The least float32 that is >= a threshold: who reaches the one reaches the other, and no confidence is rounded."""
    with np.errstate(over="ignore"):  # infinite is right for what lies beyond
        nearest = np.float32(threshold)
    return nearest if float(nearest) >= threshold else np.nextafter(nearest, np.float32(np.inf))


def mean_cost(counts: Sequence[ArrayLike], samples: int, costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean GMAC per image, where counts[k] images leave at exit k; scalars or tables. One home, so that all agree."""
    total = np.zeros((), dtype=np.float64)
    for count, cost in zip(counts, costs, strict=True):
        total = total + np.asarray(count, dtype=np.float64) * cost
    return np.asarray(np.round(total / samples, NDIGITS))


def row_of(thresholds: tuple[float, ...], counts: Sequence[int], hits: int, costs: NDArray[np.float64]) -> FrontierRow:
    samples = sum(counts)
    return FrontierRow(
        thresholds=thresholds,
        accuracy=round(hits / samples, NDIGITS),
        accuracy_lower=round(wilson_lower(hits, samples), NDIGITS),
        gmacs=float(mean_cost(counts, samples, costs)),
        exit_fractions=tuple(round(n / samples, NDIGITS) for n in counts),
    )


def _parserow_of(row: dict[str, Any]) -> FrontierRow:
    lower, ms = row["accuracy_lower"], row["ms"]
    return FrontierRow(
        thresholds=tuple(map(float, row["thresholds"])),
        accuracy=float(row["accuracy"]),
        accuracy_lower=None if lower is None else float(lower),
        gmacs=float(row["gmacs"]),
        exit_fractions=tuple(map(float, row["exit_fractions"])),
        ms=None if ms is None else float(ms),
    )


def _parse_certificate(document: dict[str, Any] | None) -> Certificate | None:
    if document is None:
        return None
    loss, confidence, gmacs = (float(document[name]) for name in ("max_accuracy_loss", "confidence", "gmacs"))
    if not all(map(math.isfinite, (loss, confidence, gmacs))):
        raise ValueError("the certificate holds a number that is not finite")
    return Certificate(loss, confidence, int(document["samples"]), gmacs)


def _describe_records(records: Records | None) -> dict[str, Any] | None:
    if records is None:
        return None
    return {
        "count": records.correct.shape[1],
        "confidence": _encode(records.confidence.astype("<f4").tobytes()),
        "correct": _encode(np.packbits(records.correct).tobytes()),
    }


def _parse_records(document: dict[str, Any] | None, exits: int) -> Records | None:
    if document is None:
        return None
    count = int(document["count"])
    confidence = np.frombuffer(base64.b64decode(document["confidence"], validate=True), dtype="<f4")
    bits = np.frombuffer(base64.b64decode(document["correct"], validate=True), dtype=np.uint8)
    if confidence.size != (exits - 1) * count or bits.size != math.ceil(exits * count / 8) or count < 1:
        raise ValueError(f"records: sizes do not fit {count} images and {exits} exits")
    correct = np.unpackbits(bits, count=exits * count).astype(bool)
    return Records(confidence.astype(np.float32).reshape(exits - 1, count), correct.reshape(exits, count))


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{shown(value)} is not a whole number")
    return value


def _digest(document: Mapping[str, Any]) -> str:
    """Of what a document says, however it is laid out."""
    return hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)
