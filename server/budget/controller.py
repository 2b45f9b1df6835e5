"""The live budget: the operator's target, solved on the frontier, stored, and held while traffic changes.

Owns the operating point. Everything here runs on the event loop. There is no clock: the cost loop counts images, and
the loops that need one get it with `tick`.

The fleet's budget is what the store holds, one for all replicas that share it, under the version that it has there;
a server with a store of its own is a fleet of one. What a store is seen to hold comes in from two sides, as the answer
to what was asked (`look`, `put`) and as what others did (`take`, by whoever watches), and one may overtake the other:
the later sight counts, whenever it comes. What does not fit is refused, and the last budget that did stays in force. A
replica may have a budget of its own for a while (`put_here`); it is not stored, and its version is below 0, so that no
version names two budgets.

What is in force is the cheaper of two: what the target asks for (as the cost loop has moved it), and the ceiling that
an overload leaves. Thresholds that an operator gave, or holds (`quality`), have no ceiling; the default budget has one.
Without a profile there is none, and a latency target is refused; one that was stored stands, with the dearest row in
force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from server.budget.control import Control, Machine
from server.budget.loops import SHORTEST, CostLoop
from server.budget.store import Held, Policy, PolicyStore, Refusal, StoreMoved
from server.bundle.frontier import NEVER, Frontier, FrontierRow, Mixture
from server.core import Answer, Mix, OperatingPoint
from server.errors import BudgetInfeasible, InvalidRequest, StoreConflict, StoreUnavailable, VersionMismatch

log = logging.getLogger(__name__)

Hold = Literal["cost", "quality"]
Target = Mapping[str, Any]
IfMatch = int | Collection[int] | Literal["*"] | None
Source = Literal["store", "last_known", "seed", "default", "replica"]

TARGETS = ("gmacs", "accuracy", "thresholds", "latency_ms")
DEFAULT_QUANTILE = 0.99
AIM_BAND = 0.03  # of the mean cost: less is no new aim
WINDOW = 10_000  # images that `observed` speaks of at most,
WINDOW_S = 3600.0  # none of them so many seconds older than the traffic of late: what is over is over
DEFAULT_SLACK = 0.005  # accuracy given up against the knee, where no operator has spoken yet
TRIES = 8  # of a PUT, where others change the same budget at the same time,
PUT_S = 10.0  # and the time for all of them


@dataclass(frozen=True, slots=True)
class Prediction:
    """What calibration says of the thresholds in force; None throughout where it cannot tell."""

    accuracy: float | None
    gmacs: float | None
    exit_fractions: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Milliseconds; None before the first image."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Observed:
    """What the last images under this budget did, at most WINDOW of them and of the last WINDOW_S seconds with traffic;
    all are counted, steered or degraded too."""

    images: int
    gmacs: float | None
    exit_fractions: tuple[float, ...] | None
    latency_ms: Quantiles


@dataclass(frozen=True, slots=True)
class Feasible:
    """The ends of the frontier, [lowest, highest]."""

    gmacs: tuple[float, float]
    accuracy: tuple[float, float]
    latency_ms: tuple[float, float | None] | None
    """At the present arrival rate and the target's quantile, by default p99. The second is None where the dearest row
    cannot keep up; both are where the cheapest cannot, and where there is no latency profile."""


@dataclass(frozen=True, slots=True)
class BudgetState:
    """What the body of GET and PUT /budget says of the budget: `dataclasses.asdict` of it are those members."""

    version: int
    target: dict[str, Any]
    hold: Hold
    clamped: bool
    thresholds: tuple[float, ...]
    mix: Mix | None
    predicted: Prediction
    observed: Observed
    feasible: Feasible
    row: int | None  # the frontier's row in force, or the next below; None where calibration cannot tell
    pressure: float  # share of the target's cost that an overload takes away: 0 none, towards 1 nearly all


@dataclass(frozen=True, slots=True)
class Setting:
    """What is put in force, and what calibration says of it."""

    thresholds: tuple[float, ...]
    predicted: Prediction
    mix: Mix | None = None

    @classmethod
    def of(cls, row: FrontierRow) -> Setting:
        return cls(row.thresholds, Prediction(row.accuracy, row.gmacs, row.exit_fractions))

    @classmethod
    def of_mixture(cls, mixture: Mixture) -> Setting:
        predicted = Prediction(mixture.accuracy, mixture.gmacs, mixture.exit_fractions)
        return cls(mixture.cheaper.thresholds, predicted, Mix(mixture.dearer.thresholds, mixture.share))


@dataclass(frozen=True, slots=True)
class Solution:
    """A checked target and what the frontier makes of it."""

    target: dict[str, Any]
    hold: Hold
    clamped: bool
    setting: Setting
    held_gmacs: float | None  # the mean cost that the cost loop holds; None: thresholds stay
    mix: bool = False  # a mixture that costs just what is wanted, not the row below it
    latency: tuple[float, float] | None = None  # seconds and quantile that the latency loop holds
    pinned: bool = False  # an operator wants these thresholds to stay, also under overload

    def same_target(self, other: Solution) -> bool:
        return (self.target, self.hold, self.mix) == (other.target, other.hold, other.mix)


def solve(
    frontier: Frontier,
    target: Target,
    hold: str = "cost",
    mix: bool = False,
    machine: Machine | None = None,
    stored: bool = False,
) -> Solution:
    """Look a target up. Raises InvalidRequest for what is no target, BudgetInfeasible for one out of reach.

    A latency needs a `machine` that knows what batches take. Where it does not know yet, at the start, the best row
    stands in until the latency loop knows better. One that is `stored` stands whatever the load is here at the moment:
    where nothing is that fast the cheapest row is in force, as it is when the load comes later.
    """
    if not isinstance(mix, bool):  # it comes as it was sent
        raise InvalidRequest("mix must be true or false", field="mix")
    if hold not in ("cost", "quality"):
        raise InvalidRequest('hold is "cost" or "quality"', field="hold")  # which may be anything, of any depth
    if len(target.keys() - {"quantile"}) != 1 or not target.keys() <= {*TARGETS, "quantile"}:
        raise InvalidRequest(f"exactly one target is needed: {', '.join(TARGETS[:-1])} or {TARGETS[-1]}")
    if "quantile" in target and "latency_ms" not in target:
        raise InvalidRequest("quantile belongs to latency_ms", field="quantile")
    if mix and "gmacs" not in target:
        raise InvalidRequest("mix is for gmacs targets only", field="mix")
    if "latency_ms" in target:
        return _solve_latency(frontier, target, machine, stored)
    kept, feasible = cast(Hold, hold), _feasible(frontier, machine)
    if "thresholds" in target:
        given = _thresholds(target["thresholds"], frontier.num_exits)
        predicted = frontier.predict(given)
        unknown = Setting((*given[: frontier.num_exits - 1], 0.0), Prediction(None, None, None))
        setting = unknown if predicted is None else Setting.of(predicted)
        return Solution({"thresholds": given}, "quality", False, setting, None, pinned=True)
    if "gmacs" in target:
        gmacs = _number("gmacs", target["gmacs"])
        at_cost = _setting_at(frontier, gmacs, mix)
        if at_cost is None:
            raise _infeasible(feasible, f"the cheapest operating point costs {frontier.rows[0].gmacs:g} GMAC per image")
        # Held is what was asked for, not the row below it: the loop may use what lies between two rows, and a clamped
        # budget leaves room above the knee for traffic that is harder than the calibration set.
        held = gmacs if kept == "cost" else None
        clamped = gmacs > frontier.knee.gmacs
        return Solution({"gmacs": gmacs}, kept, clamped, at_cost, held, mix, pinned=kept == "quality")
    accuracy = _number("accuracy", target["accuracy"])
    row = frontier.by_accuracy(accuracy)
    if row is None:
        raise _infeasible(feasible, f"the most accurate operating point reaches {frontier.knee.accuracy:g}")
    clamped = accuracy < frontier.rows[0].accuracy
    held = row.gmacs if kept == "cost" else None
    return Solution({"accuracy": accuracy}, kept, clamped, Setting.of(row), held, pinned=kept == "quality")


def _solve_latency(frontier: Frontier, target: Target, machine: Machine | None, stored: bool) -> Solution:
    latency_ms = _number("latency_ms", target["latency_ms"])
    quantile = _number("quantile", target.get("quantile", DEFAULT_QUANTILE))
    if latency_ms <= 0:
        raise InvalidRequest("latency_ms must be above 0", field="latency_ms")
    if not 0.5 <= quantile <= 0.999:
        raise InvalidRequest("quantile must lie between 0.5 and 0.999", field="quantile")
    if machine is None:
        raise _no_profile()
    latency = max(latency_ms / 1000, SHORTEST)
    chosen = frontier.knee
    if machine.profile is not None:
        row = machine.row_within(latency, quantile)
        if row is None and stored:
            row = 0
        if row is None:
            feasible = _feasible(frontier, machine, quantile)
            raise _infeasible(feasible, "the cheapest operating point is not that fast at the present arrival rate")
        chosen = frontier.rows[row]
    return Solution(
        {"latency_ms": latency_ms, "quantile": quantile},
        "cost",  # the latency loop says what an image may cost, and the cost loop holds it
        False,
        Setting.of(chosen),
        chosen.gmacs,
        latency=(latency, quantile),
    )


def _setting_at(frontier: Frontier, gmacs: float, mix: bool) -> Setting | None:
    """The best for a mean cost of `gmacs`: of a single row at most that, of a mixture exactly. None below all rows."""
    if mix:
        mixture = frontier.mixture(gmacs)
        return None if mixture is None else Setting.of_mixture(mixture)
    row = frontier.by_gmacs(gmacs)
    return None if row is None else Setting.of(row)


def default_solution(frontier: Frontier) -> Solution:
    """Until an operator speaks: the cheapest row within half a point of the best, thresholds left as calibrated."""
    row = frontier.by_accuracy(max(frontier.knee.accuracy - DEFAULT_SLACK, frontier.rows[0].accuracy))
    assert row is not None, "no accuracy at or below the knee's is out of reach"
    return Solution({"accuracy": row.accuracy}, "quality", False, Setting.of(row), None)


class BudgetController:
    """One owner of the operating point. `point` is replaced whole, so whoever reads it sees one budget, never two."""

    def __init__(
        self,
        frontier: Frontier,
        store: PolicyStore,
        on_change: Callable[[OperatingPoint], None] | None = None,
        machine: Machine | None = None,
        seed: Policy | None = None,
        on_refusal: Callable[[str], None] | None = None,
    ) -> None:
        """Takes up the stored target, solved anew on this frontier; without one, or with one that this frontier cannot
        serve, the seed, else the default. Reads what the store knows without asking anybody, and so blocks: make it
        before the loop is busy. `on_refusal` is called with the reason of every policy that is not taken up."""
        self._frontier = frontier
        self._store = store
        self._control = Control(machine) if machine is not None else None
        self._gmacs = [row.gmacs for row in frontier.rows]
        self._now = 0.0  # at the last tick
        self._ceiling: int | None = None  # the dearest row that an overload leaves
        self._callbacks = [on_change] if on_change else []
        self._on_refusal = on_refusal
        self._syncing: asyncio.Task[None] | None = None
        self._unsynced: Policy | None = None
        self._loop: CostLoop | None = None
        self._turns = asyncio.Lock()
        self._held: Held | None = None  # what the store was last seen to hold; None: not seen yet
        self._to_store: Policy | None = None  # in place of what it holds
        self._refused: Refusal | None = None
        self._policy: Policy | None = None  # the fleet's, as the store held it
        self._source_of_fleet: Source
        self._own: Solution | None = None  # this replica's, while it has one
        self._owns = 0  # that it ever had
        version, self._solution = self._first(seed)
        self._fleet = version, self._solution
        self._highest = version  # that ever was
        self._seen = 0  # sights of the store
        self._adopt(version, self._solution)

    @property
    def point(self) -> OperatingPoint:
        return self._point

    def on_change(self, callback: Callable[[OperatingPoint], None]) -> None:
        """Call `callback`, on the event loop, with every later operating point: by PUT, and as the cost loop moves."""
        self._callbacks.append(callback)

    async def put(
        self,
        target: Target,
        hold: str = "cost",
        if_match: IfMatch = None,
        *,
        mix: bool = False,
        by: str = "",
        at: str = "",
    ) -> BudgetState:
        """Replace the fleet's budget: stored first, then swapped in, in one step. Its state is returned: that after the
        swap, or where this replica has a budget of its own, what will be in force when that ends.

        Raises InvalidRequest, BudgetInfeasible, VersionMismatch, StoreConflict or StoreUnavailable; then nothing has
        changed.
        """
        solution = self.solve(target, hold, mix)
        async with self._turn():
            for _ in range(TRIES):
                if self._held is None or (not self._is_at(if_match) and self._store.shared):
                    await self.look()  # it may be that this replica has not heard of it yet
                held = self._held
                assert held is not None, "it was looked for"
                if held.refused is not None and held.refused.reason == "other_model":
                    raise StoreConflict(held.refused.detail)
                if not self._is_at(if_match):
                    raise _mismatch(self.generation, if_match)
                # Not in a thread: a file takes a third of a millisecond, and a thread may wait long for busy cores.
                policy = Policy(self._highest + 1, solution.target, solution.hold, solution.mix, by, at)
                try:
                    now = await self._store.compare_and_set(policy, held)
                except StoreMoved:
                    await self.look()
                    if not self._stored_already(policy):
                        continue
                else:
                    self.take(now, solution)
                return self._state_of(policy.version, solution)
        raise StoreConflict("others change the budget at the same time: it was not stored")

    def _stored_already(self, policy: Policy) -> bool:
        """The answer to the first try was lost on its way, and the library below has tried again."""
        found = self._held and self._held.policy
        return (
            found == policy and found is not None and bool(policy.by) and (found.by, found.at) == (policy.by, policy.at)
        )

    def _is_at(self, if_match: IfMatch) -> bool:
        if if_match is not None and if_match != "*" and self._to_store is not None:
            return False  # somebody has edited it by hand, which gets a version of its own in a moment
        return _matches(if_match, self.generation)

    def put_here(
        self, target: Target, hold: str = "cost", if_match: IfMatch = None, *, mix: bool = False
    ) -> BudgetState:
        """A budget of this replica's alone, until `end_here`. Raises as `put`, but for the store."""
        solution = self.solve(target, hold, mix)
        if not _matches(if_match, self._point.version):
            raise _mismatch(self._point.version, if_match)
        self._owns += 1
        self._own = solution
        self._adopt(-self._owns, solution)
        self._tell()
        return self.state()

    def end_here(self) -> None:
        """The fleet's budget is in force again."""
        if self._own is not None:
            self._own = None
            self._adopt(*self._fleet)
            self._tell()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One PUT at a time, each for a while."""
        try:
            async with asyncio.timeout(PUT_S), self._turns:
                yield
        except TimeoutError:
            raise StoreUnavailable(
                f"the store did not answer within {PUT_S:g} s: it is not known whether the budget was stored",
                reason="timeout",
            ) from None

    async def look(self) -> None:
        """Take up what the store holds now. Raises StoreUnavailable."""
        before = self._seen
        held = await self._store.load()
        if self._seen == before:
            self._forget_order()  # nothing came in between, so this is the truth: it may have gone back
        self.take(held)

    def _forget_order(self) -> None:
        if self._held is not None:
            self._held = replace(self._held, order=0)

    async def mend(self) -> None:
        """Store what is to be stored in place of what is there, if anything: a budget that somebody wrote by hand,
        under a version of its own; or the last one, where somebody took it away. Raises StoreUnavailable."""
        policy, held = self._to_store, self._held
        if policy is None or held is None:
            return
        try:
            self.take(await self._store.compare_and_set(policy, held))
            log.warning(
                "the stored budget was %s: it was stored again, as version %d",
                "taken away" if held.policy is None else "edited by hand",
                policy.version,
            )
        except StoreMoved:
            log.debug("another replica was first")  # and what it wrote comes by the watch

    def take(self, held: Held, solution: Solution | None = None) -> None:
        """The store was seen to hold this; `solution` where it is already known."""
        if self._held is not None and 0 < held.order <= self._held.order:
            return  # older than what is known, or the same again
        again = self._held is not None and (held.refused, held.mark) == (self._held.refused, self._held.mark)
        self._held, self._to_store = held, None
        self._seen += 1
        self._highest = max(self._highest, held.version)
        if held.refused is not None:
            self._refuse(held.refused, again)
            return
        policy = held.policy
        if policy is None:
            self._refused = None
            if self._policy is not None and self._source_of_fleet == "store":
                anew = self._policy.version < self._highest
                self._to_store = self._anew(self._policy) if anew else self._policy
            return
        if solution is None:
            try:
                solution = solve(self._frontier, policy.target, policy.hold, policy.mix, self._machine, stored=True)
            except (BudgetInfeasible, InvalidRequest) as error:
                reason = "nonsense" if isinstance(error, InvalidRequest) and not held.stamped else "unfit"
                self._refuse(Refusal(reason, f"the stored budget does not fit this bundle: {error.detail}"), again)
                return
        self._refused = None
        if not held.stamped:
            self._to_store = self._anew(policy)
            return
        known, self._policy = self._policy, policy
        before, self._source_of_fleet = self._source_of_fleet, "store"
        if before == "store" and known == policy:
            return
        self._fleet = policy.version, solution
        self._keep(policy)
        if self._own is None:
            self._adopt(*self._fleet)
            self._tell()

    def _anew(self, policy: Policy) -> Policy:
        return replace(policy, version=self._highest + 1)

    def _refuse(self, refusal: Refusal, again: bool) -> None:
        """The last good budget stays. Told once: every look finds it again."""
        if again and self._refused is not None:
            return
        log.warning("the stored budget is not taken up, version %d stays: %s", self._fleet[0], refusal.detail)
        self._refused = refusal
        if self._on_refusal is not None:
            self._on_refusal(refusal.reason)

    @property
    def generation(self) -> int:
        """The version of what the store holds, as far as is known: that of the fleet's budget, as a rule."""
        return self._fleet[0] if self._held is None or not self._held.version else self._held.version

    @property
    def source(self) -> Source:
        """Where the budget in force comes from."""
        return "replica" if self._own is not None else self._source_of_fleet

    @property
    def fleet(self) -> tuple[int, Policy | None]:
        """Version of the fleet's budget that is in force here, or will be once this replica's own has ended, and that
        budget, where one was ever set."""
        return self._fleet[0], self._policy

    @property
    def refused(self) -> Refusal | None:
        """Why what the store holds is not in force."""
        return self._refused

    def solve(self, target: Target, hold: str = "cost", mix: bool = False) -> Solution:
        """What `put` would put in force. Raises InvalidRequest, BudgetInfeasible."""
        solution = solve(self._frontier, target, hold, mix, self._machine)
        if solution.latency is not None and self._machine is not None and self._machine.profile is None:
            raise _no_profile()
        return solution

    @property
    def held_gmacs(self) -> float | None:
        """The mean cost that is held, moved by a latency target; None where thresholds stay."""
        return None if self._loop is None else self._loop.budget

    @property
    def predicted(self) -> Prediction:
        """What calibration says of the thresholds in force."""
        return self._setting.predicted

    def observe(self, answer: Answer, total_s: float, steered: bool, low: bool = False) -> None:
        """Count one answered request. `steered`: it brought its own min_confidence or max_exit. `low`: it stood behind
        all others, so what it took is no measure of what the target promises.

        Steered images say nothing of the thresholds in force: the cost loop does not see them. Of degraded ones it sees
        how far they went. Neither it nor `observed` sees what was judged by a budget before this one.
        """
        if self._control is not None and not low:
            self._control.answered(total_s, max(result.queue_s + result.compute_s for result in answer.results))
        if answer.point.version != self._point.version:
            return
        # Under a ceiling the loop's row is not in force: what comes says nothing of it.
        loop = None if steered or self._binding() is not None else self._loop
        for result in answer.results:
            self._window.add(result.exit, total_s)
            if loop is not None and loop.observe(result.exit, result.degraded):
                self._apply()

    def tick(self, now: float, deadlines: Sequence[Sequence[float]]) -> None:
        """Let the loops that need a clock look at who waits: the deadlines, by stage. Every `Brownout.TICK` seconds
        while there is traffic."""
        self._now = self._window.now = now
        if self._control is None:
            return
        row, ceiling = self._control.tick(now, deadlines, self._row_of(self._wanted()))
        self._ceiling = None if self._solution.pinned else ceiling
        if row is not None and self._loop is not None:
            gmacs = self._gmacs[row]
            held = self._loop.budget
            if abs(gmacs - held) > AIM_BAND * held:  # else the cost loop would never end a block
                self._loop.aim_at(gmacs)
        self._apply()

    def rest(self) -> None:
        """No traffic: nobody will tick for a while."""
        if self._control is not None:
            self._control.rest()
            self._ceiling = None
            self._apply()

    def _state_of(self, version: int, solution: Solution) -> BudgetState:
        """Of a budget that is not in force, as nothing has been observed of it yet; of what is, all that is known."""
        if version == self._point.version:
            return self.state()
        setting = solution.setting
        return replace(
            self.state(),
            version=version,
            target=dict(solution.target),
            hold=solution.hold,
            clamped=solution.clamped,
            thresholds=setting.thresholds,
            mix=setting.mix,
            predicted=setting.predicted,
            observed=Observed(0, None, None, Quantiles(None, None)),
            row=None if setting.predicted.gmacs is None else self._row_of(setting),
            pressure=0.0,
        )

    def state(self) -> BudgetState:
        solution = self._solution
        return BudgetState(
            version=self._point.version,
            target=dict(solution.target),
            hold=solution.hold,
            clamped=solution.clamped,
            thresholds=self._point.thresholds,
            mix=self._point.mix,
            predicted=self._setting.predicted,
            observed=self._window.observed(),
            feasible=_feasible(self._frontier, self._machine, (solution.latency or (0, DEFAULT_QUANTILE))[1]),
            row=None if self._setting.predicted.gmacs is None else self._row_of(self._setting),
            pressure=self.pressure,
        )

    @property
    def _machine(self) -> Machine | None:
        return None if self._control is None else self._control.machine

    def _wanted(self) -> Setting:
        """What the target asks for, were there no ceiling."""
        if self._loop is None:
            return self._solution.setting
        setting = _setting_at(self._frontier, self._loop.gmacs, self._solution.mix)
        assert setting is not None, "the loop stays on the frontier"
        return setting

    def _row_of(self, setting: Setting) -> int:
        """The dearest row that costs no more; the last where nobody knows the cost."""
        gmacs = setting.predicted.gmacs
        return len(self._gmacs) - 1 if gmacs is None else max(0, bisect_right(self._gmacs, gmacs) - 1)

    def _binding(self) -> int | None:
        """The row of the ceiling, where it is below what the target asks for."""
        return self._ceiling if self._ceiling is not None and self._ceiling < self._row_of(self._wanted()) else None

    def _apply(self) -> None:
        ceiling = self._binding()
        setting = self._wanted() if ceiling is None else Setting.of(self._frontier.rows[ceiling])
        if setting != self._setting:
            self._put_in_force(self._point.version, setting)
            self._tell()

    @property
    def pressure(self) -> float:
        """Share of the wanted cost that an overload takes away, 0 to 1."""
        ceiling, wanted = self._binding(), self._wanted().predicted.gmacs
        return 0.0 if ceiling is None or wanted is None else round(1 - self._gmacs[ceiling] / wanted, 6)

    def _first(self, seed: Policy | None) -> tuple[int, Solution]:
        """Of what can be had without asking anybody."""
        above, instead = 0, "default" if seed is None else "seed"
        try:
            policy = self._store.recall()
        except StoreUnavailable as error:
            log.warning("the stored budget is not used, the %s is: %s", instead, error.detail)
            above, policy = error.extra.get("version", 0), None
        if not self._store.shared:  # nobody else writes to it, so this is what it holds
            self._held = Held(mark=0 if policy is None else policy.version)
        if policy is not None:
            try:
                solution = solve(self._frontier, policy.target, policy.hold, policy.mix, self._machine)
                self._policy, self._source_of_fleet = policy, "last_known" if self._store.shared else "store"
                return policy.version, solution
            except (BudgetInfeasible, InvalidRequest) as error:
                log.warning("the stored budget does not fit this bundle, the %s is used: %s", instead, error.detail)
                # Another target, so another version: an ETag names one budget only.
                above = policy.version
        if seed is not None:
            try:
                solution = solve(self._frontier, seed.target, seed.hold, seed.mix, self._machine)
                self._source_of_fleet = "seed"
                return above + 1, solution
            except (BudgetInfeasible, InvalidRequest) as error:
                log.warning("the seed does not fit this bundle, the default is used: %s", error.detail)
        self._source_of_fleet = "default"
        return above + 1, default_solution(self._frontier)

    def _keep(self, policy: Policy) -> None:
        """Behind the answer: a disk takes several milliseconds to say that it has something."""
        self._unsynced = policy
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync())

    async def _sync(self) -> None:
        try:
            while (policy := self._unsynced) is not None:
                self._unsynced = None
                try:
                    await asyncio.to_thread(self._store.sync, policy)
                except StoreUnavailable as error:  # what was put meanwhile may fare better
                    log.warning("the budget would not outlive a power failure: %s", error.detail)
        finally:
            self._syncing = None

    def release(self) -> None:
        """Store no budget any more: the next server may own the state from now on."""
        self._store.close()

    @property
    def syncing(self) -> bool:
        """Whether what was stored is on its way to the disk."""
        return self._syncing is not None

    async def close(self) -> None:
        """Wait until what was stored is on the disk."""
        if self._syncing is not None:
            await self._syncing

    def _adopt(self, version: int, solution: Solution) -> None:
        # Who asks again for what is held, as what keeps a wanted state does, finds it as the loop has moved it.
        again = self._loop is not None and solution.same_target(self._solution)
        if not again:
            self._solution, self._loop = solution, None
            if solution.held_gmacs is not None:
                self._loop = CostLoop(self._frontier.rows, self._frontier.stage_gmacs, solution.held_gmacs)
        self._put_in_force(version, self._wanted() if again else solution.setting)
        self._window = _Window(self._frontier.stage_gmacs, self._now)
        if self._control is not None:
            self._control.aim_at(*(solution.latency or (None,)))
        if solution.pinned:
            self._ceiling = None
        elif self._ceiling is not None:  # an overload does not end with a new target
            self._apply()

    def _put_in_force(self, version: int, setting: Setting) -> None:
        self._setting = setting
        self._point = OperatingPoint(version, setting.thresholds, setting.mix)

    def _tell(self) -> None:
        for callback in self._callbacks:
            callback(self._point)


