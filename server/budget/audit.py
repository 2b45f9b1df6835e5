"""What leaving early costs on live traffic, told without labels: some requests are completed behind their answer.

A request is chosen by a lot that is drawn behind its answer, from a source that no client knows: neither its id, nor
what is in it, nor how long it took plays a part. It was answered like any other. Of its images one, by lot again, is
looked at. Where it left early it goes through the whole cascade, and what the last exit says is held against the
answer: do the two name the same class, and how much less probable does the last exit find the class that was answered
than its own? Where the last exit is calibrated, the mean of that is the accuracy given up (`accuracy_gap`).

- *Cost.* An audit is a BACKGROUND request of one image with thresholds that nobody reaches. It pays for the stages
  before the image's exit once more; in return neither scheduler nor engine knows of audits, and no state is kept for
  them. One image runs at a time: so much of the queue, of the slots and of an executor's time is all that it ever takes
  from others.
- *Behind, but not left out.* Under load audits come in slower than requests are chosen. What waits for them holds
  pixels and has a bound; beyond it some stand for others (`Sample`), so that the estimate speaks of busy hours as of
  quiet ones. In the queue BACKGROUND has room of its own, and a small share of the device's time.
- *In order.* Requests are counted in the order of their answers, also those with nothing to run: else a loaded server
  would count late just those that left early, and look better than it is.
- *One observation per request*: images of one request resemble one another, and an interval that took them for
  independent would be too narrow. One image is expected to say what the mean over all would, and a request of many
  takes no more of the sample, and of the engine, than any other.
- *Whose answers.* Degraded ones count: they are what clients got. Steered requests do not: their clients moved the
  exits. Nor do requests whose client left before there was an answer. A new budget version is a new question, whose
  estimate starts from nothing; the one since the start goes on over all versions.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random, SystemRandom

import numpy as np

from server.budget.confidence_sequence import Interval
from server.budget.sample import CONFIDENCE, Estimate, Kept, Sample
from server.bundle.frontier import NEVER
from server.cascade.batcher import Batcher
from server.cascade.scheduler import BACKGROUND
from server.core import Answer, ImageResult, OperatingPoint, Pixels
from server.errors import Draining, EngineFailed
from server.metrics import Metrics

log = logging.getLogger(__name__)

MAX_PENDING = 256  # images; of 224x224 pixels these are 39 MB


@dataclass(frozen=True, slots=True)
class AuditState:
    """`audit` in the body of GET and PUT /budget; of the budget version in force, but for `since_start`."""

    images: int
    chosen: int
    represented: int
    audited_ratio: float | None
    pending: int  # images of chosen requests, of whatever version, that wait
    agreement: Interval
    accuracy_gap: Interval
    confidence: float  # of each interval
    since_start: Estimate


@dataclass(frozen=True, slots=True, eq=False)
class _Audit:
    """One image of one chosen request: the class that was answered, and the pixels if it left early."""

    answered: int
    pixels: Pixels | None


class Auditor:
    """Chooses requests behind their answer, and completes them. Lives on the event loop."""

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        *,
        fraction: float,
        exits: int,
        version: int,
        lots: Random | None = None,
    ) -> None:
        """`fraction` of the requests are audited; `version`: of the budget in force. `lots`: where chance comes from,
        by default the system; a generator with a seed can be seen through from what it chose."""
        self._batcher = batcher
        self._metrics = metrics
        self._fraction = fraction
        self._exits = exits
        self._lots = lots or SystemRandom()
        self._sample: Sample[_Audit] = Sample(MAX_PENDING, version, self._lots)
        self._skip = self._draw()  # requests that the lot passes by
        self._underway: Kept[_Audit] | None = None  # until it is counted
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def _draw(self) -> float:
        """How many requests are passed by until the next that is chosen, where each is by itself with the same chance:
        one lot for all of them, as the system takes its time to draw one."""
        if not 0 < self._fraction < 1:
            return math.inf if self._fraction <= 0 else 0
        return math.log(1 - self._lots.random()) // math.log1p(-self._fraction)

    def offer(self, pixels: Sequence[Pixels], answer: Answer) -> None:
        """Audit an answered request, if the lot falls on it."""
        if self._closed:
            return
        if self._skip > 0:
            self._skip -= 1
            return
        self._skip = self._draw()
        at = self._lots.randrange(len(pixels))
        result = answer.results[at]
        audit = _Audit(_class_of(result), pixels[at] if result.exit < self._exits else None)
        self._metrics.audit_chosen()
        self._metrics.audit_dropped("full", self._sample.add(audit, answer.point.version))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)

    def retune(self, point: OperatingPoint) -> None:
        """An operating point is in force; where it belongs to another budget, its estimate starts from nothing."""
        self._sample.retune(point.version)

    def state(self) -> AuditState:
        now = self._sample.of_version()
        return AuditState(
            images=now.images,
            chosen=now.chosen,
            represented=now.represented,
            audited_ratio=now.audited_ratio,
            pending=len(self._sample) + (self._underway is not None),
            agreement=now.agreement,
            accuracy_gap=now.accuracy_gap,
            confidence=CONFIDENCE,
            since_start=self._sample.since_start(),
        )

    async def close(self) -> None:
        """Forget what is pending, at once: nobody waits for it. May be called twice."""
        self._closed = True
        self._sample.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._underway = None

    def _next(self) -> Kept[_Audit] | None:
        if self._underway is None:
            self._underway = self._sample.take()
        return self._underway

    async def _run(self) -> None:
        while (kept := self._next()) is not None:
            try:
                agreement, gap = await self._complete(kept.item)
            except Draining:
                return
            except EngineFailed:
                self._metrics.audit_dropped("engine_failed")
            else:
                self._sample.count(kept, agreement, gap)
                self._metrics.audited(agreement, kept.stands_for)
            self._underway = None

    async def _complete(self, audit: _Audit) -> tuple[float, float]:
        """1 where the last exit gives the class that was answered, else 0; and the gap."""
        if audit.pixels is None:  # the last exit has spoken
            return 1.0, 0.0
        answer = await self._batcher.submit(
            [audit.pixels], deadline=math.inf, min_confidence=NEVER, priority=BACKGROUND
        )
        (last,) = answer.results
        said = _class_of(last)
        gap = float(last.probabilities[said]) - float(last.probabilities[audit.answered])
        return float(said == audit.answered), min(1.0, max(0.0, gap))  # probabilities are rounded

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._underway = None  # it may be what is wrong
            log.error("an audit failed; the next request that is chosen goes on", exc_info=error)


def _class_of(result: ImageResult) -> int:
    """The most probable class; of equal ones the first, as in answers."""
    return int(np.argmax(result.probabilities))
