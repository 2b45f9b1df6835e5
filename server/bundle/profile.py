"""What a batch costs in seconds, by stage and size: the numbers that batches are formed and budgets are solved with.

Only numbers live here: no clock, no engine, no files. A stage's cost is c(n) = a + b*n seconds for n images where that
straight line fits what was measured within 10 %, else the measured points joined, made monotone. Stages count from 1.

A profile holds for one model on one engine and machine, its identity; another one is measured anew
(`server.calibration.profiling`). While a server runs, `LiveProfile` follows what its batches really take; the
milliseconds of `GET /frontier` stay those of the start.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from server.documents import parse_json, shown

FORMAT_VERSION = 1
PAYS = 0.95  # of the best speed
TOLERANCE = 0.10  # a straight line that is off by more than this is not used

_WEIGHT = 1 / 32  # of one batch in a live correction: half of a change is learnt in 22 batches
_CLIP = 0.5  # of the logarithm: a batch that took 100 times as long counts as one that took e^0.5 = 1.65 times as long
_QUICK = 3.5  # of the logarithm the other way: no accident makes a batch quick, but clocks may err
_TRUSTED_S = 5.0  # seconds for which a correction stands without a batch; then it fades as fast


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage. Measured at `batches`; what lies between and beyond follows."""

    batches: tuple[int, ...]  # sizes, rising
    p50: tuple[float, ...]  # seconds
    p99: tuple[float, ...]
    fixed: float = field(init=False)  # a, seconds a batch
    per_image: float = field(init=False)  # b, seconds an image
    linear: bool = field(init=False)
    _joints: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for points that are none."""
        sizes, points = self.batches, self.p50
        if not sizes or len(points) != len(sizes) or len(self.p99) != len(sizes):
            raise ValueError("as many seconds as batch sizes are needed, at least one")
        if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"batch sizes {list(sizes)} do not rise from 1 or more")
        if not all(math.isfinite(s) and s >= 0 for s in (*points, *self.p99)):
            raise ValueError("seconds must be finite and not negative")
        a, b = _fit(sizes, points)
        off = max(abs(a + b * n - s) - TOLERANCE * s for n, s in zip(sizes, points, strict=True))
        object.__setattr__(self, "fixed", a)
        object.__setattr__(self, "per_image", b)
        object.__setattr__(self, "linear", off <= 1e-12)
        object.__setattr__(self, "_joints", _monotone(points))

    @classmethod
    def line(cls, fixed: float, per_image: float, largest: int = 256) -> StageCost:
        """c(n) = fixed + per_image * n, as stated and not measured."""
        points = (fixed + per_image, fixed + per_image * largest)
        return cls((1, largest), points, points)

    def seconds(self, batch: int) -> float:
        """Of a batch of so many images, p50. Beyond the largest measured one its cost per image stays."""
        if self.linear:
            return self.fixed + self.per_image * batch
        sizes, joints = self.batches, self._joints
        if batch <= sizes[0]:
            return joints[0]
        if batch >= sizes[-1]:
            return joints[-1] * batch / sizes[-1]
        at = bisect_right(sizes, batch)
        share = (batch - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return joints[at - 1] + share * (joints[at] - joints[at - 1])

    def scaled(self, factor: float) -> StageCost:
        """The same stage where everything takes `factor` times as long."""
        return replace(self, p50=tuple(s * factor for s in self.p50), p99=tuple(s * factor for s in self.p99))


@dataclass(frozen=True, slots=True)
class Identity:
    """What a profile was measured on, and holds for."""

    model: str  # version of the bundle
    precision: str
    runtime: str  # that ran the stages, with its version
    device: str  # CPU model or GPU name
    concurrency: int  # batches that ran at once: on a CPU they slow one another down

    def misfit(self, other: Identity) -> str | None:
        """The first thing in which the other is another one, in words; None where the profile of one is the other's."""
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if mine != theirs:
                return f"{part.name} {mine}, not {theirs}"
        return None


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """All stages of one engine on one machine. Without an identity: as stated, not measured."""

    stages: tuple[StageCost, ...]
    identity: Identity | None = None

    @classmethod
    def lines(cls, fixed: Sequence[float], per_image: Sequence[float], largest: int = 256) -> LatencyProfile:
        """a_i and b_i, in seconds, as stated and not measured."""
        return cls(tuple(StageCost.line(a, b, largest) for a, b in zip(fixed, per_image, strict=True)))

    def seconds(self, stage: int, batch: int) -> float:
        return self.stages[stage - 1].seconds(batch)

    def sizes_that_pay(self) -> tuple[int, ...]:
        """By stage the smallest measured batch that is nearly as fast an image as the best: larger ones only wait."""
        sizes = []
        for stage in self.stages:
            speeds = [size / seconds for size, seconds in zip(stage.batches, stage.p50, strict=True)]
            sizes.append(next(n for n, speed in zip(stage.batches, speeds, strict=True) if speed >= PAYS * max(speeds)))
        return tuple(sizes)

    def image_seconds(self, batches: Sequence[int]) -> tuple[float, ...]:
        """Of one image in each stage, in a batch of the size given for the stage."""
        return tuple(cost.seconds(batch) / batch for cost, batch in zip(self.stages, batches, strict=True))

    def to_json(self) -> str:
        """Stable text, one stage a line. `fixed`, `per_image` and `linear` are for the reader: they follow from p50.

        Raises ValueError for a profile without an identity: nobody could tell whom it is for.
        """
        if self.identity is None:
            raise ValueError("a profile that was not measured cannot be kept")
        lines = [
            f'"format_version": {FORMAT_VERSION},',
            f'"identity": {_dump(asdict(self.identity))},',
            '"stages": [',
            ",\n".join(_dump(_describe(stage)) for stage in self.stages),
            "]",
        ]
        return "{\n" + "\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, content: bytes | str) -> LatencyProfile:
        """Raises ValueError, with the cause in one line, for anything but a sound profile."""
        document = parse_json(content.encode() if isinstance(content, str) else content)
        try:
            found = document["format_version"]
            if found != FORMAT_VERSION:
                raise ValueError(f"format version {shown(found)}, this server reads {FORMAT_VERSION}")
            stages = tuple(_parse_stage(stage) for stage in document["stages"])
            identity = _parse_identity(document["identity"])
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a latency profile ({type(error).__name__}: {error})") from None
        if not stages:
            raise ValueError("no stages")
        return cls(stages, identity)