class _Window:
    """The exits and latencies of the last images. Three array writes per image; all sums wait for a reader."""

    def __init__(self, stage_gmacs: tuple[float, ...], now: float) -> None:
        self.now = now  # as it was last told, no more than a tick ago while there is traffic
        self._stage_gmacs = stage_gmacs
        self._exits = np.zeros(WINDOW, dtype=np.uint8)
        self._seconds = np.zeros(WINDOW, dtype=np.float32)
        self._when = np.zeros(WINDOW)
        self._count = 0

    def add(self, exit: int, seconds: float) -> None:
        at = self._count % WINDOW
        self._exits[at] = exit
        self._seconds[at] = seconds
        self._when[at] = self.now
        self._count += 1

    def observed(self) -> Observed:
        young = self._when[: min(self._count, WINDOW)] > self.now - WINDOW_S
        images = int(np.count_nonzero(young))
        if not images:
            return Observed(0, None, None, Quantiles(None, None))
        exits, seconds = self._exits[: len(young)][young], self._seconds[: len(young)][young]
        fractions = np.bincount(exits - 1, minlength=len(self._stage_gmacs)) / images
        p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1000
        return Observed(
            images,
            round(float(fractions @ np.asarray(self._stage_gmacs)), 9),
            tuple(round(float(f), 6) for f in fractions),
            Quantiles(round(float(p50), 3), round(float(p99), 3)),
        )


