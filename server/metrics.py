"""Every metric of the server, in its own registry: base units (seconds), labels from closed sets.

Counter pairs are chosen so that one division answers a question: mean batch fill of a stage is
`dvt_batch_images_total / dvt_batches_total`, mean engine time per image of a stage is
`dvt_engine_seconds_total / dvt_batch_images_total`, mean cost is `dvt_image_macs_total / dvt_images_total`.

What has an owner elsewhere (queues, slots, the budget) is read from it when Prometheus asks; only events are kept here.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.core import ImageResult
from server.errors import STORE_REASONS, ServeError

if TYPE_CHECKING:
    from server.budget.audit import AuditState
    from server.budget.confidence_sequence import Interval
    from server.budget.controller import BudgetState
    from server.budget.drift import DriftState
    from server.budget.fleet import FleetState
    from server.bundle.frontier import FrontierRow
    from server.bundle.profile import LiveProfile
    from server.frontend.front import Figures

disable_created_metrics()  # type: ignore[no-untyped-call]  # a creation time beside every series would make half of each scrape

CONTENT_TYPE = CONTENT_TYPE_LATEST

REASONS = ("disconnect", "deadline", "overloaded", "engine_failed", "shutdown")  # of Observer.image_abandoned
REFUSALS = ("nonsense", "other_model", "unfit")  # of Metrics.policy_refused
SOURCES = ("store", "last_known", "seed", "default", "replica")  # of the budget in force
AUDIT_REASONS = ("full", "engine_failed")  # of Metrics.audit_dropped
CLASSIFY = "/classify"
CLASSIFY_STATUSES = (200, 500, 503, 504)  # that objectives are about
PRIORITIES = ("high", "normal", "low")

PROMISED_S = 0.5  # what objectives promise an answer in: a bucket of SECONDS, and `le` in deploy/prometheus/rules

OUTLINE_STEPS = 16

# From a tenth of a millisecond (a queue that is empty) to the largest sensible deadline.
SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class RequestCounts(Protocol):
    """What is counted where HTTP is spoken."""

    def request_finished(self, route: str, status: int, seconds: float, priority: str = "", hurried: str = "") -> None:
        """`route`: the path of a route of ours, or "other"; never what the client sent. `priority`: one of PRIORITIES,
        or nothing; `hurried`: "true", "false" or nothing."""
        ...

    def answered(self, priority: str, seconds: float) -> None: ...

    def request_refused(self, code: str) -> None: ...

    def decoded(self, seconds: float) -> None: ...


DECODE = "decode"  # among the routes of `Counted.seconds`


@dataclass(frozen=True, slots=True)
class Counted:
    """What a process that speaks HTTP has counted: requests by route, status, priority and hurry, refusals by code, and
    seconds by route, and by the priority of who was answered: how many fell into each bucket of SECONDS and beyond, and
    their sum."""

    requests: Mapping[tuple[str, int, str, str], int]
    refused: Mapping[str, int]
    seconds: Mapping[str, tuple[Sequence[int], float]]


class Metrics:
    """Owns the registry. Implements `core.Observer`; the edge calls `request_*`."""

    def __init__(self, *, model: str, version: str, release: str, stage_gmacs: Sequence[float]) -> None:
        self.registry = CollectorRegistry()
        self._refused = Counter(
            "dvt_refused", "Requests answered with an error, by its code.", ["code"], registry=self.registry
        )
        abandoned = Counter(
            "dvt_images_abandoned", "Images that left without an answer.", ["reason"], registry=self.registry
        )
        self._audits_chosen = Counter(
            "dvt_audits_chosen", "Requests chosen for an audit, with one image of each.", registry=self.registry
        )
        self._audited = Counter(
            "dvt_audited_images", "Images whose answer was held against the last exit's.", registry=self.registry
        )
        self._audit_disagreements = Counter(
            "dvt_audit_disagreements",
            "Of those: the last exit gave another class.",
            registry=self.registry,
        )
        self._represented = Counter(
            "dvt_audit_represented", "Chosen requests that the audited images stand for.", registry=self.registry
        )
        self._represented_disagreements = Counter(
            "dvt_audit_represented_disagreements",
            "Of those: stood for by an image to which the last exit gave another class.",
            registry=self.registry,
        )
        audits_dropped = Counter(
            "dvt_audits_dropped",
            "Chosen for an audit and not audited.",
            ["reason"],
            registry=self.registry,
        )
        policy_refused = Counter(
            "dvt_policy_refused", "Stored budgets that were not taken up, by why.", ["reason"], registry=self.registry
        )
        policy_errors = Counter(
            "dvt_policy_errors",
            "Times that the store of the fleet's budget could not be followed, by why.",
            ["reason"],
            registry=self.registry,
        )
        self._restarts = Counter(
            "dvt_frontend_restarts", "Front ends that took the place of one that had died.", registry=self.registry
        )
        ProcessCollector(registry=self.registry)

        # Every series exists from the start, so that a rate over it never misses its first event.
        self._abandoned_children = {reason: abandoned.labels(reason) for reason in REASONS}
        self._audits_dropped_children = {reason: audits_dropped.labels(reason) for reason in AUDIT_REASONS}
        self._policy_refused_children = {reason: policy_refused.labels(reason) for reason in REFUSALS}
        self._policy_errors_children = {reason: policy_errors.labels(reason) for reason in STORE_REASONS}
        for code in _codes(ServeError):
            self._refused.labels(code)
        self._busy = _Busy(stage_gmacs)
        self.registry.register(self._busy)

        build = {"model": model, "version": version, "release": release, "python": platform.python_version()}
        self._live = _Live(build)
        self.registry.register(self._live)

    # What the edge tells

    def request_finished(self, route: str, status: int, seconds: float, priority: str = "", hurried: str = "") -> None:
        busy, key = self._busy, (route, status, priority, hurried)
        busy.requests[key] = busy.requests.get(key, 0) + 1
        seconds_of = busy.request_seconds.get(route)
        if seconds_of is None:
            seconds_of = busy.request_seconds[route] = _Spread()
        seconds_of.add(seconds)

    def request_refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def answered(self, priority: str, seconds: float) -> None:
        self._busy.answers[priority].add(seconds)

    def decoded(self, seconds: float) -> None:
        self._busy.decode.add(seconds)

    def frontend_restarted(self) -> None:
        self._restarts.inc()

    def add(self, counted: Counted) -> None:
        """What was counted elsewhere, and not told before."""
        busy = self._busy
        for key, count in counted.requests.items():
            busy.requests[key] = busy.requests.get(key, 0) + count
        for code, count in counted.refused.items():
            self._refused.labels(code).inc(count)
        for name, (counts, seconds) in counted.seconds.items():
            spread = busy.answers.get(name) or (
                busy.decode if name == DECODE else busy.request_seconds.setdefault(name, _Spread())
            )
            spread.counts = [one + more for one, more in zip(spread.counts, counts, strict=True)]
            spread.sum += seconds

    # What the batcher tells (core.Observer)

    def batch_finished(self, stage: int, size: int, seconds: float, abandoned: int, waited_s: float) -> None:
        of = self._busy.stages[stage - 1]
        of.seconds.add(seconds)
        of.images += size
        of.abandoned_s += seconds * abandoned / size
        of.waited_s += waited_s

    def image_finished(self, result: ImageResult) -> None:
        busy = self._busy
        busy.images[result.exit, result.degraded] += 1
        busy.queue.add(result.queue_s)
        busy.compute.add(result.compute_s)

    def image_abandoned(self, reason: str) -> None:
        self._abandoned_children[reason].inc()

    # What the auditor tells

    def audit_chosen(self) -> None:
        self._audits_chosen.inc()

    def audited(self, agreement: float, stands_for: int) -> None:
        """One image, for so many chosen requests."""
        self._audited.inc()
        self._audit_disagreements.inc(1 - agreement)
        self._represented.inc(stands_for)
        self._represented_disagreements.inc((1 - agreement) * stands_for)

    def audit_dropped(self, reason: str, audits: int = 1) -> None:
        """`reason`: "full" (too many are pending, others stand for them) or "engine_failed"."""
        self._audits_dropped_children[reason].inc(audits)

    # What is told of the fleet's budget

    def policy_refused(self, reason: str) -> None:
        """`reason`: of REFUSALS."""
        self._policy_refused_children[reason].inc()

    def policy_error(self, reason: str) -> None:
        """`reason`: of STORE_REASONS."""
        self._policy_errors_children[reason].inc()

    # What is read when Prometheus asks

    def watch(
        self,
        *,
        executors: int,
        batch_sizes: Sequence[int],
        frontier: Sequence[FrontierRow],
        queue_depths: Callable[[], Mapping[int, int]],
        slots_in_use: Callable[[], int],
        figures: Callable[[], Figures],
        front_ends: Callable[[], int],
        budget: Callable[[], BudgetState],
        held_gmacs: Callable[[], float | None],
        fleet: Callable[[], FleetState],
        ready: Callable[[], bool],
        running: Callable[[], tuple[float, int]],
        profile: Callable[[], LiveProfile | None],
        kappa: Callable[[], float],
        arrival_rate: Callable[[], float],
        audit: Callable[[], AuditState],
        drift: Callable[[], DriftState],
    ) -> None:
        """Say what is fixed, and where the live figures are to be read. Called once, when the parts have been built."""
        outline = _outline(frontier)
        self._live.sources = {
            "executors": lambda: executors,
            "batch_sizes": lambda: batch_sizes,
            "outline": lambda: outline,
            "queue_depths": queue_depths,
            "slots_in_use": slots_in_use,
            "figures": figures,
            "front_ends": front_ends,
            "budget": budget,
            "held_gmacs": held_gmacs,
            "fleet": fleet,
            "ready": ready,
            "running": running,
            "profile": profile,
            "kappa": kappa,
            "arrival_rate": arrival_rate,
            "audit": audit,
            "drift": drift,
        }

    def render(self) -> bytes:
        """The text exposition format, to be sent as CONTENT_TYPE."""
        return generate_latest(self.registry)


class _Spread:
    """Seconds, by the buckets of SECONDS."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds


