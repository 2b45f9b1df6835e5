"""The one file that knows how to build all parts, and the sequence in which they start and stop.

A server is `starting` (the engine warms up), `serving`, `leaving` (not ready any more, but serving: a load balancer
looks away), `draining` (no new work, what was accepted is answered), `stopped`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from server import release
from server.budget.audit import Auditor
from server.budget.configmap import ConfigMapStore, NoCluster, account_namespace, by_kubeconfig, in_cluster
from server.budget.control import Machine
from server.budget.controller import BudgetController, BudgetState
from server.budget.drift import Drift
from server.budget.fleet import Fleet
from server.budget.loops import Brownout
from server.budget.places import Places
from server.budget.preview import Previewer
from server.budget.store import FileStore, MemoryStore, PolicyStore, StateInUse, read_seed
from server.bundle.frontier import FrontierRow, with_ms
from server.bundle.manifest import Bundle
from server.bundle.profile import LiveProfile
from server.calibration.profiling import kept_profile, profile_at_start
from server.cascade.batcher import Batcher
from server.cascade.policy import DeepestRipe
from server.cascade.scheduler import LOW, NORMAL, Priority, Scheduler
from server.core import Answer, Engine, ImageResult, Pixels
from server.frontend.control_token import ControlToken
from server.frontend.front import Figures, Front, Phase, queue_full, threads_stalled
from server.metrics import Metrics
from server.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_HANDOVER_S = 5.0  # for the server before this one to be told to stop
_QUIET = 0.1  # images a second: nobody is there
_STALLED = 20  # times what a batch is believed to take: no load makes it so slow


@dataclass(frozen=True, slots=True)
class Underway:
    """What one thread is at: a batch in the engine, or an image that is being decoded."""

    threads: str  # "executor" or "decode"
    name: str
    age: float  # seconds
    stalled: bool  # for so long that it is not believed to come back

    def __str__(self) -> str:
        what = "a batch of {}, in the engine" if self.threads == "executor" else "the thread {}, at one image"
        return f"{what.format(self.name)} for {self.age:.1f} s"


class Apart(Protocol):
    """Front ends in processes of their own, where there are any."""

    @property
    def count(self) -> int:
        """Of those at work."""
        ...

    @property
    def figures(self) -> Figures:
        """Of all of them together, as they were told last."""
        ...

    def tell_door(self) -> None:
        """The phase, or what the queue has room for, may have changed."""
        ...

    async def wait_idle(self) -> None:
        """Until none of them has a request, nor one on its way into it, once they know that the server drains."""
        ...

    async def refresh(self) -> None:
        """Ask them for what they count."""
        ...


class Service(Front):
    """All parts of one server, and the owner of its phase: a front whose cascade runs in its own process."""

    def __init__(
        self, settings: Settings, bundle: Bundle, engine: Engine, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises SettingsError for settings that do not fit the bundle."""
        manifest = bundle.manifest
        self.metrics = Metrics(
            model=manifest.name, version=manifest.version, release=release(), stage_gmacs=manifest.stage_gmacs
        )
        super().__init__(settings, manifest, self.metrics, Places(), clock)
        self.bundle = bundle
        self.engine = engine
        self.apart: Apart | None = None
        self.control_token = _control_token(settings.control_token_file)
        self.executors = settings.executors or engine.executors
        self.batch_sizes = _batch_sizes(settings, bundle, engine, self.executors)
        self.machine = Machine(
            bundle.frontier.rows, self.batch_sizes, self.executors, places=settings.max_queued_images
        )
        store = _store(settings, bundle)
        self.budget = BudgetController(
            bundle.frontier,
            store,
            machine=self.machine,
            seed=None if settings.policy_seed is None else read_seed(settings.policy_seed),
            on_refusal=self.metrics.policy_refused,
        )
        self.fleet = Fleet(self.budget, store, self.metrics, clock)
        self.previewer = Previewer(bundle.frontier)
        self.scheduler = Scheduler(
            self.budget.point,
            max_batch_sizes=self.batch_sizes,
            max_queued_images=settings.max_queued_images,
            # What survives always finds a place: no more is let in than the engine can hold.
            max_slots=min(settings.max_slots, engine.max_slots or settings.max_slots),
            executors=self.executors,
        )
        self.batcher = Batcher(engine, self.scheduler, self, self.executors, clock)
        self._ticker: asyncio.TimerHandle | None = None  # while there is traffic
        self._told_stalled = False
        self.audit = Auditor(
            self.batcher,
            self.metrics,
            fraction=settings.audit_fraction,
            exits=self.exits,
            version=self.budget.point.version,
        )
        self.drift = Drift(
            bundle.frontier.records,
            bundle.frontier.samples,
            expected=lambda: self.budget.predicted.exit_fractions,
            point=self.budget.point,
        )
        for follow in (self.batcher.retune, self.audit.retune, self.drift.retune):
            self.budget.on_change(follow)
        self.metrics.watch(
            executors=self.executors,
            batch_sizes=self.batch_sizes,
            frontier=bundle.frontier.rows,
            queue_depths=lambda: dict(enumerate(self.batcher.load.waiting, start=1)),
            slots_in_use=lambda: engine.slots_in_use,
            figures=self.figures if settings.frontends == 0 else self._figures_apart,
            front_ends=lambda: 0 if self.apart is None else self.apart.count,
            budget=self.budget.state,
            held_gmacs=lambda: self.budget.held_gmacs,
            fleet=self.fleet.state,
            ready=lambda: self.ready,
            running=lambda: (
                max((one.age for one in self._batches()), default=0.0),
                sum(one.stalled for one in self._batches()),
            ),
            profile=lambda: self.machine.profile,
            kappa=lambda: self.machine.tail.kappa,
            arrival_rate=lambda: self.machine.burst.value,
            audit=self.audit.state,
            drift=self.drift.state,
        )
        # What does not change is written once.
        self.frontier_document = orjson.dumps(_describe_frontier(bundle, bundle.frontier.rows))
        self.model_document = orjson.dumps(_describe_model(bundle, engine, self.executors, self.batch_sizes))

    # -- what the routes ask

    @property
    def ailment(self) -> str | None:
        """Why the process should not live on; None where all is well."""
        if not self.batcher.healthy:
            return "The batch loop has died; the process is ending"
        stalled = self._stalled()
        return f"Stalled: {stalled[0]}" if stalled else None

    @property
    def ready(self) -> bool:
        return self.phase is Phase.SERVING and self.ailment is None

    def check_door(self) -> None:
        self.phase.check()
        if self.has_stalled():
            raise threads_stalled()
        self.check_decoder()

    def has_stalled(self) -> bool:
        """Whether no executor is believed to come back: nothing would come of the wait for a deadline."""
        if self.clock() - self.batcher.oldest <= self.settings.stall_timeout_s:  # as a rule; asked for every request
            return False
        return sum(one.stalled for one in self._batches()) >= self.executors

    def check_queue(self, priority: Priority) -> None:
        if self.batcher.is_full(priority):
            raise queue_full()

    def submit(self, pixels: Sequence[Pixels], *, arrived: float, **terms: Any) -> Awaitable[Answer]:  # noqa: ARG002
        return self.batcher.submit(pixels, **terms)

    def note_answer(
        self, pixels: Sequence[Pixels], answer: Answer, total_s: float, *, steered: bool, low: bool
    ) -> None:
        self.drift.observe(answer, steered)
        self.budget.observe(answer, total_s, steered, low=low)
        if not steered:
            self.audit.offer(pixels, answer)

    def note_arrival(self, images: int, timeout_s: float, priority: Priority) -> None:
        if priority < LOW:
            self.machine.arrived(images, timeout_s)
        if self._ticker is None:
            self._tick()

    def _tick(self) -> None:
        """The loops that need a clock get it while there is traffic: an idle server sleeps."""
        self.budget.tick(self.clock(), self.batcher.deadlines(NORMAL))
        self._note_stalls()
        busy = self.intake.requests or self.batcher.out or self.decoder.out
        if busy or self.machine.burst.value > _QUIET or self.budget.pressure:
            self._ticker = asyncio.get_running_loop().call_later(Brownout.TICK, self._tick)
        else:
            self._ticker = None
            self.budget.rest()

    def _note_stalls(self) -> None:
        """In the log once, and once when it is over."""
        stalled = self._stalled()
        if stalled and not self._told_stalled:
            log.error("stalled: %s", "; ".join(stalled))
        elif self._told_stalled and not stalled:
            log.warning("what had stalled has come back")
        self._told_stalled = bool(stalled)
        self._tell_door()

    def _batches(self) -> list[Underway]:
        """What the executors are at."""
        now, profile, allowed = self.clock(), self.machine.profile, self.settings.stall_timeout_s
        found = []
        for batch in self.batcher.out:
            age, stage = now - batch.started, batch.run.stage
            stalled = age > allowed and (profile is None or age > _STALLED * profile.seconds(stage, len(batch.images)))
            found.append(Underway("executor", f"stage {stage}", age, stalled))
        return found

    def _underway(self) -> list[Underway]:
        """What the threads of this process are at."""
        now, allowed = self.clock(), self.settings.stall_timeout_s
        decodes = [
            Underway("decode", name, now - began, now - began > allowed) for name, began in self.decoder.out.items()
        ]
        return self._batches() + decodes

    def _stalled(self) -> list[str]:
        found = [str(one) for one in self._underway() if one.stalled]
        if self.apart is not None and (count := self.apart.figures.decodes_stalled):
            found.append(f"{count} decoding thread{'s' * (count > 1)} of the front ends")
        return found

    def _figures_apart(self) -> Figures:
        return Figures() if self.apart is None else self.apart.figures

    async def refresh(self) -> None:
        """Before figures are read, or all is said to be well: ask who counts apart."""
        if self.apart is not None:
            await self.apart.refresh()

    def unfinished(self) -> list[str]:
        """What may keep the server from its end. Called from another thread, as the event loop may hang."""
        found = ["the warm-up of the engine"] if self.phase is Phase.STARTING else []
        found += map(str, self._underway())
        if self.budget.syncing:
            found.append("the sync of the stored budget to the disk")
        if requests := self.intake.requests + self._figures_apart().requests:
            found.append(f"{requests} request{'s' * (requests > 1)}")
        return found

    def note_budget(self, state: BudgetState, client: object, request_id: str, expires_s: float | None) -> None:
        """The audit line of a change."""
        log.info(
            "budget %d%s: target %s, hold %s, thresholds %s, mix %s, from %s, request %s",
            state.version,
            "" if expires_s is None else f", of this server alone for {expires_s:g} s",
            state.target,
            state.hold,
            state.thresholds,
            state.mix,
            client,
            request_id,
        )

    # -- what the batcher tells (core.Observer)

    def batch_finished(self, stage: int, size: int, seconds: float, abandoned: int, waited_s: float) -> None:
        self.metrics.batch_finished(stage, size, seconds, abandoned, waited_s)
        if self.machine.profile is not None:
            self.machine.profile.observe(stage, size, seconds)
        self._tell_door()

    def image_finished(self, result: ImageResult) -> None:
        self.metrics.image_finished(result)

    def image_abandoned(self, reason: str) -> None:
        self.metrics.image_abandoned(reason)

    # -- start and stop

    async def start(self) -> None:
        """Returns when the first request would not be slower than the next, and what batches take is known."""
        if not self.settings.frontends:
            self.decoder.start()
        await self.batcher.start()
        await self.fleet.start()  # before what is measured, as it is half a second's work for the first time
        profile = await asyncio.to_thread(
            profile_at_start,
            self.bundle,
            self.engine,
            executors=self.executors,
            seconds=self.settings.profile_seconds,
        )
        if profile is not None:
            self.machine.profile = LiveProfile(profile)
            seconds = self.machine.profile.seconds
            policy = DeepestRipe(seconds, self.batch_sizes)
            self.scheduler.learn(seconds, policy, policy.ripe, policy.shares if self.engine.own_cores else None)
            image_seconds = profile.image_seconds(self.batch_sizes)
            rows = with_ms(self.bundle.frontier.rows, [1000 * s for s in image_seconds])
            self.frontier_document = orjson.dumps(_describe_frontier(self.bundle, rows))
        elif "latency_ms" in self.budget.state().target:
            log.warning("the stored latency budget is not held: no latency profile was measured; see: dvt profile")
        self._enter(Phase.SERVING)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._tell_door()

    def _tell_door(self) -> None:
        if self.apart is not None:
            self.apart.tell_door()

    def leave(self) -> None:
        """Not ready any more, but serving; answers close their connections."""
        self._enter(Phase.LEAVING)

    async def drain(self, timeout_s: float) -> None:
        """Take no new work and answer what was accepted; what the timeout finds is answered with what is known."""
        self._enter(Phase.DRAINING)
        self.budget.release()
        await self.audit.close()
        until = self.clock() + timeout_s
        try:
            # What passed the door and is still on its way to the batcher is let in.
            async with asyncio.timeout(timeout_s):
                await self.intake.wait_idle()
                if self.apart is not None:
                    await self.apart.wait_idle()
        except TimeoutError:
            log.debug("%d requests were not answered within %g s", self.intake.requests, timeout_s)
        await self.batcher.drain(max(0.0, until - self.clock()))

    async def stop(self) -> None:
        """Close the engine. May be called twice, and without a start."""
        self._enter(Phase.STOPPED)
        if self._ticker is not None:
            self._ticker.cancel()
        await self.audit.close()
        await self.decoder.close()
        await self.batcher.close()
        await self.fleet.stop()
        await self.budget.close()
        self.budget.release()