def _matches(if_match: IfMatch, version: int) -> bool:
    return if_match is None or if_match == "*" or version in ((if_match,) if isinstance(if_match, int) else if_match)


def _mismatch(version: int, if_match: IfMatch) -> VersionMismatch:
    if _matches(if_match, version):
        return VersionMismatch(f"version {version} of the budget was edited by hand meanwhile", version=version)
    named = ", ".join(map(str, [if_match] if isinstance(if_match, int) else sorted(if_match or [])[:8]))
    return VersionMismatch(f"the budget is at version {version}, not {named or 'what If-Match names'}", version=version)


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


def _feasible(frontier: Frontier, machine: Machine | None, quantile: float = DEFAULT_QUANTILE) -> Feasible:
    cheapest, knee = frontier.rows[0], frontier.knee
    latency_ms = None
    if machine is not None and machine.profile is not None:
        # Microseconds, rounded up: what is told to be feasible is.
        low, high = (1e6 * latency for latency in machine.latency_range(quantile))
        if math.isfinite(low):
            latency_ms = (math.ceil(low) / 1000, math.ceil(high) / 1000 if math.isfinite(high) else None)
    return Feasible((cheapest.gmacs, knee.gmacs), (cheapest.accuracy, knee.accuracy), latency_ms)


def _no_profile() -> InvalidRequest:
    return InvalidRequest("a latency budget needs a latency profile, and none was measured; see: dvt profile")


def _infeasible(feasible: Feasible, detail: str) -> BudgetInfeasible:
    return BudgetInfeasible(detail, feasible=asdict(feasible))