class _OfStage:
    __slots__ = ("abandoned_s", "images", "seconds", "waited_s")

    def __init__(self) -> None:
        self.seconds = _Spread()  # of its batches
        self.images = 0
        self.abandoned_s = self.waited_s = 0.0


class _Busy(Collector):
    """What is counted for every request, as plain numbers: the library's counters take locks, for half a dozen of them
    a tenth of all that the event loop does for a request. Written and read on the event loop."""

    def __init__(self, stage_gmacs: Sequence[float]) -> None:
        self._stage_macs = tuple(gmacs * 1e9 for gmacs in stage_gmacs)
        self.requests: dict[tuple[str, int, str, str], int] = {}  # by route, status, priority, and whether in a hurry
        for status in CLASSIFY_STATUSES:
            for asked in (("", ""), *product(PRIORITIES, ("false", "true"))):
                self.requests[CLASSIFY, status, *asked] = 0
        self.request_seconds: dict[str, _Spread] = {}
        exits = range(1, len(stage_gmacs) + 1)
        self.images = dict.fromkeys([(exit_, degraded) for exit_ in exits for degraded in (False, True)], 0)
        self.answers = {priority: _Spread() for priority in PRIORITIES}
        self.decode, self.queue, self.compute = _Spread(), _Spread(), _Spread()
        self.stages = [_OfStage() for _ in exits]

    def describe(self) -> list[Metric]:
        return list(self.collect())

    def collect(self) -> Iterator[Metric]:
        macs = sum(count * self._stage_macs[exit_ - 1] for (exit_, _), count in self.images.items())
        stages = [((str(stage),), of) for stage, of in enumerate(self.stages, start=1)]
        yield _counts(
            "dvt_requests",
            "Requests answered, by route and status; 499: the client hung up. Of those to /classify whose query could"
            " be read: their priority, and whether they allow less time than an answer is promised in.",
            ("route", "status", "priority", "hurried"),
            [((route, str(status), *asked), count) for (route, status, *asked), count in self.requests.items()],
        )
        yield _spreads(
            "dvt_request_seconds",
            "From the end of the request's header to the end of the answer.",
            ("route",),
            [((route,), spread) for route, spread in self.request_seconds.items()],
        )
        yield _spreads(
            "dvt_answer_seconds",
            "From the last byte of a request to /classify to its answer; only those that were answered.",
            ("priority",),
            [((priority,), spread) for priority, spread in self.answers.items()],
        )
        yield _counts(
            "dvt_images",
            "Images answered, by exit; degraded: a deadline, not a threshold, ended the cascade.",
            ("exit", "degraded"),
            [((str(exit_), str(degraded).lower()), count) for (exit_, degraded), count in self.images.items()],
        )
        yield _counts("dvt_image_macs", "Multiply-accumulates that the answered images took.", (), [((), macs)])
        for name, help_, spread in (
            ("dvt_decode_seconds", "Decoding of one request's images, the wait for a thread included.", self.decode),
            ("dvt_queue_seconds", "Time for which an answered image waited, all stages.", self.queue),
            ("dvt_compute_seconds", "Wall time of the batches that an answered image took part in.", self.compute),
        ):
            yield _spreads(name, help_, (), [((), spread)])
        yield _spreads(
            "dvt_batch_seconds", "Wall time of one batch.", ("stage",), [(stage, of.seconds) for stage, of in stages]
        )
        for name, help_, values in (
            ("dvt_batches", "Batches run.", [(stage, sum(of.seconds.counts)) for stage, of in stages]),
            ("dvt_batch_images", "Images in the batches run.", [(stage, of.images) for stage, of in stages]),
            ("dvt_engine_seconds", "Wall time spent in the engine.", [(stage, of.seconds.sum) for stage, of in stages]),
            (
                "dvt_waited_seconds",
                "Time for which the images of the batches run had waited for the stage; audits left out.",
                [(stage, of.waited_s) for stage, of in stages],
            ),
            (
                "dvt_abandoned_engine_seconds",
                "The part of dvt_engine_seconds spent on images whose client had left.",
                [(stage, of.abandoned_s) for stage, of in stages],
            ),
        ):
            yield _counts(name, help_, ("stage",), values)