def _store(settings: Settings, bundle: Bundle) -> PolicyStore:
    """A file is keyed by the bundle's version: a budget that was chosen for one model says nothing of another. The
    versions of a model that a fleet serves at the same time, as while a new one comes, share their budget."""
    if settings.policy_store == "configmap":
        return _configmap(settings, bundle)
    if settings.state_dir is None:
        return MemoryStore()
    try:
        # A server that is about to stop, as in a rolling restart, gives its budget up as soon as it drains.
        return FileStore(
            settings.state_dir / f"budget-{bundle.manifest.version}.json", wait_s=settings.drain_delay_s + _HANDOVER_S
        )
    except StateInUse as error:
        raise SettingsError(f"{error}: give each a DVT_STATE_DIR of its own, or an empty one") from None


def _configmap(settings: Settings, bundle: Bundle) -> ConfigMapStore:
    name, namespace = settings.policy_configmap, settings.policy_namespace or account_namespace()
    assert name is not None, "the settings see to it"
    if namespace is None:
        raise SettingsError("DVT_POLICY_NAMESPACE is needed: there is no service account of a pod that would name it")
    try:
        connect = by_kubeconfig(settings.policy_kubeconfig) if settings.policy_kubeconfig else in_cluster()
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"DVT_POLICY_STORE=configmap needs {error.name}: pip install 'dvt-serve[kubernetes]'"
        ) from None
    except NoCluster as error:
        raise SettingsError(f"DVT_POLICY_STORE=configmap: {error}; or set DVT_POLICY_KUBECONFIG") from None
    model = bundle.manifest.name
    kept = None
    if settings.state_dir is not None:
        kept = settings.state_dir / f"fleet-{namespace}-{name}-{re.sub(r'[^A-Za-z0-9.-]', '_', model)[:80]}.json"
    return ConfigMapStore(name, namespace, model, connect, kept)


