"""What leaving early costs on live traffic, told without labels: some requests are completed behind their answer.

A request is chosen by a hash of its id, so no confidence plays a part in the choice, and replicas and retries agree on
it. It is answered like any other. Then those of its images that left early go through the whole cascade, and what the
last exit says is held against the answer: do the two name the same class, and how much less probable does the last exit
find the class that was answered than its own? Where the last exit is calibrated, the mean of that is the accuracy given
up (`accuracy_gap`).

- *Cost.* An audit is a BACKGROUND request of one image with thresholds that nobody reaches. It pays for the stages
  before the image's exit once more; in return neither scheduler nor engine knows of audits, and no state is kept for
  them. It runs when nothing else can, one image at a time: so much of the queue, of the slots and of an executor's time
  is all that it ever takes from others.
- *Postponed, not dropped.* Where the queue has no room, what is pending stays, until the next request that is chosen.
  Pending audits hold pixels and have a bound; what it refuses is counted. The bound looks at no exit, and pending
  requests are counted in their order, also those with nothing to run: otherwise a loaded server would drop, or count
  late, just those that left early, and look better than it is.
- *One observation per request*, the mean over its images: images of one request resemble one another, and an interval
  that took them for independent would be too narrow.
- *Whose answers.* Degraded ones count: they are what clients got. Steered requests do not: their clients moved the
  exits. A new budget version is a new question: it starts from nothing, and what is pending for the old one is
  dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from server.budget.confidence_sequence import ConfidenceSequence, Interval
from server.budget.places import place_of
from server.bundle.frontier import NEVER
from server.cascade.batcher import Batcher
from server.cascade.scheduler import BACKGROUND
from server.core import Answer, ImageResult, OperatingPoint, Pixels
from server.errors import Draining, EngineFailed, Overloaded
from server.metrics import Metrics

log = logging.getLogger(__name__)

CONFIDENCE = 0.95
MAX_PENDING_IMAGES = 256  # of 224x224 pixels these are 39 MB


@dataclass(frozen=True, slots=True)
class AuditState:
    """`audit` in the body of GET and PUT /budget; of the budget version in force."""

    images: int
    pending: int  # images of requests that are chosen and not yet counted
    agreement: Interval  # share of images to which the last exit gives the class that was answered
    accuracy_gap: Interval
    confidence: float  # of each of the two intervals


@dataclass(slots=True, eq=False)
class _Audit:
    """One chosen request."""

    size: int  # images
    early: deque[tuple[Pixels, int]]  # images that left early and have not come back: pixels, the class answered
    gap: float = 0.0  # sum over the images that are done; those that reached the last exit have none
    disagreements: int = 0


@dataclass(slots=True)
class _Statistics:
    images: int = 0
    agreement: ConfidenceSequence = field(default_factory=lambda: ConfidenceSequence(CONFIDENCE))
    gap: ConfidenceSequence = field(default_factory=lambda: ConfidenceSequence(CONFIDENCE))


class Auditor:
    """Owns the chosen requests after their answer, and the estimates. Lives on the event loop."""

    def __init__(self, batcher: Batcher, metrics: Metrics, *, fraction: float, exits: int, version: int) -> None:
        """`fraction` of the requests are audited; `version`: of the budget in force."""
        self._batcher = batcher
        self._metrics = metrics
        self._fraction = fraction
        self._exits = exits
        self._version = version
        self._statistics = _Statistics()
        self._pending: deque[_Audit] = deque()  # in order of the answers; the first is being completed
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def chooses(self, request_id: str) -> bool:
        return self._fraction > 0 and place_of(request_id, "audit") < self._fraction

    def offer(self, request_id: str, pixels: Sequence[Pixels], answer: Answer) -> None:
        """Audit an answered request, if its id says so."""
        if self._closed or not self.chooses(request_id):
            return
        size = len(pixels)
        if answer.point.version != self._version:  # it was under way when the budget changed
            self._metrics.audit_dropped("outdated", size)
        elif self._pending_images() + size > MAX_PENDING_IMAGES:
            self._metrics.audit_dropped("full", size)
        else:
            results = zip(pixels, answer.results, strict=True)
            early = deque((one, _class_of(result)) for one, result in results if result.exit < self._exits)
            self._pending.append(_Audit(size, early))
        if self._pending and self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)

    def retune(self, point: OperatingPoint) -> None:
        """An operating point is in force; where it belongs to another budget, all starts anew."""
        if point.version == self._version:
            return
        self._version = point.version
        self._statistics = _Statistics()
        if images := self._pending_images():
            self._metrics.audit_dropped("outdated", images)
        self._pending.clear()

    def state(self) -> AuditState:
        found = self._statistics
        return AuditState(
            found.images, self._pending_images(), found.agreement.interval(), found.gap.interval(), CONFIDENCE
        )

    async def close(self) -> None:
        """Forget what is pending, at once: nobody waits for it. May be called twice."""
        self._closed = True
        self._pending.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _pending_images(self) -> int:
        return sum(audit.size for audit in self._pending)

    async def _run(self) -> None:
        while self._pending:
            audit = self._pending[0]
            try:
                await self._complete(audit)
            except (Overloaded, Draining):
                return
            except EngineFailed:
                if self._is_first(audit):
                    self._metrics.audit_dropped("engine_failed", audit.size)
                    self._pending.popleft()
                continue
            if self._is_first(audit):
                self._pending.popleft()
                self._count(audit)

    async def _complete(self, audit: _Audit) -> None:
        """Run what left early to the last exit. May be called again after it raised."""
        while audit.early and self._is_first(audit):
            pixels, answered = audit.early[0]
            answer = await self._batcher.submit([pixels], deadline=math.inf, min_confidence=NEVER, priority=BACKGROUND)
            audit.early.popleft()
            (last,) = answer.results
            said = _class_of(last)
            audit.gap += float(last.probabilities[said]) - float(last.probabilities[answered])
            audit.disagreements += said != answered

    def _is_first(self, audit: _Audit) -> bool:
        """False once a new budget has swept it away."""
        return bool(self._pending) and self._pending[0] is audit

    def _count(self, audit: _Audit) -> None:
        self._statistics.images += audit.size
        self._statistics.agreement.observe(1 - audit.disagreements / audit.size)
        self._statistics.gap.observe(min(1.0, audit.gap / audit.size))  # probabilities are rounded, too
        self._metrics.audited(audit.size, audit.disagreements)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an audit failed; the next request that is chosen goes on", exc_info=error)


def _class_of(result: ImageResult) -> int:
    """The most probable class; of equal ones the first, as in answers."""
    return int(np.argmax(result.probabilities))
