"""Controllers that hold a budget while traffic changes. Plain classes: `now` is an argument, nothing waits or runs.

Legend: λ images that arrive in a second, n executors, seconds are engine time unless said otherwise. The rows of a
frontier rise in cost, so "the row that can be paid" is a look-up in a rising list.

Theory of operation. A cascade that re-batches answers an image in about T = L / (1 - u), where L is the time of one
image alone through all stages and u = λ s / n the load, s being the mean seconds of an image; a high quantile is a
multiple f of that under load, and no more than L without any:

    latency(u) = L (1 + (f - 1) u) / (1 - u)

Solved for s, a latency target is a linear budget on the milliseconds of the frontier. f is 2κ at the 99th percentile,
and of other quantiles it is in proportion: as calibrated 1 at the median, and between them growing with the logarithm,
as the tail of a queue does. κ is learned.

How they play together: `LatencyLoop` says what an image may cost, and that becomes the target of `CostLoop`, which
walks the frontier until the traffic costs that. `Brownout` puts a ceiling over both; under it `CostLoop` stands still,
as what comes says nothing of its row. It counts images, without a clock; `control` gives the other two the time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from server.budget.survival import ExitCounts
from server.bundle.frontier import FrontierRow

KAPPA = 1.17  # half of p99 over p50 of a loaded cascade, before anything was observed
SHORTEST, LONGEST = 1e-6, 1e6  # seconds: of all times that somebody asks for, as loops divide by them


def tail_factor(quantile: float, kappa: float) -> float:
    """f, of a quantile from 0.5 on."""
    share = (math.log(1 / (1 - quantile)) - math.log(2)) / (math.log(100) - math.log(2))
    return kappa / KAPPA * (1 + (2 * KAPPA - 1) * share)


def predicted_latency(alone: float, load: float, factor: float) -> float:
    """Seconds, with `alone` = L and `load` = u; inf at a load of 1."""
    return alone * (1 + (factor - 1) * load) / (1 - load) if load < 1 else math.inf


def affordable_load(target: float, alone: float, factor: float) -> float:
    """The load u at which the latency is `target` seconds; not above 0 where no load could meet it."""
    return (target - alone) / (target + (factor - 1) * alone)


class Rate:
    """Events per second, exponentially forgotten over `horizon` seconds. It was quiet before the beginning: one burst
    is no rate yet."""

    def __init__(self, horizon: float) -> None:
        self._horizon = horizon
        self._since: float | None = None
        self._count = 0
        self.value = 0.0

    def add(self, events: int) -> None:
        self._count += events

    def rest(self) -> None:
        """Nothing will be ticked for a while, as nothing comes."""
        self._since = None
        self._count = 0
        self.value = 0.0

    def tick(self, now: float) -> float:
        """Take in what came since the last tick."""
        passed = 0.0 if self._since is None else now - self._since
        if passed > 0:
            share = 1 - math.exp(-passed / self._horizon)
            self.value += share * (self._count / passed - self.value)
            self._count = 0
        self._since = now
        return self.value


class Quantile:
    """A running quantile of times, in seconds.

    Each moves the logarithm a step: up where it is longer, down where not, in the proportion that balances at the
    quantile (Robbins and Monro 1951). However odd one is, it moves the value by a tenth like any other.
    """

    STEP = 0.1  # of the logarithm

    def __init__(self, quantile: float, *, start: float = 0.0, least: float = SHORTEST, most: float = math.inf) -> None:
        """`start`: before the first; with 0 that is taken as it is. `least`, `most`: bounds of the value."""
        self._quantile, self._least, self._most = quantile, least, most
        self.value = start

    def observe(self, seconds: float) -> None:
        wanted = seconds
        if self.value:
            step = self._quantile if seconds > self.value else self._quantile - 1
            wanted = self.value * math.exp(self.STEP * step)
        self.value = min(self._most, max(self._least, wanted))


class CostLoop:
    """Walks along the frontier so that the mean cost of live traffic meets a budget. Plain: it counts, nothing else.

    Calibration says what a row costs on calibration traffic; harder traffic costs more on the same row. Per block of
    256 images: filter the mean cost y, e = (B-y)/B, and take what calibration puts at u = B(1 + .3e + .5I), I the
    running sum of e: the row, or the mixture. Within 1 % nothing moves; e is not summed up while u is already past the
    end that it pushes to; a block moves at most 16 rows.

    What is held is the cost that the thresholds would have without deadlines. Images that are cut short count as far as
    they went (`survival`): it is the dear ones that are, and without them the others would look cheap and be made dear.
    Of an exit that nobody came to of late, nothing is known but calibration's word on the row in force.
    """

    BLOCK = 256  # images, and as many more as it takes until LEAST of them have left by a threshold
    LEAST = 128
    DEAD_BAND = 0.01
    PROPORTIONAL = 0.3
    INTEGRAL = 0.5  # at half of it a jump of the input by half a sigma puts a window of 10,000 images 4 % off
    FILTER = 0.7  # share of the newest block in y
    MAX_STEP = 16

    def __init__(self, rows: Sequence[FrontierRow], stage_gmacs: Sequence[float], gmacs: float) -> None:
        """`rows` of the frontier, rising in cost; `stage_gmacs` (E,) cumulative. `gmacs` is the budget; the loop begins
        at the row that calibration puts there."""
        self._rows = rows
        self._costs = [row.gmacs for row in rows]
        self._stage_gmacs = np.asarray(stage_gmacs)
        self.budget = gmacs  # that is held
        self.row = self._row_at(gmacs)
        self.gmacs = self._within(gmacs)  # the mean cost to ask calibration for: between `row` and the next
        self._integral = 0.0
        self._forget()

    def _forget(self) -> None:
        """Begin a block, the first."""
        self._past = ExitCounts(len(self._stage_gmacs))  # of all blocks, the older the less
        self._begin_block()

    def _begin_block(self) -> None:
        self._block = ExitCounts(len(self._stage_gmacs))
        self._images = self._left = 0  # of the block, and those that left by a threshold

    def observe(self, exit: int, cut_short: bool = False) -> bool:
        """Count one image that the thresholds in force judged. `cut_short`: a deadline ended it, after this exit. True
        where `gmacs` has moved."""
        self._block.add(exit, cut_short)
        self._images += 1
        self._left += not cut_short
        if self._images < self.BLOCK or self._left < self.LEAST:
            return False
        self._past.fade(1 - self.FILTER)
        self._past.absorb(self._block)
        self._begin_block()
        return self._end_block(float(self._past.fractions(self._rows[self.row].exit_fractions) @ self._stage_gmacs))

    def _end_block(self, mean: float) -> bool:
        error = (self.budget - mean) / self.budget
        if abs(error) < self.DEAD_BAND:
            return False
        # Judged before e is added: judged after, the step that would reach the end is never taken.
        wanted = self._wanted(error, self._integral)
        past_end = wanted > self._costs[-1] if error > 0 else wanted < self._costs[0]
        if not past_end:
            self._integral += error
        wanted = self._wanted(error, self._integral)
        aim = self._row_at(wanted)
        self.row += max(-self.MAX_STEP, min(self.MAX_STEP, aim - self.row))
        before, self.gmacs = self.gmacs, self._within(wanted) if self.row == aim else self._costs[self.row]
        return self.gmacs != before

    def aim_at(self, gmacs: float) -> None:
        """Another budget for the same traffic: what was learned of it, I, is kept."""
        self.budget = gmacs
        self.gmacs = self._within(self._wanted(0.0, self._integral))
        self.row = self._row_at(self.gmacs)
        self._forget()

    def _within(self, gmacs: float) -> float:
        return max(self._costs[0], min(self._costs[-1], gmacs))

    def _row_at(self, gmacs: float) -> int:
        return max(0, bisect_right(self._costs, gmacs) - 1)

    def _wanted(self, error: float, integral: float) -> float:
        return self.budget * (1 + self.PROPORTIONAL * error + self.INTEGRAL * integral)


@dataclass(slots=True)
class Tail:
    """κ, as learned so far: of the machine and its traffic, whatever the target."""

    kappa: float = KAPPA

    def factor(self, quantile: float) -> float:
        return tail_factor(quantile, self.kappa)


class LatencyLoop:
    """A latency target as seconds an image may cost, with κ trimmed by the latencies that are observed.

    Fed forward by the arrival rate, corrected slowly. What is corrected is the share of the answers that are late: it
    is counted, over as many answers as its size needs and a second at least, and the logarithm of κ moves in proportion
    to what it is off. In the mean that is nothing exactly where the share is the wanted one, whatever the latencies are
    otherwise; a stall, however long, is one step of three units. Up when too many are late, but not where the cheapest
    row is in force already: that is an overload, and no tail explains it. Down only while the target is what binds,
    else a quiet hour would unlearn everything.
    """

    BLOCK = 256  # answers, at least
    LATE = 2.56  # answers of a block that may be late, at least
    TICKS = 20  # of 50 ms, between two steps
    GAIN = 0.1
    MOST = 3.0  # times the wanted share that counts as too much
    KAPPA_RANGE = (0.2, 20.0)

    def __init__(self, target: float, quantile: float, executors: int, tail: Tail) -> None:
        """`target` in seconds, from the last byte of a request's body to its answer. `tail` is what learns."""
        self.target, self.quantile = target, quantile
        self._executors = executors
        self._tail = tail
        self._block = max(self.BLOCK, math.ceil(self.LATE / (1 - quantile)))
        self._answers = self._late = 0
        self._ticks = 0  # since the last step
        self._binds = self._exhausted = False

    def affordable(self, rate: float, alone: float, cheapest: float, dearest: float) -> float:
        """Seconds an image may cost at this arrival rate; asked every tick. `alone`: L with all that is not engine
        time; `cheapest`, `dearest`: the costs of the first and the last row. Below 0 where the target cannot be met."""
        self._ticks += 1
        load = affordable_load(self.target, alone, self._tail.factor(self.quantile))
        seconds = load * self._executors / rate if rate > 0 else math.copysign(math.inf, load)
        self._binds, self._exhausted = seconds < dearest, seconds < cheapest
        return seconds

    def observe(self, latency: float) -> None:
        """Count one answer, in seconds."""
        self._answers += 1
        self._late += latency > self.target
        if self._answers < self._block or self._ticks < self.TICKS:
            return
        error = self._late / self._answers / (1 - self.quantile) - 1
        self._answers = self._late = self._ticks = 0
        if self._exhausted if error > 0 else not self._binds:
            return
        low, high = self.KAPPA_RANGE
        self._tail.kappa = min(max(self._tail.kappa * math.exp(self.GAIN * min(error, self.MOST)), low), high)


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """The images that wait, in order of their deadlines. Legend: N images."""

    left: NDArray[np.float64]  # (N,) seconds to the deadline, rising
    new: NDArray[np.float64]  # (N,) 1 for one that waits for the first stage, else 0
    deep: NDArray[np.float64]  # (N,) seconds of work of one that waits behind it, else 0

    @classmethod
    def of(cls, now: float, deadlines: Sequence[Sequence[float]], seconds: Sequence[float]) -> Waiting:
        """`deadlines` by stage; `seconds`: work of an image that waits for the stage."""
        images = [len(queue) for queue in deadlines]
        left = np.fromiter(chain.from_iterable(deadlines), np.float64, sum(images)) - now
        order = np.argsort(left)
        new = np.arange(len(left)) < images[0]
        deep = np.where(new, 0.0, np.repeat(seconds, images))
        return cls(left[order], new[order].astype(np.float64), deep[order])


