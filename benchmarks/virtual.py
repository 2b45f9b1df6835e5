"""The server's own scheduler under a virtual clock: a discrete-event simulation of one device, or of several.

`Scheduler` is the real one, driven in the order in which `Batcher` drives it: what came back, what came in, what has
expired, what can run. Virtual are the clock, the arrivals, and the engine: a batch of n images at stage i takes
`profile.seconds(i, n)` and its confidences are read from records. One image a request. The same input gives the same
result, to the last bit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.bundle.frontier import Records
from server.bundle.profile import LatencyProfile
from server.cascade.scheduler import NORMAL, Batch, Load, Outcome, Policy, Priority, Request, Scheduler
from server.core import Answer, OperatingPoint, Slot, StageBatch, StageOutput
from server.engines.slots import SlotTable
from server.errors import DeadlineExceeded, Overloaded


@dataclass(frozen=True, eq=False)
class Setup:
    """What serves: everything but the policy and the traffic."""

    profile: LatencyProfile
    records: Records
    thresholds: tuple[float, ...]  # one per exit, the last is 0.0
    max_batch_sizes: tuple[int, ...]
    deadline_s: float = math.inf  # after the arrival
    max_queued_images: int = 1 << 20
    max_slots: int = 1 << 20
    executors: int = 1
    padded: bool = False  # a later stage costs what the whole first-stage batch would

    @property
    def reach(self) -> tuple[float, ...]:
        """s_i: the fraction of the records that reaches each stage."""
        inside = np.ones(self.records.correct.shape[1], dtype=bool)
        fractions = [1.0]
        for confidence, threshold in zip(self.records.confidence, self.thresholds, strict=False):
            inside &= confidence < threshold
            fractions.append(float(inside.mean()))
        return tuple(fractions)

    @property
    def image_s(self) -> float:
        """sum(s_i b_i): seconds of device time an image, at batches without end. A rate times this is the load."""
        return sum(s * stage.per_image for s, stage in zip(self.reach, self.profile.stages, strict=True))

    @property
    def capacity(self) -> float:
        """lambda_cap, images a second: every batch is full."""
        seconds = sum(
            share * self.profile.seconds(stage, size) / size
            for stage, (share, size) in enumerate(zip(self.reach, self.max_batch_sizes, strict=True), start=1)
        )
        return self.executors / seconds


class Fate(IntEnum):
    """How an image ended. Every image that arrives has one of these."""

    IN_FLIGHT = 0  # the simulation ended first
    IN_TIME = 1
    LATE = 2
    DEGRADED = 3  # answered with the prediction it had, as its deadline left no time for another stage
    EXPIRED = 4  # its deadline came and it had none
    REFUSED = 5  # at the door, or once it was clear that its deadline would come first


@dataclass(frozen=True, eq=False)
class Trace:
    """What happened. Legend: N images in order of arrival, E stages. Not answered: exit 0, times NaN."""

    arrivals: NDArray[np.float64]  # (N,) seconds
    fate: NDArray[np.int8]  # (N,) of Fate
    exit: NDArray[np.int8]  # (N,)
    latency: NDArray[np.float64]  # (N,) seconds from arrival to answer
    queue: NDArray[np.float64]  # (N,) seconds of it spent waiting
    compute: NDArray[np.float64]  # (N,) seconds of it spent in batches
    correct: NDArray[np.bool_]  # (N,)
    batches: NDArray[np.int64]  # (E,) batches run
    rows: NDArray[np.int64]  # (E,) images in them
    busy_s: float  # device time, all executors
    ended: float  # when the last event was
    executors: int

    def fraction(self, fate: Fate) -> float:
        return float(np.mean(self.fate == fate))

    @property
    def attainment(self) -> float:
        """The fraction of all arrivals that was answered in time by a threshold, not by its deadline."""
        return self.fraction(Fate.IN_TIME)

    def figures(self, costs: Sequence[float] | None = None, budget: float | None = None) -> dict[str, Any]:
        """All that is asked of a run, as numbers for a file. `costs`: (E,) cumulative, of an image that leaves at each
        exit; `budget`: the mean cost that is held."""
        answered = self.exit > 0
        span = max(self.arrivals[-1] - self.arrivals[0], 1e-12)
        found: dict[str, Any] = {
            "images": len(self.fate),
            "rate": len(self.fate) / span,
            "goodput": int((self.fate == Fate.IN_TIME).sum()) / span,
            "correct_in_time": float(np.mean(self.correct & np.isin(self.fate, (Fate.IN_TIME, Fate.DEGRADED)))),
            **{fate.name.lower(): self.fraction(fate) for fate in Fate},
            "fill": (self.rows / np.maximum(self.batches, 1)).tolist(),
            "batches": self.batches.tolist(),
            "utilisation": self.busy_s / max(self.ended - self.arrivals[0], 1e-12) / self.executors,
            "latency_s": quantiles(self.latency[answered]),
            "by_exit": {
                str(exit_): {
                    "share": float(np.mean(self.exit == exit_)),
                    "latency_s": quantiles(self.latency[self.exit == exit_]),
                    "queue_s": quantiles(self.queue[self.exit == exit_]),
                    "compute_s": quantiles(self.compute[self.exit == exit_]),
                }
                for exit_ in range(1, len(self.batches) + 1)
            },
        }
        if costs is not None and answered.any():
            paid = np.asarray(costs)[self.exit[answered] - 1]
            found["mean_cost"] = float(paid.mean())
            if budget is not None:
                windows = [paid[at : at + 10_000].mean() for at in range(0, max(1, len(paid) - 9_999), 10_000)]
                found["budget_error"] = max(abs(float(mean) / budget - 1) for mean in windows)
        return found


def quantiles(seconds: NDArray[np.float64]) -> dict[str, float] | None:
    if not len(seconds):
        return None
    return dict(zip(("p50", "p99", "p99.9"), np.quantile(seconds, (0.5, 0.99, 0.999)).tolist(), strict=True))


class VirtualEngine:
    """Knows what every exit says of every image, and what every batch costs; computes nothing.

    An image is the number of its arrival. It has one class, whose probability is 1 where the exit is right.
    """

    def __init__(self, setup: Setup, rows: NDArray[np.int64]) -> None:
        """`rows` (N,): the record of each arrival."""
        exits, samples = setup.records.correct.shape
        sure = np.ones((1, samples), np.float32)  # the last exit takes all
        self._confidence = np.concatenate([setup.records.confidence, sure])[:exits, rows]  # (E, N)
        self._right = setup.records.correct[:, rows].astype(np.float32)  # (E, N)
        self._setup = setup
        self._table: SlotTable[int] = SlotTable()
        self._whole = 0  # images in the newest first-stage batch

    @property
    def slots_in_use(self) -> int:
        return len(self._table)

    def run(self, batch: StageBatch) -> StageOutput:
        images: list[Any] = list(batch.pixels)
        if self._table.read(batch.slots) != (images if batch.stage > 1 else []):
            raise AssertionError("the state of another image")
        confidence = self._confidence[batch.stage - 1, images]
        states = [
            image if goes_on else None
            for image, goes_on in zip(images, (confidence < np.array(batch.thresholds)).tolist(), strict=True)
        ]
        slots = self._table.swap(batch.slots, states)
        return StageOutput(self._right[batch.stage - 1, images][:, None], confidence, slots)

    def seconds(self, batch: StageBatch) -> float:
        size = len(batch.pixels)
        if self._setup.padded:
            if batch.stage == 1:
                self._whole = size
            size = self._whole
        return self._setup.profile.seconds(batch.stage, size)

    def free(self, slots: Sequence[Slot]) -> None:
        self._table.free(slots)


@dataclass(frozen=True)
class Ticks:
    """A controller that acts by the clock: called every `period_s` with now and the load."""

    period_s: float
    act: Callable[[float, Load], None]


@dataclass(eq=False)
class Simulation:
    """One run. `arrivals` (N,) seconds, rising; `rows` (N,) which record each of them is. `deadlines` (N,), on the
    clock of the arrivals, and `priorities` where they are not the same for all.

    A policy that waits on purpose has a method `wake(now)`: when it wants to be asked again. `on_answer` hears of every
    answer, with the seconds it took; together with `retune` that is what a budget controller needs. The run ends when
    nothing is left to do, or once more than `give_up_after` images have missed their deadline.
    """

    setup: Setup
    policy: Policy
    arrivals: NDArray[np.float64]
    rows: NDArray[np.int64]
    on_answer: Callable[[Answer, float], None] | None = None
    ticks: Ticks | None = None
    give_up_after: float = math.inf
    point: OperatingPoint | None = None  # by default the setup's thresholds
    deadlines: NDArray[np.float64] | None = None  # (N,) when, in absolute seconds; by default the setup's
    priorities: Sequence[Priority] | None = None  # (N,) by default NORMAL
    missed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        setup, images = self.setup, len(self.arrivals)
        if len(self.rows) != images or not images:
            raise ValueError(f"{images} arrivals and {len(self.rows)} records to come")
        deadlines = self.arrivals + setup.deadline_s if self.deadlines is None else self.deadlines
        self._deadlines = deadlines.tolist()
        self._shortest = float((deadlines - self.arrivals).min())
        self.engine = VirtualEngine(setup, self.rows)
        self.scheduler = Scheduler(
            self.point or OperatingPoint(1, setup.thresholds),
            max_batch_sizes=setup.max_batch_sizes,
            max_queued_images=setup.max_queued_images,
            max_slots=setup.max_slots,
            policy=self.policy,
            seconds=setup.profile.seconds,
            executors=setup.executors,
        )
        self.now = 0.0
        self._number: dict[Request, int] = {}  # of the live requests
        self._fate = [int(Fate.IN_FLIGHT)] * images
        self._exit = [0] * images
        self._latency, self._queue, self._compute = ([math.nan] * images for _ in range(3))
        self._correct = [False] * images
        self._batches = [0] * len(setup.max_batch_sizes)
        self._images = [0] * len(setup.max_batch_sizes)
        self._busy_s = 0.0

    def retune(self, point: OperatingPoint) -> None:
        self._carry_out(self.scheduler.retune(point, self.now))

    def run(self) -> Trace:
        scheduler, times = self.scheduler, self.arrivals.tolist()
        wake = getattr(self.policy, "wake", None)
        running: list[tuple[float, int, Batch]] = []  # by when they end
        order = count()
        idle, arrived, images = self.setup.executors, 0, len(times)
        tick = times[0] + self.ticks.period_s if self.ticks else math.inf
        woken = math.inf
        while self.missed <= self.give_up_after:
            arrival = times[arrived] if arrived < images else math.inf
            if arrival == math.inf and not self._number and not running:
                break
            deadline = _or_never(scheduler.next_deadline())
            ended = running[0][0] if running else math.inf
            now = self.now = min(arrival, ended, tick, woken, deadline)
            while running and running[0][0] <= now:
                batch = heapq.heappop(running)[2]
                idle += 1
                self._carry_out(scheduler.update(batch, self.engine.run(batch.run), now))
            if self.ticks and now >= tick:
                self.ticks.act(now, scheduler.load)
                tick += self.ticks.period_s
            # While nothing is idle an arrival only queues: all of them up to the next other event in one go.
            until = now if idle else min(now + self._shortest, running[0][0], tick, deadline)
            while arrived < images and (times[arrived] <= now or times[arrived] < until):
                self._admit(arrived, times[arrived])
                arrived += 1
            self._carry_out(scheduler.expire(now))
            while idle and (next_batch := scheduler.schedule(now)) is not None:
                idle -= 1
                seconds = self.engine.seconds(next_batch.run)
                heapq.heappush(running, (now + seconds, next(order), next_batch))
                self._busy_s += seconds
                self._batches[next_batch.run.stage - 1] += 1
                self._images[next_batch.run.stage - 1] += len(next_batch.images)
                self._carry_out(scheduler.expire(now))
            woken = wake(now) if wake and idle else math.inf
        return self._trace()

    def _admit(self, number: int, now: float) -> None:
        one: Any = number  # what the engine takes for pixels; the scheduler does not look inside
        try:
            request, outcome = self.scheduler.admit(
                [one],
                now,
                deadline=self._deadlines[number],
                priority=NORMAL if self.priorities is None else self.priorities[number],
            )
        except (Overloaded, DeadlineExceeded):
            self._fate[number] = Fate.REFUSED
            self.missed += 1
        else:
            self._number[request] = number
            self._carry_out(outcome)

    def _carry_out(self, outcome: Outcome) -> None:
        if outcome.freed:
            self.engine.free(outcome.freed)
        for request in outcome.settled:
            number = self._number.pop(request)
            if request.answer is None:
                self._fate[number] = Fate.REFUSED if isinstance(request.error, Overloaded) else Fate.EXPIRED
                self.missed += 1
                continue
            (result,) = request.answer.results
            latency = self.now - self.arrivals[number]
            fate = Fate.IN_TIME
            if result.degraded:
                fate = Fate.DEGRADED
            elif self.now > request.deadline:
                fate = Fate.LATE
            self.missed += fate is not Fate.IN_TIME
            self._fate[number] = fate
            self._exit[number] = result.exit
            self._latency[number] = latency
            self._queue[number] = result.queue_s
            self._compute[number] = result.compute_s
            self._correct[number] = bool(result.probabilities[0])
            if self.on_answer:
                self.on_answer(request.answer, latency)

    def _trace(self) -> Trace:
        return Trace(
            arrivals=self.arrivals,
            fate=np.array(self._fate, np.int8),
            exit=np.array(self._exit, np.int8),
            latency=np.array(self._latency),
            queue=np.array(self._queue),
            compute=np.array(self._compute),
            correct=np.array(self._correct),
            batches=np.array(self._batches),
            rows=np.array(self._images),
            busy_s=self._busy_s,
            ended=self.now,
            executors=self.setup.executors,
        )


def _or_never(moment: float | None) -> float:
    return math.inf if moment is None else moment