def _counts(
    name: str, help_: str, labels: Sequence[str], values: Sequence[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _spreads(
    name: str, help_: str, labels: Sequence[str], values: Sequence[tuple[Sequence[str], _Spread]]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, help_, labels=labels)
    bounds = [*map(floatToGoString, SECONDS), "+Inf"]
    for key, spread in values:
        family.add_metric(key, list(zip(bounds, accumulate(spread.counts), strict=True)), spread.sum)
    return family


class _Live(Collector):
    """Gauges whose values other parts own."""

    def __init__(self, build: Mapping[str, str]) -> None:
        self._build = dict(build)
        self.sources: dict[str, Callable[[], Any]] = {}

    def describe(self) -> list[Metric]:
        return list(self._families({}))

    def collect(self) -> Iterator[Metric]:
        yield from self._families({name: read() for name, read in self.sources.items()})

    def _families(self, now: Mapping[str, Any]) -> Iterator[Metric]:
        build = GaugeMetricFamily("dvt_build_info", "What is served, and by what; always 1.", labels=list(self._build))
        build.add_metric(list(self._build.values()), 1)
        yield build

        budget: BudgetState | None = now.get("budget")
        profile: LiveProfile | None = now.get("profile")
        audit: AuditState | None = now.get("audit")
        drift: DriftState | None = now.get("drift")
        at: Figures | None = now.get("figures")
        age_s, stalled = now.get("running", (0.0, 0))
        stages = profile.stages if profile else ()
        outline: Mapping[int, FrontierRow] = now.get("outline", {})
        yield from _of_budget(budget)
        yield from _of_fleet(now.get("fleet"))
        for name, help_, label, values in (
            (
                "dvt_frontier_gmacs",
                "Predicted mean cost of some rows of the frontier, in billions of multiply-accumulates.",
                "row",
                {row: point.gmacs for row, point in outline.items()},
            ),
            (
                "dvt_frontier_accuracy",
                "Predicted accuracy of the same rows.",
                "row",
                {row: point.accuracy for row, point in outline.items()},
            ),
            (
                "dvt_max_batch_size",
                "Largest batch of a stage.",
                "stage",
                _numbered(now.get("batch_sizes", ())),
            ),
            ("dvt_queue_depth", "Images that wait for a stage.", "stage", now.get("queue_depths", {})),
            (
                "dvt_oldest_run_seconds",
                "Age of the oldest batch or image that a thread is at, by the kind of thread; 0 where all are idle.",
                "threads",
                {"executor": age_s, "decode": at.decode_age_s} if at else {},
            ),
            (
                "dvt_stalled_threads",
                "Threads that have been at one batch or image for longer than DVT_STALL_TIMEOUT_S allows.",
                "threads",
                {"executor": stalled, "decode": at.decodes_stalled} if at else {},
            ),
            (
                "dvt_profile_fixed_seconds",
                "What a batch is believed to take, of whatever size.",
                "stage",
                _numbered(cost.fixed for cost in stages),
            ),
            (
                "dvt_profile_image_seconds",
                "What each image of a batch is believed to add.",
                "stage",
                _numbered(cost.per_image for cost in stages),
            ),
            (
                "dvt_audit_agreement",
                "Share of images to which the last exit gives the class that was answered: estimate and bounds.",
                "bound",
                _bounds(audit.agreement if audit else None),
            ),
            (
                "dvt_audit_accuracy_gap",
                "What leaving early costs in accuracy: estimate and bounds.",
                "bound",
                _bounds(audit.accuracy_gap if audit else None),
            ),
            (
                "dvt_drift_z",
                "Share of images that leave here against calibration, in standard errors.",
                "exit",
                _numbered((drift and drift.z) or ()),
            ),
        ):
            yield _gauges(name, help_, label, values)
        for name, help_, value in (
            (
                "dvt_latency_kappa",
                "Half of p99 over p50 of a loaded server, as latency budgets have learned it.",
                now.get("kappa") if profile else None,
            ),
            (
                "dvt_arrival_rate",
                "Images that are asked for in a second, refused or not; not of low priority.",
                now.get("arrival_rate"),
            ),
            ("dvt_executors", "Batches that run at once.", now.get("executors")),
            (
                "dvt_budget_held_gmacs",
                "Mean cost that is held by moving thresholds, in billions of multiply-accumulates.",
                now.get("held_gmacs"),
            ),
            ("dvt_slots_in_use", "Images whose reuse state is kept between stages.", now.get("slots_in_use")),
            ("dvt_connections", "Connections open.", at.connections if at else None),
            ("dvt_requests_in_flight", "Requests taken in and not yet answered.", at.requests if at else None),
            ("dvt_held_bytes", "Bytes of request bodies in memory.", at.held_bytes if at else None),
            ("dvt_frontends", "Front-end processes at work; 0 where there is but one process.", now.get("front_ends")),
            (
                "dvt_audits_pending",
                "Images of answered requests that wait to be audited.",
                audit.pending if audit else None,
            ),
            (
                "dvt_audit_ratio",
                "Audited, of the requests that were chosen under this budget.",
                audit.audited_ratio if audit else None,
            ),
            (
                "dvt_drift_psi",
                "Population stability index of confidence at exit 1 against the calibration images.",
                drift.psi if drift else None,
            ),
            (
                "dvt_drift_alarm",
                "1 while traffic differs from the calibration images.",
                drift.alarm if drift else None,
            ),
            ("dvt_ready", "1 when the server is warmed up and not draining.", now.get("ready")),
        ):
            yield _gauge(name, help_, value)


def _of_budget(budget: BudgetState | None) -> Iterator[Metric]:
    """What GET /budget says, in base units."""
    mix, observed, predicted = (budget.mix, budget.observed, budget.predicted) if budget else (None, None, None)
    fractions = observed.exit_fractions if observed else None
    expected = predicted.exit_fractions if predicted else None
    for name, help_, label, values in (
        (
            "dvt_threshold",
            "Confidence at which an image leaves, per exit; of a mixed budget, the cheaper ones.",
            "exit",
            _numbered(budget.thresholds if budget else ()),
        ),
        (
            "dvt_mix_threshold",
            "The dearer thresholds of a mixed budget, per exit.",
            "exit",
            _numbered(mix.thresholds if mix else ()),
        ),
        (
            "dvt_budget_target",
            "What the operator asked for; no series of the kinds that are not asked for.",
            "kind",
            _target(budget.target if budget else {}),
        ),
        (
            "dvt_budget_predicted_exit_ratio",
            "Share of the calibration images that leave here by the thresholds in force.",
            "exit",
            _numbered(expected or ()),
        ),
        (
            "dvt_budget_observed_exit_ratio",
            "Share of the last images under this budget that left here.",
            "exit",
            _numbered(fractions or ()),
        ),
    ):
        yield _gauges(name, help_, label, values)
    for name, help_, value in (
        ("dvt_mix_share", "Share of the requests that dvt_mix_threshold judges.", mix.share if mix else None),
        ("dvt_budget_version", "Version of the operating point in force.", budget.version if budget else None),
        (
            "dvt_budget_row",
            "Row of the frontier in force, from 0, or the next cheaper one.",
            budget.row if budget else None,
        ),
        (
            "dvt_pressure",
            "Share of the target's cost that an overload takes away.",
            budget.pressure if budget else None,
        ),
        (
            "dvt_budget_predicted_gmacs",
            "Mean cost of the calibration images by the thresholds in force, in billions of multiply-accumulates.",
            predicted.gmacs if predicted else None,
        ),
        (
            "dvt_budget_predicted_accuracy",
            "Accuracy on the calibration images by the thresholds in force.",
            predicted.accuracy if predicted else None,
        ),
        (
            "dvt_budget_observed_images",
            "Images that the observed values speak of: the last under this budget.",
            observed.images if observed else None,
        ),
        (
            "dvt_budget_observed_gmacs",
            "Mean cost of the last images under this budget, in billions of multiply-accumulates.",
            observed.gmacs if observed else None,
        ),
    ):
        yield _gauge(name, help_, value)
    # A summary, as only those have a label `quantile`; of the last images, so there is no sum to add up.
    latency = SummaryMetricFamily(
        "dvt_budget_observed_latency_seconds", "From body to answer, of the last images under this budget."
    )
    for quantile, ms in (("0.5", observed.latency_ms.p50), ("0.99", observed.latency_ms.p99)) if observed else ():
        if ms is not None:
            latency.add_sample(latency.name, {"quantile": quantile}, ms / 1000)
    yield latency


def _outline(frontier: Sequence[FrontierRow]) -> dict[int, FrontierRow]:
    """Its ends, and the rows nearest to equal steps of cost between them: enough to draw it, few enough to scrape."""
    first, last = frontier[0].gmacs, frontier[-1].gmacs
    costs = [first + (last - first) * step / OUTLINE_STEPS for step in range(OUTLINE_STEPS + 1)]
    rows = {min(range(len(frontier)), key=lambda row: abs(frontier[row].gmacs - cost)) for cost in costs}
    return {row: frontier[row] for row in sorted(rows)}


def _codes(kind: type[ServeError]) -> Iterator[str]:
    """Of all errors below this one."""
    for below in kind.__subclasses__():
        yield below.code
        yield from _codes(below)


def _of_fleet(fleet: FleetState | None) -> Iterator[Metric]:
    for name, help_, value in (
        ("dvt_policy_generation", "Version of what the budget's store holds.", fleet.generation if fleet else None),
        (
            "dvt_policy_applied",
            "Version of the fleet's budget that is in force, or will be after the replica's own.",
            fleet.applied if fleet else None,
        ),
        (
            "dvt_policy_sync_age_seconds",
            "Since the shared store of the budget was last heard of.",
            fleet.synced_s_ago if fleet else None,
        ),
    ):
        yield _gauge(name, help_, value)
    sources = {source: source == fleet.source for source in SOURCES} if fleet else {}
    yield _gauges("dvt_policy_source", "1 for where the budget in force comes from.", "source", sources)


def _gauge(name: str, help_: str, value: float | None) -> Metric:
    """Without a sample where nothing is known."""
    family = GaugeMetricFamily(name, help_)
    if value is not None:
        family.add_metric([], float(value))
    return family


def _gauges(name: str, help_: str, label: str, values: Mapping[Any, float]) -> Metric:
    """One sample for each value of the label."""
    family = GaugeMetricFamily(name, help_, labels=[label])
    for key, value in values.items():
        family.add_metric([str(key)], float(value))
    return family


def _numbered(values: Iterable[float]) -> dict[int, float]:
    """By stage or exit."""
    return dict(enumerate(values, start=1))


def _bounds(interval: Interval | None) -> dict[str, float]:
    return asdict(interval) if interval is not None and interval.mean is not None else {}


def _target(target: Mapping[str, Any]) -> dict[str, float]:
    """A target's numbers; those of thresholds are metrics of their own."""
    values = {kind: value for kind, value in target.items() if kind != "thresholds"}
    if "latency_ms" in values:
        values["latency_seconds"] = values.pop("latency_ms") / 1000
    return values