class Brownout:
    """The dearest row that the offered load leaves time for: accuracy is given up before requests are.

    Who waits is served in order of the deadlines, so each image is looked at together with those before it: their work
    has to be done within half of the time that it has left, its horizon (the demand criterion of EDF, Baruah et al.
    1990, with a margin). Nothing happens while that is done within half of every horizon: a busy server is not an
    overloaded one. Beyond, a row can be paid if all that arrives, and what waits, within the horizon, fits into the
    executors' time. So the patient stand behind and press nobody, and the hurried press by their own number only.

    Two bounds of the time left. Below, a quarter of what half of the requests are given: nobody's last moment counts,
    as no row would save him. Above, what the queue's room takes to be worked off: it would be full before.

    Down at once; up only after there was room for HOLD seconds, a few rows a tick. Where the queue is all but empty and
    it is only the arrival rate that speaks against a dearer row, one row is tried now and then: clients that send the
    next request when they have an answer arrive faster the cheaper the row is.
    """

    TICK = 0.05  # seconds
    USABLE = 0.95  # of the executors' time
    HOLD = 0.5  # seconds
    CLIMB = 0.02  # of the rows, a tick
    FULL = 0.375  # of the queue's places: so many taken are an overload, whatever the deadlines; LOW may have half

    def __init__(self) -> None:
        self.row: int | None = None  # the last row that may be used; None: all
        self._room_since: float | None = None

    def in_force(self, wanted: int) -> int:
        """The row under the last ceiling."""
        return wanted if self.row is None else min(self.row, wanted)

    def tick(
        self,
        now: float,
        *,
        costs: Sequence[float],
        wanted: int,
        executors: int,
        rate: float,
        waiting: Waiting,
        given: float,
        longest: float = math.inf,
        places: float = math.inf,
    ) -> int | None:
        """The ceiling from now on, always below `wanted`; None: no ceiling.

        `costs`: seconds of the rows, rising; `wanted`: the row that the operator's target asks for; `given`: seconds
        that half of the requests are given at least; `longest`: seconds that an answer may take whatever its deadline;
        `places`: of the queue.
        """
        current = self.in_force(wanted)
        ahead, deep = waiting.new.cumsum(), waiting.deep.cumsum()  # (N,) of it and all before it
        wait = (ahead * costs[current] + deep) / executors
        longest = min(longest, 4 * self.FULL * places * costs[current] / executors, LONGEST)
        horizon = np.maximum(np.minimum(np.maximum(waiting.left, given / 4), longest), SHORTEST) / 2
        # What waits longer than a quarter of the horizon is to be gone within one; a short queue is no fault.
        excess = np.maximum(0, 1 - horizon / 4 / np.maximum(wait, SHORTEST))
        free, load = self.USABLE * executors, max(rate, SHORTEST)
        seconds = (free - excess * deep / horizon) / (load + excess * ahead / horizon)
        can_pay = max(0, bisect_right(costs, seconds.min(initial=free / load)) - 1)
        if can_pay < current and np.any(wait > horizon / 2):
            self.row, self._room_since = can_pay, None
        elif self.row is not None:
            step = max(1, round(self.CLIMB * len(costs)))
            self._climb(now, can_pay, step, nearly_idle=bool(np.all(wait < horizon / 8)))
        if self.row is not None and self.row >= wanted:
            self.row = self._room_since = None
        return self.row

    def _climb(self, now: float, can_pay: int, step: int, nearly_idle: bool) -> None:
        assert self.row is not None
        if can_pay <= self.row and not nearly_idle:
            self._room_since = None
        elif self._room_since is None or now < self._room_since:
            self._room_since = now
        elif now - self._room_since >= self.HOLD:
            if can_pay > self.row:
                self.row = min(can_pay, self.row + step)
            else:
                self.row += 1
                self._room_since = now
