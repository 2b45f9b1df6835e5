"""The loops of `loops`, fed with what the server sees: arrivals, patience, answers, and what batches take.

Owns no operating point: it tells the budget controller what can be afforded. `now` is an argument. Latencies and costs
are seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from server.budget.loops import KAPPA, Brownout, LatencyLoop, Rate, affordable_load, predicted_latency, tail_factor
from server.bundle.frontier import FrontierRow
from server.bundle.profile import LiveProfile
from server.cascade.scheduler import Load

# Seconds over which arrivals are averaged: a latency target follows the load, a brownout every burst.
RATE_HORIZON, BURST_HORIZON = 3.0, 0.5
_WEIGHT = 0.02  # of one answer in the running means
SHORTEST = 1e-6  # seconds: no time that somebody asks for is shorter, as loops divide by it


class Machine:
    """What the rows of a frontier cost in seconds on this machine, and how much of it is asked for."""

    def __init__(self, rows: Sequence[FrontierRow], batch_sizes: Sequence[int], executors: int) -> None:
        self.executors = executors
        self._batch_sizes = tuple(batch_sizes)
        fractions = np.array([row.exit_fractions for row in rows])  # (R, E)
        self._reach = fractions[:, ::-1].cumsum(axis=1)[:, ::-1]  # of all images, those that run each stage
        self.profile: LiveProfile | None = None
        self.rate, self.burst = Rate(RATE_HORIZON), Rate(BURST_HORIZON)
        self.patience = math.inf  # seconds that requests are given, on average
        self.elsewhere = 0.0  # seconds of an answer that are neither queue nor engine, on average
        self.kappa = KAPPA

    def arrived(self, images: int, patience: float) -> None:
        """Count a request, also one that will be refused."""
        self.rate.add(images)
        self.burst.add(images)
        known = self.patience < math.inf
        self.patience = self.patience + _WEIGHT * (patience - self.patience) if known else patience

    def rest(self) -> None:
        """No traffic: nobody will tick for a while."""
        self.rate.rest()
        self.burst.rest()

    def stage_seconds(self) -> tuple[float, ...]:
        """Of an image in each stage, in the batch that pays."""
        assert self.profile is not None
        return tuple(self.profile.seconds(i, n) / n for i, n in enumerate(self._batch_sizes, start=1))

    def costs(self) -> list[float]:
        """Mean seconds of an image by row, rising. A frontier rises in MACs; where seconds do not, the row before it
        is as good a bound."""
        means = self._reach @ np.array(self.stage_seconds())
        return np.maximum.accumulate(means).tolist()  # type: ignore[no-any-return]

    def alone(self) -> float:
        """Seconds of the slowest answer on an idle server: every stage, and all that is not the engine."""
        assert self.profile is not None
        return self.elsewhere + sum(self.profile.seconds(i, 1) for i in range(1, len(self._batch_sizes) + 1))

    def row_within(self, latency: float, quantile: float) -> int | None:
        """The dearest row that meets a latency at the present arrival rate; None where not even the cheapest does."""
        load = affordable_load(latency, self.alone(), tail_factor(quantile, self.kappa))
        if load < 0:
            return None
        costs, rate = self.costs(), self.rate.value
        row = bisect_right(costs, load * self.executors / rate) - 1 if rate > 0 else len(costs) - 1
        return row if row >= 0 else None

    def latency_range(self, quantile: float) -> tuple[float, float]:
        """The latency of the cheapest and of the dearest row at the present arrival rate; inf where it has no end."""
        costs, alone, factor = self.costs(), self.alone(), tail_factor(quantile, self.kappa)
        loads = [self.rate.value * cost / self.executors for cost in (costs[0], costs[-1])]
        cheapest, dearest = (predicted_latency(alone, load, factor) for load in loads)
        return cheapest, dearest


class Control:
    """One tick of all loops that need a clock. Without a profile there is nothing to steer by: no ceiling, no aim."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._brownout = Brownout()
        self._latency: LatencyLoop | None = None
        self._ticked = math.inf  # when

    def aim_at(self, latency: float | None, quantile: float = 0.99) -> None:
        """Hold this latency (seconds) from now on; None: none."""
        machine = self.machine
        loop = None if latency is None else LatencyLoop(latency, quantile, machine.executors, machine.kappa)
        self._latency = loop

    def answered(self, total: float, in_engine: float) -> None:
        """Seconds of one answer, and of them in queues and batches."""
        self.machine.elsewhere += _WEIGHT * (max(0.0, total - in_engine) - self.machine.elsewhere)
        if self._latency is not None:
            self._latency.observe(total)

    def tick(self, now: float, load: Load, wanted: int) -> tuple[int | None, int | None]:
        """(row that the latency target allows, ceiling of the brownout); None where there is no such target or none
        binds. `wanted`: the row that the operator's target asks for."""
        machine = self.machine
        rate, burst = machine.rate.tick(now), machine.burst.tick(now)
        if machine.profile is None:
            return None, None
        machine.profile.forget(min(max(0.0, now - self._ticked), 2 * Brownout.TICK))  # not what was slept through
        self._ticked = now
        costs = machine.costs()
        row = None
        if self._latency is not None:
            seconds = self._latency.affordable(rate, machine.alone(), costs[0], costs[-1])
            machine.kappa = self._latency.kappa
            row = max(0, bisect_right(costs, seconds) - 1)
            wanted = min(row, wanted)  # on harder traffic the cost loop stands below the row
        stages = machine.stage_seconds()
        deep = sum(
            waiting * sum(stages[stage:]) for stage, waiting in enumerate(load.waiting) if stage > 0
        )  # as if none left before the end: on the safe side
        patience = min(machine.patience, self._latency.target if self._latency else math.inf)
        ceiling = self._brownout.tick(
            now,
            costs=costs,
            wanted=wanted,
            executors=machine.executors,
            rate=burst,
            new=load.waiting[0],
            deep=deep,
            horizon=max(patience, SHORTEST) / 2,
        )
        return row, ceiling