def _control_token(file: Path | None) -> ControlToken:
    try:
        return ControlToken(file)
    except ValueError as error:
        raise SettingsError(f"bad setting DVT_CONTROL_TOKEN_FILE={str(file)!r}: {error}") from None


def _batch_sizes(settings: Settings, bundle: Bundle, engine: Engine, executors: int) -> tuple[int, ...]:
    """As set; else as the bundle's profile says that they pay here, where it has one (a short profile of the start is
    too noisy for that); else as the engine says."""
    if settings.max_batch_sizes is None:
        kept = kept_profile(bundle, engine, executors)
        return engine.max_batch_sizes if kept is None else kept.sizes_that_pay()
    settings.check_batch_sizes(len(bundle.manifest.stages))
    return settings.max_batch_sizes


def _describe_frontier(bundle: Bundle, rows: Sequence[FrontierRow]) -> dict[str, Any]:
    frontier = bundle.frontier
    return {
        "criterion": frontier.criterion,
        "source": frontier.source,
        "samples": frontier.samples,
        "stage_gmacs": frontier.stage_gmacs,
        "rows": [dataclasses.asdict(row) for row in rows],
        "certificate": dataclasses.asdict(frontier.certificate) if frontier.certificate else None,
    }


def _describe_model(bundle: Bundle, engine: Engine, executors: int, batch_sizes: Sequence[int]) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "labels": manifest.labels,
        "stages": [
            {"stage": number, "grid": stage.grid, "gmacs": stage.gmacs}
            for number, stage in enumerate(manifest.stages, start=1)
        ],
        "precision": manifest.precision,
        "criterion": manifest.criterion,
        "engine": {
            "name": engine.name,
            "runtime": engine.runtime,
            "device": engine.device,
            "executors": executors,
            "max_batch_sizes": batch_sizes,
        },
        "preprocessing": manifest.preprocessing.model_dump(mode="json"),
    }
