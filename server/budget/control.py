"""The loops of `loops`, fed with what the server sees: arrivals, deadlines, answers, and what batches take.

Owns no operating point: it tells the budget controller what can be afforded. `now` is an argument. Latencies and costs
are seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from server.budget.loops import (
    Brownout,
    LatencyLoop,
    Quantile,
    Rate,
    Tail,
    Waiting,
    affordable_load,
    predicted_latency,
)
from server.bundle.frontier import FrontierRow
from server.bundle.profile import LiveProfile

# Seconds over which arrivals are averaged: a latency target follows the load, a brownout every burst.
RATE_HORIZON, BURST_HORIZON = 3.0, 0.5


class Machine:
    """What the rows of a frontier cost in seconds on this machine, and how much of it is asked for.

    Asked for by those who count: LOW and BACKGROUND take what the others leave, so they are no reason for anything.
    """

    def __init__(
        self, rows: Sequence[FrontierRow], batch_sizes: Sequence[int], executors: int, places: float = math.inf
    ) -> None:
        """`places` for images that wait."""
        self.executors, self.places = executors, places
        self._batch_sizes = tuple(batch_sizes)
        fractions = np.array([row.exit_fractions for row in rows])  # (R, E)
        self._reach = fractions[:, ::-1].cumsum(axis=1)[:, ::-1]  # of all images, those that run each stage
        self.profile: LiveProfile | None = None
        self.rate, self.burst = Rate(RATE_HORIZON), Rate(BURST_HORIZON)
        self.given = Quantile(0.5)  # seconds to answer in: what no minority can move
        self.elsewhere = Quantile(0.5)  # seconds of an answer that are neither queue nor engine
        self.tail = Tail()

    def arrived(self, images: int, given: float) -> None:
        """Count a request, also one that will be refused; but not where not even an idle server would be in time."""
        if self.profile is not None and given < self.profile.seconds(1, 1):
            return
        self.rate.add(images)
        self.burst.add(images)
        self.given.observe(given)

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

    def work_left(self, row: int) -> list[float]:
        """Mean seconds that an image still takes which waits for a stage, by stage: not all of them go on."""
        reach = np.maximum(self._reach[row], 1e-9)
        work = reach * np.array(self.stage_seconds())
        return (work[::-1].cumsum()[::-1] / reach).tolist()  # type: ignore[no-any-return]

    def alone(self) -> float:
        """Seconds of the slowest answer on an idle server: every stage, and all that is not the engine."""
        assert self.profile is not None
        return self.elsewhere.value + sum(self.profile.seconds(i, 1) for i in range(1, len(self._batch_sizes) + 1))

    def row_within(self, latency: float, quantile: float) -> int | None:
        """The dearest row that meets a latency at the present arrival rate; None where not even the cheapest does."""
        load = affordable_load(latency, self.alone(), self.tail.factor(quantile))
        if load < 0:
            return None
        costs, rate = self.costs(), self.rate.value
        row = bisect_right(costs, load * self.executors / rate) - 1 if rate > 0 else len(costs) - 1
        return row if row >= 0 else None

    def latency_range(self, quantile: float) -> tuple[float, float]:
        """The latency of the cheapest and of the dearest row at the present arrival rate; inf where it has no end."""
        costs, alone, factor = self.costs(), self.alone(), self.tail.factor(quantile)
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
        loop = None if latency is None else LatencyLoop(latency, quantile, machine.executors, machine.tail)
        self._latency = loop

    def answered(self, total: float, in_engine: float) -> None:
        """Seconds of one answer, and of them in queues and batches."""
        self.machine.elsewhere.observe(total - in_engine)
        if self._latency is not None:
            self._latency.observe(total)

    def rest(self) -> None:
        """No traffic: nobody will tick for a while, and what comes then is no part of an overload of before."""
        self.machine.rest()
        self._brownout = Brownout()

    def tick(self, now: float, deadlines: Sequence[Sequence[float]], wanted: int) -> tuple[int | None, int | None]:
        """(row that the latency target allows, ceiling of the brownout); None where there is no such target or none
        binds. `deadlines`: of the images that wait and count, by stage; `wanted`: the row that the operator's target
        asks for."""
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
            row = max(0, bisect_right(costs, seconds) - 1)
            wanted = min(row, wanted)  # on harder traffic the cost loop stands below the row
        work = machine.work_left(self._brownout.in_force(wanted))
        ceiling = self._brownout.tick(
            now,
            costs=costs,
            wanted=wanted,
            executors=machine.executors,
            rate=burst,
            waiting=Waiting.of(now, deadlines, work),
            given=machine.given.value,
            longest=self._latency.target if self._latency else math.inf,
            places=machine.places,
        )
        return row, ceiling
