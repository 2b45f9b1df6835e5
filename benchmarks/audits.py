"""What audits say beside the truth, as they were made once and as they are made now, while the load changes.

    python -m benchmarks.audits --out

A model of one device, in turns of a tenth of a second: it answers what arrives, in an overload by cheaper exits (as the
brownout does), and audits in the time that is left over, or in a small share of it that is theirs. What waits, which
requests are counted and with which weight is the server's own `Sample`. Costs are stated, images synthetic and seeded.

- before: requests chosen by a public hash of their id; what finds 256 waiting is dropped; a new budget drops what
  waits; audits run in left-over time alone.
- now, left-over time: drawn by lot; where 256 wait some stand for others; a new budget drops nothing.
- now: as well, and a hundredth of the device's time is theirs.

`true` is what all answers were worth: the chance that an answer at the exits in force was right, or wrong, as the last
exit would have been. Of several runs two shares are told: of those whose last interval encloses `true`; and of those
whose intervals were all right, one after each turn in which something was counted, about the answers that had been
counted or were stood for (before: about all so far, as nothing told which had been left out).
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import cascades
from benchmarks.harness import RESULTS, Options, Report, command_line, finish
from benchmarks.simulate import SAMPLES, profile_of
from benchmarks.virtual import Setup
from server.budget.audit import MAX_PENDING
from server.budget.confidence_sequence import ConfidenceSequence, Interval
from server.budget.sample import Kept, Sample
from server.calibration.sweep import sweep

GMACS = (0.4725, 1.4625, 3.4975)  # T2T-ViT-12, cumulative
PROFILE = ((0.2, 0.2, 0.2), (0.02, 0.06, 0.15))  # milliseconds a batch, and an image of it, by stage
BATCH_SIZES = (128, 128, 128)
BUDGET = 1.25  # GMACs an image

TURN_S = 0.1
FRACTION = 0.01  # of the requests
SHARE = 0.01  # of the device's time, for audits whatever waits
CYCLE_S = 20.0

# (load, of the capacity at the budget; part of the cycle): in the last, 90 % of the traffic come in peaks.
LOADS: dict[str, Sequence[tuple[float, float]]] = {
    "0.5": [(0.5, 1.0)],
    "1": [(1.0, 1.0)],
    "2": [(2.0, 1.0)],
    "0.3 and 2 in turns": [(0.3, 0.425), (2.0, 0.575)],
}
SWAP_LOADS = (0.9, 1.0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each run (default %(default)s)")
    parser.add_argument("--runs", type=int, default=60, help="for the share of right intervals (default %(default)s)")
    parser.add_argument("--swap-every", type=float, default=2.0, help="seconds (default %(default)s)")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for the .json")
    options = parser.parse_args(arguments)
    options.command = command_line("audits", sys.argv[1:] if arguments is None else arguments)
    return finish(measure(options), options)


# --- the ways to audit ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Chosen:
    """One request that was chosen."""

    needs_run: bool
    agrees: bool
    expected: float  # chance of agreement at the exits that were in force


class Way(Protocol):
    share: float  # of the device's time that is for audits whatever waits
    chosen: int
    audited: int
    dropped: int  # because the budget changed

    def add(self, one: Chosen) -> None: ...
    def next(self) -> Chosen | None: ...
    def done(self) -> None: ...
    def swap(self) -> None: ...
    def interval(self) -> Interval: ...
    def truth(self) -> float:
        """Expected agreement of what the interval speaks of."""
        ...


@dataclass
class Before:
    share: float = 0.0
    chosen: int = 0
    audited: int = 0
    dropped: int = 0
    _expected: float = 0.0
    _waiting: deque[Chosen] = field(default_factory=deque)
    _sequence: ConfidenceSequence = field(default_factory=ConfidenceSequence)

    def add(self, one: Chosen) -> None:
        self.chosen += 1
        self._expected += one.expected
        if len(self._waiting) < MAX_PENDING:
            self._waiting.append(one)

    def next(self) -> Chosen | None:
        return self._waiting[0] if self._waiting else None

    def done(self) -> None:
        self.audited += 1
        self._sequence.observe(float(self._waiting.popleft().agrees))

    def swap(self) -> None:
        self.dropped += len(self._waiting)
        self._waiting.clear()
        self._sequence = ConfidenceSequence()

    def interval(self) -> Interval:
        return self._sequence.interval()

    def truth(self) -> float:
        return self._expected / self.chosen


class Now:
    dropped = 0

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self._sample: Sample[Chosen] = Sample(MAX_PENDING, 0, random.Random(seed))
        self._underway: Kept[Chosen] | None = None
        self._version = 0
        self._expected: list[float] = [0.0]  # sums over the first of the chosen
        self._spoken_of = 0

    @property
    def chosen(self) -> int:
        return self._sample.since_start().chosen

    @property
    def audited(self) -> int:
        return self._sample.since_start().images

    def add(self, one: Chosen) -> None:
        self._sample.add(one, self._version)
        self._expected.append(self._expected[-1] + one.expected)

    def next(self) -> Chosen | None:
        self._underway = self._underway or self._sample.take()
        return self._underway.item if self._underway else None

    def done(self) -> None:
        assert self._underway is not None
        self._sample.count(self._underway, float(self._underway.item.agrees), 0.0)
        self._spoken_of += self._underway.stands_for
        self._underway = None

    def swap(self) -> None:
        self._version += 1
        self._sample.retune(self._version)

    def interval(self) -> Interval:
        return self._sample.since_start().agreement

    def truth(self) -> float:
        return self._expected[self._spoken_of] / self._spoken_of


WAYS: dict[str, Callable[[int], Way]] = {
    "before": lambda _: Before(),
    "now, left-over time": lambda seed: Now(0.0, seed),
    "now": lambda seed: Now(SHARE, seed),
}


# --- the device -------------------------------------------------------------------------------------------------------


@dataclass
class Device:
    """What answers: its exits, by load, and what they are worth."""

    capacity: float  # images a second at the budget
    audit_s: float  # one image through all stages, alone
    agrees: dict[float, np.ndarray]  # by load: of each record
    early: dict[float, np.ndarray]

    @classmethod
    def make(cls, seed: int) -> Device:
        records = cascades.synthetic(SAMPLES, seed)
        frontier = sweep(records.confidence, records.correct, GMACS)
        profile = profile_of(*PROFILE)
        capacity, agrees, early = 0.0, {}, {}
        for load in {load for parts in LOADS.values() for load, _ in parts} | set(SWAP_LOADS):
            row = frontier.by_gmacs(BUDGET / max(1.0, load))
            assert row is not None
            sure = [*(c >= t for c, t in zip(records.confidence, row.thresholds, strict=False)), True]
            exit_ = np.select(sure, range(3)) * np.ones(SAMPLES, int)
            said = records.correct[exit_, np.arange(SAMPLES)]
            agrees[load], early[load] = said == records.correct[-1], exit_ < 2  # right both, or wrong both
            if load <= 1:
                capacity = Setup(profile, records, row.thresholds, BATCH_SIZES).capacity
        audit_s = sum(profile.seconds(stage, 1) for stage in (1, 2, 3))
        return cls(capacity, audit_s, agrees, early)


def turns(parts: Sequence[tuple[float, float]], seconds: float) -> Iterator[float]:
    """The load of each turn."""
    ends = np.cumsum([part for _, part in parts])
    for turn in range(round(seconds / TURN_S)):
        at = (turn * TURN_S / CYCLE_S) % 1.0
        yield parts[min(int(np.searchsorted(ends, at, side="right")), len(parts) - 1)][0]


def run(
    device: Device,
    way: Way,
    parts: Sequence[tuple[float, float]],
    seconds: float,
    seed: int,
    swap_every: float | None = None,
) -> tuple[bool | None, float]:
    """Whether every look was right, None without any; and what all answers were worth."""
    rng = np.random.default_rng(seed)
    right: bool | None = None
    credit = worth = answers = 0.0
    for turn, load in enumerate(turns(parts, seconds)):
        rate = load * device.capacity * TURN_S
        if swap_every and turn and turn % round(swap_every / TURN_S) == 0:
            way.swap()
        agrees, early = device.agrees[load], device.early[load]
        expected = float(agrees.mean())
        for record in rng.integers(SAMPLES, size=rng.poisson(rate * FRACTION)).tolist():
            way.add(Chosen(bool(early[record]), bool(agrees[record]), expected))
        worth, answers = worth + expected * rate, answers + rate
        credit += TURN_S * max(way.share, 1 - load)
        counted = False
        while (one := way.next()) is not None:
            if one.needs_run:
                if credit < device.audit_s:
                    break
                credit -= device.audit_s
            way.done()
            counted = True
        else:
            credit = 0.0  # time in which nothing waits is not saved up
        if counted:
            right = right is not False and encloses(way.interval(), way.truth())
    return right, worth / answers


# --- the report -------------------------------------------------------------------------------------------------------


def measure(options: Options) -> Report:
    device = Device.make(options.seed)
    report = Report("audits", figures={"seed": options.seed, "profile_ms": PROFILE, "budget_gmacs": BUDGET})
    text = f"{device.capacity:.0f} images/s, an audit {1000 * device.audit_s:.2f} ms"
    report.add("capacity at the budget", text, capacity=device.capacity, audit_s=device.audit_s)
    found: dict[str, Any] = {}
    for name, parts in LOADS.items():
        for way_name, make in WAYS.items():
            way = make(options.seed)
            _, true = run(device, way, parts, options.seconds, options.seed)
            looks, ends = [], []
            for seed in range(options.seed + 1, options.seed + 1 + options.runs):
                one = make(seed)
                looked, all_of_it = run(device, one, parts, options.seconds, seed)
                if looked is not None:
                    looks.append(looked)
                    ends.append(encloses(one.interval(), all_of_it))
            figures = {**told(way, true), "right_at_every_look": mean(looks), "right_in_the_end": mean(ends)}
            found[f"{name}: {way_name}"] = figures
            words = f"; right in the end {mean(ends):.0%}, at every look {mean(looks):.0%} of the runs" if looks else ""
            report.add(f"load {name}: {way_name}", in_words(figures) + words)
    report.figures["loads"] = found
    swaps: dict[str, Any] = {}
    for load, (way_name, make) in product(SWAP_LOADS, WAYS.items()):
        way = make(options.seed)
        true = run(device, way, [(load, 1.0)], options.seconds, options.seed, options.swap_every)[1]
        figures = {**told(way, true), "dropped": way.dropped}
        swaps[f"{load:g}: {way_name}"] = figures
        report.add(
            f"load {load:g}, a budget every {options.swap_every:g} s: {way_name}",
            f"{in_words(figures)}, dropped by new budgets {way.dropped}",
        )
    report.figures["swaps"] = swaps
    clients = constant_id(options.seed)
    for name, share in clients.items():
        report.add(f"a client with a tenth of the requests: {name}", f"{share:.1%} of the sample")
    report.figures["constant_id"] = clients
    return report


def encloses(interval: Interval, truth: float) -> bool:
    return interval.low is not None and interval.high is not None and interval.low <= truth <= interval.high


def mean(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None


def told(way: Way, true: float) -> dict[str, Any]:
    interval = way.interval()
    return {
        "true": true,
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "chosen": way.chosen,
        "audited": way.audited / way.chosen,
    }


def in_words(figures: dict[str, Any]) -> str:
    said = "nothing"
    if figures["mean"] is not None:
        said = f"{figures['mean']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"
    return f"true {figures['true']:.3f}, said {said}, audited {figures['audited']:.1%} of {figures['chosen']}"


def constant_id(seed: int, requests: int = 100_000) -> dict[str, float]:
    """What share of the sample a client gets that makes a tenth of the requests, all of them under one id."""

    def place(request_id: str) -> float:  # the hash that chose before
        digest = hashlib.blake2b(request_id.encode(), digest_size=6, salt=b"audit").digest()
        return int.from_bytes(digest) / 2**48

    lots = random.Random(seed)
    mine = [n % 10 == 0 for n in range(requests)]
    in_, out = (
        next(one for n in range(10_000) if (place(one := f"id-{n}") < FRACTION) is chosen) for chosen in (True, False)
    )
    found = {}
    for name, chosen in (
        ("before, an id that is chosen", [place(in_ if my else str(n)) < FRACTION for n, my in enumerate(mine)]),
        ("before, an id that is not", [place(out if my else str(n)) < FRACTION for n, my in enumerate(mine)]),
        ("now, whatever the id", [lots.random() < FRACTION for _ in mine]),
    ):
        found[name] = sum(my and one for my, one in zip(mine, chosen, strict=True)) / sum(chosen)
    return found


if __name__ == "__main__":
    sys.exit(main())