class LiveProfile:
    """A profile that follows the machine: one factor per stage, moved by every batch towards what it really took.

    The factor is a running mean in the logarithm. What a batch adds to it is clipped (Huber 1964), so that a batch that
    the machine slept through moves it by 1.6 % at most, while a machine that has changed is followed all the way. No
    accident makes a batch quicker than it can be: one that took less counts nearly as it is, 10 % at most.

    What is believed decides what is tried: a stage that is held to be too slow gets few batches that could prove
    otherwise. So a belief in a slow machine that nothing has tested for a while goes back to what was measured. One in
    a quick machine stands: it is tested as soon as anybody comes.
    """

    def __init__(self, profile: LatencyProfile) -> None:
        self._measured = profile.stages
        self._factors = [1.0] * len(profile.stages)
        self._untested = [0.0] * len(profile.stages)  # seconds since the last batch

    def observe(self, stage: int, batch: int, seconds: float) -> None:
        """A batch of so many images came back after so many seconds."""
        believed = self.seconds(stage, batch)
        if believed > 0 and seconds > 0:
            off = max(-_QUICK, min(_CLIP, math.log(seconds / believed)))
            self._factors[stage - 1] *= math.exp(_WEIGHT * off)
        self._untested[stage - 1] = 0.0

    def forget(self, passed: float) -> None:
        """So many seconds went by, with requests about."""
        for stage, untested in enumerate(self._untested):
            self._untested[stage] = untested + passed
            if self._untested[stage] > _TRUSTED_S and self._factors[stage] > 1:
                self._factors[stage] **= math.exp(-passed / _TRUSTED_S)

    def seconds(self, stage: int, batch: int) -> float:
        """Of a batch of so many images, as believed now."""
        return self._measured[stage - 1].seconds(batch) * self._factors[stage - 1]

    @property
    def stages(self) -> tuple[StageCost, ...]:
        """As believed now. Made anew at each call (some 0.1 ms): for a batch at a time there is `seconds`."""
        return tuple(cost.scaled(factor) for cost, factor in zip(self._measured, self._factors, strict=True))


def _fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b), neither negative: least squares of the relative error, so that small batches count as much as large."""
    n, s = np.asarray(sizes, dtype=np.float64), np.maximum(seconds, 1e-12)
    if len(n) == 1:
        return 0.0, float(s[0] / n[0])
    columns = np.stack([1 / s, n / s], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, np.ones(len(n)), rcond=None)
    if b < 0:
        return float((1 / s).sum() / (1 / s**2).sum()), 0.0
    if a < 0:
        return 0.0, float((n / s).sum() / ((n / s) ** 2).sum())
    return float(a), float(b)


def _monotone(seconds: Sequence[float]) -> tuple[float, ...]:
    """The rising sequence that is nearest in relative terms: neighbours that fall are pooled (Ayer et al. 1955).

    A running maximum would carry one slow point on to all sizes behind it.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, points
    for s in seconds:
        mean, weight, points = s, 1 / max(s, 1e-12) ** 2, 1
        while pools and pools[-1][0] > mean:
            before, its_weight, its_points = pools.pop()
            mean = (mean * weight + before * its_weight) / (weight + its_weight)
            weight, points = weight + its_weight, points + its_points
        pools.append((mean, weight, points))
    return tuple(mean for mean, _, points in pools for _ in range(points))


def _describe(stage: StageCost) -> Mapping[str, Any]:
    measured = {"batches": stage.batches, "p50": stage.p50, "p99": stage.p99}
    return {**measured, "fixed": stage.fixed, "per_image": stage.per_image, "linear": stage.linear}


def _parse_stage(document: Any) -> StageCost:
    sizes = document["batches"]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"batch sizes {shown(sizes)} are not whole numbers")
    return StageCost(tuple(sizes), tuple(map(float, document["p50"])), tuple(map(float, document["p99"])))


def _parse_identity(document: Any) -> Identity:
    return Identity(
        model=str(document["model"]),
        precision=str(document["precision"]),
        runtime=str(document["runtime"]),
        device=str(document["device"]),
        concurrency=int(document["concurrency"]),
    )


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
