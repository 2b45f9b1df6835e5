"""The live budget: the operator's target, solved on the frontier, stored, and held while traffic changes.

Owns the operating point. Everything here runs on the event loop, but for the store, which runs in a thread. There is
no clock: the cost loop counts images, not seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from server.core import ImageResult, OperatingPoint
from server.errors import BudgetInfeasible, InvalidRequest, StoreUnavailable, VersionMismatch
from server.frontier import NEVER, Frontier, FrontierRow
from server.store import Policy, PolicyStore

log = logging.getLogger(__name__)

Hold = Literal["cost", "quality"]
Target = Mapping[str, Any]

WINDOW = 10_000  # images that `observed` speaks of
DEFAULT_SLACK = 0.005  # accuracy given up against the knee, where no operator has spoken yet


@dataclass(frozen=True, slots=True)
class Prediction:
    """What calibration says of the thresholds in force."""

    accuracy: float
    gmacs: float
    exit_fractions: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Milliseconds; None before the first image."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Observed:
    """What the last images under this budget did, at most WINDOW of them; all are counted, steered or degraded too."""

    images: int
    gmacs: float | None
    exit_fractions: tuple[float, ...] | None
    latency_ms: Quantiles


@dataclass(frozen=True, slots=True)
class Feasible:
    """The ends of the frontier, [lowest, highest]."""

    gmacs: tuple[float, float]
    accuracy: tuple[float, float]


@dataclass(frozen=True, slots=True)
class BudgetState:
    """What the body of GET and PUT /budget says of the budget: `dataclasses.asdict` of it are those members."""

    version: int
    target: dict[str, Any]
    hold: Hold
    clamped: bool
    thresholds: tuple[float, ...]
    predicted: Prediction
    observed: Observed
    feasible: Feasible


@dataclass(frozen=True, slots=True)
class Solution:
    """A checked target and what the frontier makes of it."""

    target: dict[str, Any]
    hold: Hold
    clamped: bool
    row: FrontierRow
    held_gmacs: float | None  # the mean cost that the cost loop holds; None: thresholds stay


def solve(frontier: Frontier, target: Target, hold: str = "cost") -> Solution:
    """Look a target up. Raises InvalidRequest for what is no target, BudgetInfeasible for one out of reach."""
    if hold not in ("cost", "quality"):
        raise InvalidRequest(f'hold is "cost" or "quality", not {hold!r}')
    if "latency_ms" in target:
        raise InvalidRequest("latency budgets come with a later release; use gmacs, accuracy or thresholds")
    if len(target) != 1 or not target.keys() <= {"gmacs", "accuracy", "thresholds"}:
        raise InvalidRequest("exactly one target is needed: gmacs, accuracy or thresholds")
    kept = cast(Hold, hold)
    if "thresholds" in target:
        given = _thresholds(target["thresholds"], frontier.num_exits)
        return Solution({"thresholds": given}, "quality", False, frontier.predict(given), None)
    if "gmacs" in target:
        gmacs = _number("gmacs", target["gmacs"])
        row = frontier.by_gmacs(gmacs)
        if row is None:
            raise _infeasible(frontier, f"the cheapest operating point costs {frontier.rows[0].gmacs:g} GMAC per image")
        # Held is what was asked for, not the row below it: the loop may use what lies between two rows, and a clamped
        # budget leaves room above the knee for traffic that is harder than the calibration set.
        return Solution({"gmacs": gmacs}, kept, gmacs > frontier.knee.gmacs, row, gmacs if kept == "cost" else None)
    accuracy = _number("accuracy", target["accuracy"])
    row = frontier.by_accuracy(accuracy)
    if row is None:
        raise _infeasible(frontier, f"the most accurate operating point reaches {frontier.knee.accuracy:g}")
    clamped = accuracy < frontier.rows[0].accuracy
    return Solution({"accuracy": accuracy}, kept, clamped, row, row.gmacs if kept == "cost" else None)


def default_solution(frontier: Frontier) -> Solution:
    """Until an operator speaks: the cheapest row within half a point of the best, thresholds left as calibrated."""
    row = frontier.by_accuracy(max(frontier.knee.accuracy - DEFAULT_SLACK, frontier.rows[0].accuracy))
    assert row is not None, "no accuracy at or below the knee's is out of reach"
    return Solution({"accuracy": row.accuracy}, "quality", False, row, None)


class CostLoop:
    """Walks along the frontier so that the mean cost of live traffic meets a budget. Plain: it counts, nothing else.

    Calibration says what a row costs on calibration traffic; harder traffic costs more on the same row. Per block of
    256 images: filter the mean cost y, e = (B-y)/B, and take the row that calibration puts at u = B(1 + .3e + .25I), I
    the running sum of e. Within 1 % nothing moves; e is not summed up while u is already past the end that it
    pushes to; a block moves at most 16 rows.
    """

    BLOCK = 256
    DEAD_BAND = 0.01
    PROPORTIONAL = 0.3
    INTEGRAL = 0.25
    FILTER = 0.5  # share of the newest block in y
    MAX_STEP = 16

    def __init__(self, frontier: Frontier, gmacs: float, row: int) -> None:
        """`gmacs` is the budget, `row` the index of the row in force."""
        self._costs = [r.gmacs for r in frontier.rows]
        self._budget = gmacs
        self.row = row
        self._sum = 0.0
        self._images = 0
        self._filtered: float | None = None
        self._integral = 0.0

    def observe(self, gmacs: float) -> bool:
        """Count one image that was decided by the thresholds in force. True where `row` has moved."""
        self._sum += gmacs
        self._images += 1
        if self._images < self.BLOCK:
            return False
        mean = self._sum / self._images
        self._sum, self._images = 0.0, 0
        return self._end_block(mean)

    def _end_block(self, mean: float) -> bool:
        past = self._filtered
        self._filtered = mean if past is None else past + self.FILTER * (mean - past)
        error = (self._budget - self._filtered) / self._budget
        if abs(error) < self.DEAD_BAND:
            return False
        # Judged before e is added: judged after, the step that would reach the end is never taken.
        wanted = self._wanted(error, self._integral)
        past_end = wanted > self._costs[-1] if error > 0 else wanted < self._costs[0]
        if not past_end:
            self._integral += error
        aim = max(0, bisect_right(self._costs, self._wanted(error, self._integral)) - 1)
        step = max(-self.MAX_STEP, min(self.MAX_STEP, aim - self.row))
        self.row += step
        return step != 0

    def _wanted(self, error: float, integral: float) -> float:
        return self._budget * (1 + self.PROPORTIONAL * error + self.INTEGRAL * integral)


class BudgetController:
    """One owner of the operating point. `point` is replaced whole, so whoever reads it sees one budget, never two."""

    def __init__(
        self, frontier: Frontier, store: PolicyStore, on_change: Callable[[OperatingPoint], None] | None = None
    ) -> None:
        """Takes up the stored target, solved anew on this frontier; without one, or with one that this frontier cannot
        serve, the default. Reads the store, and so blocks: make it before the loop is busy."""
        self._frontier = frontier
        self._store = store
        self._callbacks = [on_change] if on_change else []
        self._swap = asyncio.Lock()
        self._commits: set[asyncio.Task[None]] = set()
        self._syncing: asyncio.Task[None] | None = None
        self._synced = True
        version, solution = self._first()
        self._adopt(version, solution)

    @property
    def point(self) -> OperatingPoint:
        return self._point

    def on_change(self, callback: Callable[[OperatingPoint], None]) -> None:
        """Call `callback`, on the event loop, with every later operating point: by PUT, and as the cost loop moves."""
        self._callbacks.append(callback)

    async def put(self, target: Target, hold: str = "cost", if_match: int | Literal["*"] | None = None) -> BudgetState:
        """Replace the budget: stored first, then swapped in at once. The state after the swap is returned.

        Raises InvalidRequest, BudgetInfeasible, VersionMismatch or StoreUnavailable; then nothing has changed.
        """
        solution = solve(self._frontier, target, hold)
        # A client that hangs up must not leave a stored budget that is not in force: the commit outlives its request.
        commit = asyncio.create_task(self._commit(solution, if_match))
        self._commits.add(commit)
        commit.add_done_callback(self._commit_done)
        await asyncio.shield(commit)
        return self.state()

    def observe(self, result: ImageResult, total_s: float, steered: bool) -> None:
        """Count one answered image. `steered`: the request brought its own min_confidence or max_exit.

        Steered images, and degraded ones, say nothing of the thresholds in force: the cost loop does not see them.
        """
        self._window.add(result.exit, total_s)
        if self._loop is None or steered or result.degraded:
            return
        if self._loop.observe(self._frontier.stage_gmacs[result.exit - 1]):
            self._move_to(self._frontier.rows[self._loop.row])

    def state(self) -> BudgetState:
        solution, row, rows = self._solution, self._row, self._frontier.rows
        return BudgetState(
            version=self._point.version,
            target=dict(solution.target),
            hold=solution.hold,
            clamped=solution.clamped,
            thresholds=self._point.thresholds,
            predicted=Prediction(row.accuracy, row.gmacs, row.exit_fractions),
            observed=self._window.observed(),
            feasible=_feasible(rows[0], rows[-1]),
        )

    def _first(self) -> tuple[int, Solution]:
        try:
            policy = self._store.load()
        except StoreUnavailable as error:
            log.warning("the stored budget is not used, the default is: %s", error.detail)
            policy = None
        if policy is None:
            return 1, default_solution(self._frontier)
        try:
            return policy.version, solve(self._frontier, policy.target, policy.hold)
        except (BudgetInfeasible, InvalidRequest) as error:
            log.warning("the stored budget %s does not fit this bundle, the default is used: %s", policy, error.detail)
            # Another target, so another version: an ETag names one budget only.
            return policy.version + 1, default_solution(self._frontier)

    async def _commit(self, solution: Solution, if_match: int | Literal["*"] | None) -> None:
        async with self._swap:
            version = self._point.version
            if if_match not in (None, "*", version):
                raise VersionMismatch(f"the budget is at version {version}, not {if_match}", version=version)
            policy = Policy(version + 1, solution.target, solution.hold)
            await asyncio.to_thread(self._store.save, policy)
            self._adopt(policy.version, solution)
        self._tell()
        self._synced = False
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync())

    async def _sync(self) -> None:
        """Behind the answer: a disk takes several milliseconds to say that it has something."""
        try:
            while not self._synced:
                self._synced = True
                await asyncio.to_thread(self._store.sync)
        except StoreUnavailable as error:
            log.warning("the budget would not outlive a power failure: %s", error.detail)
        finally:
            self._syncing = None

    async def close(self) -> None:
        """Wait until what was stored is on the disk."""
        if self._syncing is not None:
            await self._syncing

    def _commit_done(self, commit: asyncio.Task[None]) -> None:
        self._commits.discard(commit)
        if not commit.cancelled():
            commit.exception()  # put() raises it; where put() was cancelled nobody else would look at it

    def _adopt(self, version: int, solution: Solution) -> None:
        self._solution = solution
        self._row = solution.row
        self._point = OperatingPoint(version, solution.row.thresholds)
        self._window = _Window(self._frontier.stage_gmacs)
        self._loop: CostLoop | None = None
        if solution.held_gmacs is not None:
            row = self._frontier.rows.index(solution.row)
            self._loop = CostLoop(self._frontier, solution.held_gmacs, row)

    def _move_to(self, row: FrontierRow) -> None:
        self._row = row
        self._point = OperatingPoint(self._point.version, row.thresholds)
        self._tell()

    def _tell(self) -> None:
        for callback in self._callbacks:
            callback(self._point)


class _Window:
    """The exits and latencies of the last WINDOW images. Two array writes per image; all sums wait for a reader."""

    def __init__(self, stage_gmacs: tuple[float, ...]) -> None:
        self._stage_gmacs = stage_gmacs
        self._exits = np.zeros(WINDOW, dtype=np.uint8)
        self._seconds = np.zeros(WINDOW, dtype=np.float32)
        self._count = 0

    def add(self, exit: int, seconds: float) -> None:
        at = self._count % WINDOW
        self._exits[at] = exit
        self._seconds[at] = seconds
        self._count += 1

    def observed(self) -> Observed:
        images = min(self._count, WINDOW)
        if not images:
            return Observed(0, None, None, Quantiles(None, None))
        fractions = np.bincount(self._exits[:images] - 1, minlength=len(self._stage_gmacs)) / images
        p50, p99 = np.quantile(self._seconds[:images], (0.5, 0.99)) * 1000
        return Observed(
            images,
            round(float(fractions @ np.asarray(self._stage_gmacs)), 9),
            tuple(round(float(f), 6) for f in fractions),
            Quantiles(round(float(p50), 3), round(float(p99), 3)),
        )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number")
    # An int beyond float's range overflows: no number that we could mean either.
    with contextlib.suppress(OverflowError):
        if math.isfinite(value):
            return float(value)
    raise InvalidRequest(f"{name} must be a finite number")


def _thresholds(value: object, exits: int) -> list[float]:
    """All but the last exit's, or all with the last 0; returned as given."""
    if not isinstance(value, list | tuple) or len(value) not in (exits - 1, exits):
        raise InvalidRequest(f"thresholds must be a list of {exits - 1} numbers, or of {exits} with 0 as the last")
    numbers = [_number("each threshold", item) for item in value]
    if not all(0 <= t <= 1 or t == NEVER for t in numbers):
        raise InvalidRequest(f"each threshold must lie between 0 and 1 (or be {NEVER:g}: nobody leaves there)")
    if len(numbers) == exits and numbers[-1] != 0:
        raise InvalidRequest("the last threshold must be 0: the last exit takes all that is left")
    return numbers


def _feasible(cheapest: FrontierRow, knee: FrontierRow) -> Feasible:
    return Feasible((cheapest.gmacs, knee.gmacs), (cheapest.accuracy, knee.accuracy))


def _infeasible(frontier: Frontier, detail: str) -> BudgetInfeasible:
    ends = _feasible(frontier.rows[0], frontier.knee)
    return BudgetInfeasible(detail, feasible={"gmacs": list(ends.gmacs), "accuracy": list(ends.accuracy)})
