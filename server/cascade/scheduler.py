"""What runs next, who leaves where, who is answered: the state machine of the cascade.

Decides only. No clock (`now` is an argument, monotonic seconds), no I/O, no asyncio, no threads: the caller runs the
batches that `schedule` gives, hands their outputs to `update`, and carries out the `Outcome` of every call. Not safe
to call from several threads.

Theory of operation
-------------------
One queue per stage. The unit that waits is an image; the unit that is admitted, judged by one operating point and
answered is a request. The loop is `expire -> schedule -> (engine runs) -> update`: sure images are decided, unsure
ones queue for the next stage, where survivors of different requests share a batch.

- *Policy.* Which stage runs next is a function of what waits (`Policy`). `deepest_first` is run to completion with
  compaction: stage s + 1 gets work only from stage s, so the deeper queues drain before new images start, the live
  state stays small and nothing starves. It never idles while anything can run, and never waits or shrinks a batch for
  the sake of its head. Several batches may be out at once.
- *Shares.* Where several executors are idle, and each has cores of its own, those that wait are shared among them
  (guided self-scheduling: Polychronopoulos and Kuck 1987), down to the fewest that are worth a batch: the images of
  one request are then not run by one core while the others look on. Under load one executor is idle at a time, at most.
- *Order.* Within a stage the higher priority goes first, and of equal ones the earlier deadline, which a survivor
  keeps. A batch takes what comes next whatever its priority, so batches stay full. Where the queue has no room, a
  newcomer takes the place of requests of lower priority that have not begun: the lowest and last go first.
  BACKGROUND has room of its own, never shares a batch, and waits until nothing else can run; while it waits it is
  given BACKGROUND_SHARE of the time of the others, an image at a time, so that it says something of busy hours, too.
- *Live state.* A survivor holds a slot of the engine while it waits for, or runs in, a later stage. A first-stage
  batch takes no more rows than there are free slots, since every row may survive; deeper batches need no new slot,
  so they always can run and free some: no deadlock.
- *One operating point per request.* Every request carries one point and all of its images are judged by that one; a
  mixed point has two sets of thresholds, and the request's place says which. A swap moves a live request to the new
  point only if the new point, had it been there from the start, would have led every image to where it is now
  (`_adopt`); a waiting image that passes the lowered threshold of its last exit then leaves at once, free. Otherwise
  the request finishes under the point it has.
- *Deadlines.* At the deadline an image that has a prediction is answered with it (`degraded`), also when it runs in
  a later stage just then. A request with an image that has none fails: a request succeeds or fails as a whole.
  Where the cost of batches is known (`seconds`) nobody waits for a deadline in vain. A newcomer that could not be
  answered even if only first stages ran from now on is refused at the door; what goes after it, by priority and
  deadline, does not count. A queued image is judged by the batch that it would run in now, not by one of its own:
  one that would miss its deadline there is answered with what it has, or its request is refused. To shrink the batch
  for it would save it and bring all behind it as near to their deadlines: under load every batch would be small, and
  most of the time go into the fixed cost of batches. What is believed of a stage may be wrong, and a stage that is
  given no batch could not show it: so what comes to one that has refused all for long enough runs, whatever is
  believed. Where it was right, that costs the others a hundredth of the time.
- *Rows nobody waits for.* A settled request never gets another batch. Its rows that are out are ignored when they
  come back, and their state is freed.

Conservation: images admitted = answered + degraded + failed + abandoned + in flight.

Costs are O(log n) per image and step. A swap looks at every live request once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Literal

from server.cascade.in_order import InOrder
from server.core import Answer, Floats, ImageResult, OperatingPoint, Pixels, Slot, StageBatch, StageOutput
from server.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServeError,
    TooManyImages,
)

Priority = Literal[0, 1, 2, 3]
HIGH: Priority = 0
NORMAL: Priority = 1
LOW: Priority = 2  # admitted only while the queue is less than half full
BACKGROUND: Priority = 3

BACKGROUND_SHARE = 0.01  # of the time that batches of others take, while BACKGROUND waits
DOUBT = 100  # times what a batch is believed to take: so long a stage refuses all, then one shows whether it is so slow

Seconds = Callable[[int, int], float]
"""(stage, images) -> seconds of such a batch."""


@dataclass(frozen=True, slots=True)
class StageView:
    """What a policy sees of one stage; BACKGROUND is not in it."""

    ready: int  # images that a batch could take now
    waiting: int  # images that wait here
    since: float  # when the head came here; inf where nothing waits
    deadline: float  # of the head; inf where nothing waits


Policy = Callable[[Sequence[StageView], float], int | None]
"""(every stage from the first, now) -> the stage to run, from 1; None to run nothing yet."""

Ripe = Callable[[int, int], bool]
"""(stage, images) -> whether such a batch has next to nothing to gain from more images."""


def deepest_first(views: Sequence[StageView], now: float) -> int | None:  # noqa: ARG001
    return max((stage for stage, view in enumerate(views, start=1) if view.ready), default=None)


def never_ripe(stage: int, images: int) -> bool:  # noqa: ARG001
    return False


@dataclass(slots=True, eq=False)
class Request:
    """Some images with one deadline and one operating point. Settled exactly once: `answer`, `error`, or neither
    where the client left."""

    deadline: float
    max_exit: int | None
    min_confidence: float | None
    place: float  # in [0, 1): which thresholds of a mixed point judge it
    point: OperatingPoint
    thresholds: tuple[float, ...]  # those of the point, as changed by max_exit and min_confidence
    size: int  # images
    undecided: int
    order: int  # of admission
    priority: Priority = NORMAL
    images: tuple[Image, ...] = ()  # until it is settled
    running: int = 0  # images that are in a batch now
    settled: bool = False
    answer: Answer | None = None
    error: ServeError | None = None
    abandoned: str | None = None  # why there is no answer, in the words of Observer.image_abandoned


@dataclass(slots=True, eq=False)
class Image:
    """One image on its way through the cascade. Belongs to the scheduler."""

    request: Request
    order: int  # of admission
    pixels: Pixels
    since: float  # when it came to where it is now: a queue or a batch
    stage: int = 1  # waits for, or runs in
    queued: bool = False  # waits
    slot: Slot | None = None  # its state, while it waits for a later stage; a batch in flight holds its own
    confidences: list[float] = field(default_factory=list)  # at the exits it has passed
    probabilities: Floats | None = None  # (K,), at the last exit it has passed
    queue_s: float = 0.0
    compute_s: float = 0.0
    result: ImageResult | None = None


@dataclass(slots=True, eq=False)
class Batch:
    """Images on their way through one stage: `run` is what the engine sees of them, row by row."""

    images: tuple[Image, ...]
    run: StageBatch
    started: float  # when it was formed; set anew by who runs it later than that
    waited_s: float  # for this stage, all images of clients added up


@dataclass(slots=True)
class Outcome:
    """What a step decided, for the caller to carry out."""

    settled: list[Request] = field(default_factory=list)
    freed: list[Slot] = field(default_factory=list)  # states that the engine is to free
    ignored: int = 0  # rows of the batch that nobody waited for any more


@dataclass(frozen=True, slots=True)
class Load:
    """Images waiting and running, per stage, and the slots taken: by live survivors and by those that may be."""

    waiting: tuple[int, ...]
    running: tuple[int, ...]
    slots: int
    max_slots: int


_Entry = tuple[Priority, float, int, Image]
"""Priority, deadline, order of admission, and the image."""


class _Queue:
    """The images that wait for one stage: by priority, and of each priority by deadline, then order of admission."""

    def __init__(self) -> None:
        self._of_clients: InOrder[_Entry] = InOrder()
        self._of_background: InOrder[_Entry] = InOrder()
        self.clients = self.background = 0  # images; kept, as they are asked for at every turn

    def __len__(self) -> int:
        return self.clients + self.background

    def deadlines(self, least: Priority) -> list[float]:
        """Of the images of this priority or a higher one, in no order."""
        entries = chain(self._of_clients, self._of_background)
        return [deadline for priority, deadline, _, _ in entries if priority <= least]

    def push(self, image: Image) -> None:
        image.queued = True
        if image.request.priority == BACKGROUND:
            self._of_background.add(_entry(image))
            self.background += 1
        else:
            self._of_clients.add(_entry(image))
            self.clients += 1

    def remove(self, image: Image) -> None:
        image.queued = False
        if image.request.priority == BACKGROUND:
            self._of_background.remove(_entry(image))
            self.background -= 1
        else:
            self._of_clients.remove(_entry(image))
            self.clients -= 1

    def before(self, priority: Priority, deadline: float) -> int:
        """Images that go before one of this priority and deadline that comes now."""
        place = (priority, deadline, math.inf)
        if priority == BACKGROUND:
            return self.clients + self._of_background.seek(place)[0]
        return self._of_clients.seek(place)[0]

    def take(self, size: int, *, background: bool) -> tuple[Image, ...]:
        """At most so many, in order; either BACKGROUND or the others."""
        if background:
            images = tuple([entry[3] for entry in self._of_background.take(size)])
            self.background -= len(images)
        else:
            images = tuple([entry[3] for entry in self._of_clients.take(size)])
            self.clients -= len(images)
        for image in images:
            image.queued = False
        return images

    def view(self, limit: int) -> StageView:
        head = self._of_clients.first
        if head is None:
            return StageView(0, 0, math.inf, math.inf)
        waiting = self.clients
        return StageView(min(waiting, limit), waiting, head[3].since, head[1])

    def heads(self) -> Iterator[tuple[int, Image]]:
        """The earliest deadline of each priority but BACKGROUND, and how many images go before it."""
        at, head = 0, self._of_clients.first
        while head is not None:
            yield at, head[3]
            at, head = self._of_clients.seek((head[0] + 1,))

    def clients_backwards(self) -> Iterator[Image]:
        """From the one that would be the last to run; not BACKGROUND."""
        return (entry[3] for entry in reversed(self._of_clients))


def _entry(image: Image) -> _Entry:
    request = image.request
    return request.priority, request.deadline, image.order, image


class Scheduler:
    """Owns all images between admission and answer. The module's docstring tells the rules.

    `max_queued_images` bounds the images that wait, all stages, when a request asks to be admitted (half of it those of
    LOW, which may then wait with others, and of BACKGROUND, which is counted by itself); `max_slots` those
    that hold state. `seconds` tells what a batch costs, None where nobody knows; `executors`, how many run at once.
    """

    def __init__(
        self,
        point: OperatingPoint,
        *,
        max_batch_sizes: Sequence[int],
        max_queued_images: int,
        max_slots: int,
        policy: Policy = deepest_first,
        seconds: Seconds | None = None,
        executors: int = 1,
    ) -> None:
        if min(*max_batch_sizes, max_queued_images, max_slots) < 1:
            raise ValueError("batch sizes, queue and slots must allow at least one image")
        self._max_batch_sizes = tuple(max_batch_sizes)
        self._max_queued_images = max_queued_images
        self._max_slots = max_slots
        self._policy = policy
        self._seconds = seconds
        self._ripe: Ripe = never_ripe
        self._shares = self._max_batch_sizes
        self._executors = executors
        self.check(point)
        self._point = point
        self._queues = tuple(_Queue() for _ in max_batch_sizes)
        self._running = [0] * len(max_batch_sizes)
        # All that are not settled, by deadline.
        self._requests: InOrder[tuple[float, int, Request]] = InOrder()
        self._orders = count()
        self._credit = 0.0  # seconds that BACKGROUND may take from others; below 0 what it owes them
        self._doubted = [math.inf] * len(max_batch_sizes)  # when a stage first refused, of those since its last batch
        self._last_s = math.inf  # what the last batch of others took: one image takes no longer

    def learn(
        self, seconds: Seconds, policy: Policy, ripe: Ripe = never_ripe, shares: Sequence[int] | None = None
    ) -> None:
        """What a batch costs is known from now on, a policy that goes by it, which batches may be formed early, and, by
        stage, the fewest images that are worth an executor that would else be idle."""
        self._seconds, self._policy, self._ripe = seconds, policy, ripe
        self._shares = self._max_batch_sizes if shares is None else tuple(shares)

    # -- what the caller may ask

    @property
    def load(self) -> Load:
        return Load(
            waiting=tuple(len(queue) for queue in self._queues),
            running=tuple(self._running),
            slots=self._slots(),
            max_slots=self._max_slots,
        )

    def is_full(self, priority: Priority) -> bool:
        """Whether not even one image of this priority would find a place."""
        return self._displaced(1, priority) is None

    def deadlines(self, least: Priority) -> list[list[float]]:
        """By stage, those of the images that wait with this priority or a higher one; in no order."""
        return [queue.deadlines(least) for queue in self._queues]

    def seconds(self, batch: Batch) -> float:
        """What the batch is believed to take; inf where nobody knows."""
        return math.inf if self._seconds is None else self._seconds(batch.run.stage, len(batch.images))

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to do."""
        first = self._requests.first
        return None if first is None else first[0]

    def check(self, point: OperatingPoint) -> None:
        """Raises ValueError for a point that does not fit this cascade."""
        for thresholds in (point.thresholds, *([point.mix.thresholds] if point.mix else [])):
            if len(thresholds) != len(self._max_batch_sizes) or thresholds[-1] != 0.0:
                raise ValueError(f"not one threshold per exit, the last 0.0: {thresholds}")

    # -- what can happen

    def admit(
        self,
        pixels: Sequence[Pixels],
        now: float,
        *,
        deadline: float,
        max_exit: int | None = None,
        min_confidence: float | None = None,
        priority: Priority = NORMAL,
        place: float = 0.0,
    ) -> tuple[Request, Outcome]:
        """Take a request in, whole.

        `max_exit` (from 1): no image goes deeper. `min_confidence` replaces every threshold but the last; such a
        request keeps the point it came under whatever is swapped. `place`: see `OperatingPoint.thresholds_for`.

        Raises Overloaded where the queue has no room for all of it or its deadline cannot be met, TooManyImages where
        there never will be room, DeadlineExceeded where not even an idle server could meet the deadline.
        """
        if not pixels:
            raise InvalidRequest("a request needs at least one image")
        if len(pixels) > self._max_queued_images:
            raise TooManyImages(f"at most {self._max_queued_images} images fit into the queue")
        displaced = self._displaced(len(pixels), priority)
        if displaced is None:
            raise Overloaded("the queue is full", retry_after_s=self._retry_after_s(now))
        if self._seconds is not None:
            self._refuse_hopeless(len(pixels), priority, deadline, now)
        outcome = Outcome()
        for request in displaced:
            error = Overloaded("gave way to a request of higher priority", retry_after_s=self._retry_after_s(now))
            self._fail(request, error, "overloaded", now, outcome)
        thresholds = _thresholds(self._point, place, max_exit, min_confidence)
        size, order = len(pixels), next(self._orders)
        request = Request(
            deadline,
            max_exit,
            min_confidence,
            place,
            self._point,
            thresholds,
            size,
            undecided=size,
            order=order,
            priority=priority,
        )
        request.images = tuple([Image(request, next(self._orders), one, since=now) for one in pixels])
        for image in request.images:
            self._queues[0].push(image)
        self._requests.add((deadline, order, request))
        return request, outcome

    def schedule(self, now: float, begins: float | None = None, idle: int = 1) -> Batch | None:
        """The batch to run next, or None where nothing can run. `begins`: all executors are busy until then. So it can
        wait, and is formed only where more images would not make it better, and nobody is in a hurry: who is late is
        told most exactly at the last moment. `idle`: the executors that have nothing to do, this one included."""
        limits = self._limits(idle)
        views = [queue.view(limit) for queue, limit in zip(self._queues, limits, strict=True)]
        # Also where new images wait for slots that only background work can free.
        idle = not any(view.ready for view in views)
        due = self._credit > self._last_s
        stage = self._background_stage(limits) if (idle or due) and begins is None else None
        if stage is not None:
            images = self._queues[stage - 1].take(limits[stage - 1] if idle else 1, background=True)
        elif (stage := self._policy(views, now)) is not None and (
            begins is None or self._may_be_early(stage, views[stage - 1].ready, limits, begins)
        ):
            images = self._queues[stage - 1].take(limits[stage - 1], background=False)
        else:
            return None
        run = StageBatch(
            stage=stage,
            pixels=[image.pixels for image in images],
            slots=[image.slot for image in images if image.slot is not None],  # none has one at stage 1, all later
            thresholds=[image.request.thresholds[stage - 1] for image in images],
        )
        waited_s = 0.0
        for image in images:
            image.slot = None
            if image.request.priority != BACKGROUND:
                waited_s += now - image.since
            image.queue_s += now - image.since
            image.since = now
            image.request.running += 1
        self._running[stage - 1] += len(images)
        self._doubted[stage - 1] = math.inf
        return Batch(images, run, started=now, waited_s=waited_s)

    def update(self, batch: Batch, output: StageOutput, now: float) -> Outcome:
        """Take in what a batch said: images leave or go on to the next stage."""
        outcome = self._take_back(batch, now)
        touched: dict[Request, list[Image]] = {}
        rows = zip(batch.images, output.confidence.tolist(), output.probabilities, output.slots, strict=True)
        for image, confidence, probabilities, slot in rows:
            if image.request.settled:
                if slot is not None:
                    outcome.freed.append(slot)
                continue
            image.slot = slot
            if not math.isfinite(confidence):
                error = EngineFailed(f"the engine gave no number for an image at stage {batch.run.stage}")
                self._fail(image.request, error, "engine_failed", now, outcome)
                continue
            image.confidences.append(confidence)
            image.probabilities = probabilities
            image.compute_s += now - image.since
            image.since = now
            touched.setdefault(image.request, []).append(image)
        for request, images in touched.items():
            if request.settled:
                continue
            self._adopt(request, now, outcome)
            for image in images:
                # Without state it cannot go on. With state it still leaves if a lower threshold was adopted since.
                if image.slot is None or _sure(image, request.thresholds):
                    self._decide(image, now, outcome)
                else:
                    image.stage += 1
                    self._queues[image.stage - 1].push(image)
            self._answer_if_complete(request, now, outcome)
        return outcome

    def fail(self, batch: Batch, now: float) -> Outcome:
        """The engine raised on this batch: its requests fail, nothing else does."""
        outcome = self._take_back(batch, now)
        outcome.freed.extend(batch.run.slots)
        for image in batch.images:
            error = EngineFailed(f"the engine failed on this batch at stage {batch.run.stage}")
            self._fail(image.request, error, "engine_failed", now, outcome)
        return outcome

    def expire(self, now: float, idle: int = 1) -> Outcome:
        """Settle every request whose deadline has come, and what could not meet it any more. `idle`: as for the batches
        that they would run in."""
        outcome = Outcome()
        while (first := self._requests.first) is not None and first[0] <= now:
            error = DeadlineExceeded("the deadline passed before every image had reached an exit")
            self._cut_short(first[2], error, "deadline", now, outcome)
        if self._seconds is not None:
            for stage, limit in enumerate(self._limits(idle), start=1):
                while late := self._late(stage, limit, now):
                    self._give_up(late, now, outcome)
        return outcome

    def stop(self, now: float) -> Outcome:
        """Settle every request now, as if its deadline had come, to end the process."""
        outcome = Outcome()
        for _, _, request in list(self._requests):
            self._cut_short(request, Draining("the server stopped before an answer"), "shutdown", now, outcome)
        return outcome

    def cancel(self, request: Request, now: float) -> Outcome:
        """The client has left. Nothing happens to a request that is settled already."""
        outcome = Outcome()
        self._fail(request, None, "disconnect", now, outcome)
        return outcome

    def retune(self, point: OperatingPoint, now: float) -> Outcome:
        """Set the operating point of the batches dispatched from now on, as far as requests can move to it."""
        self.check(point)
        self._point = point
        outcome = Outcome()
        for _, _, request in list(self._requests):
            self._adopt(request, now, outcome)
            self._answer_if_complete(request, now, outcome)
        return outcome

    # -- operating points

    def _adopt(self, request: Request, now: float, outcome: Outcome) -> None:
        """Move the request to the newest point if every image is where that point would have led it.

        An image in a batch has an outcome under way that the new thresholds did not shape, so the request is looked
        at again when it comes back. A request of which nothing has run always moves, so no batch starts an old point.
        """
        if request.point is self._point or request.min_confidence is not None:
            return
        if request.running or request.undecided < request.size:
            return
        thresholds = _thresholds(self._point, request.place, request.max_exit, None)
        if not all(_led_here(image, thresholds) for image in request.images):
            return
        request.point, request.thresholds = self._point, thresholds
        for image in request.images:
            if image.queued and _sure(image, thresholds):
                self._decide(image, now, outcome)

    # -- how images and requests end

    def _take_back(self, batch: Batch, now: float) -> Outcome:
        self._running[batch.run.stage - 1] -= len(batch.images)
        self._give_credit(batch, now - batch.started)
        for image in batch.images:
            image.request.running -= 1
        return Outcome(ignored=sum(image.request.settled for image in batch.images))

    def _decide(self, image: Image, now: float, outcome: Outcome, *, degraded: bool = False) -> None:
        self._release(image, now, outcome)
        assert image.probabilities is not None
        image.result = ImageResult(
            image.probabilities,
            exit=len(image.confidences),
            confidence=image.confidences[-1],
            degraded=degraded,
            queue_s=image.queue_s,
            compute_s=image.compute_s,
            confidences=tuple(image.confidences),
        )
        image.request.undecided -= 1

    def _release(self, image: Image, now: float, outcome: Outcome) -> None:
        """Take the image out of where it is. State that a batch in flight holds comes back with the batch."""
        spent = now - image.since
        if image.queued:
            self._queues[image.stage - 1].remove(image)
            image.queue_s += spent
        else:
            image.compute_s += spent
        if image.slot is not None:
            outcome.freed.append(image.slot)
            image.slot = None

    def _answer_if_complete(self, request: Request, now: float, outcome: Outcome) -> None:
        if request.undecided == 0:
            results = tuple([image.result for image in request.images if image.result is not None])
            # What a timer that rang late has cost belongs to the answer's way, not to the request's time.
            request.answer = Answer(request.point, results, min(now, request.deadline))
            self._settle(request, outcome)

    def _give_up(self, image: Image, now: float, outcome: Outcome) -> None:
        """A queued image cannot go further in time."""
        if image.request.settled:  # along with another image of its request
            return
        if image.confidences:
            self._decide(image, now, outcome, degraded=True)
            self._answer_if_complete(image.request, now, outcome)
        else:
            error = Overloaded("the deadline cannot be met any more", retry_after_s=self._retry_after_s(now))
            self._fail(image.request, error, "overloaded", now, outcome)

    def _cut_short(self, request: Request, error: ServeError, reason: str, now: float, outcome: Outcome) -> None:
        """Answer with what is known so far; fail where that is not something for every image."""
        if not all(image.confidences for image in request.images):
            self._fail(request, error, reason, now, outcome)
            return
        for image in request.images:
            if image.result is None:
                self._decide(image, now, outcome, degraded=True)
        self._answer_if_complete(request, now, outcome)

    def _fail(self, request: Request, error: ServeError | None, reason: str, now: float, outcome: Outcome) -> None:
        if request.settled:
            return
        for image in request.images:
            if image.result is None:
                self._release(image, now, outcome)
        request.error, request.abandoned = error, reason
        self._settle(request, outcome)

    def _settle(self, request: Request, outcome: Outcome) -> None:
        request.settled = True
        request.images = ()  # a cycle would keep the pixels until some garbage collection
        self._requests.remove((request.deadline, request.order, request))
        outcome.settled.append(request)

    # -- background work

    def _background_stage(self, limits: Sequence[int]) -> int | None:
        """The deepest stage where BACKGROUND could run."""
        able = [stage for stage, queue in enumerate(self._queues, start=1) if limits[stage - 1] and queue.background]
        return max(able, default=None)

    def _give_credit(self, batch: Batch, seconds: float) -> None:
        """BACKGROUND pays for the time in which others waited for it. It saves nothing up while it has no work."""
        if batch.images[0].request.priority == BACKGROUND:
            if any(queue.clients for queue in self._queues):
                # Clients that come while it runs on an idle device make it debts, too. They do not add up: a day of
                # them would keep it out of the next busy hour.
                self._credit = max(self._credit - seconds, -seconds)
            return
        self._last_s = seconds
        if any(queue.background for queue in self._queues):
            self._credit += BACKGROUND_SHARE * seconds
        else:
            self._credit = min(0.0, self._credit)

    # -- bounds

    def _limits(self, idle: int) -> list[int]:
        """Images that a batch of each stage may take now."""
        limits = list(self._max_batch_sizes)
        if idle > 1:
            for at, (queue, least) in enumerate(zip(self._queues, self._shares, strict=True)):
                limits[at] = min(limits[at], max(least, math.ceil(len(queue) / idle)))
        limits[0] = min(limits[0], self._max_slots - self._slots())
        return limits

    def _slots(self) -> int:
        """Slots taken: a survivor that waits has one, a row that runs has one or may come back with one."""
        return sum(map(len, self._queues[1:])) + sum(self._running)

    def _late(self, stage: int, limit: int, now: float) -> Image | None:
        """An image that would miss its deadline in the batch that it would run in, now."""
        assert self._seconds is not None
        queue = self._queues[stage - 1]
        if not queue.clients:
            return None
        size = max(1, min(limit, queue.clients))
        within, alone = now + self._seconds(stage, size), now + self._seconds(stage, 1)
        for at, image in queue.heads():
            if image.request.deadline < (until := within if at < size else alone):
                return image if self._is_believed(stage, until - now, now) else None
        return None

    def _may_be_early(self, stage: int, size: int, limits: Sequence[int], begins: float) -> bool:
        """Whether such a batch would gain nothing from more images, and leaves all others time for one of theirs."""
        if not self._ripe(stage, size):
            return False
        assert self._seconds is not None
        done = begins + self._seconds(stage, size)
        for own, (queue, limit) in enumerate(zip(self._queues, limits, strict=True), start=1):
            if queue.clients:
                until = done + self._seconds(own, max(1, min(limit, queue.clients)))
                if any(image.request.deadline < until for _, image in queue.heads()):
                    return False
        return True

    def _is_believed(self, stage: int, seconds: float, now: float) -> bool:
        """Whether to refuse somebody because a batch of this stage is believed to take so many seconds."""
        self._doubted[stage - 1] = min(self._doubted[stage - 1], now)
        return now - self._doubted[stage - 1] < DOUBT * seconds

    def _displaced(self, size: int, priority: Priority) -> list[Request] | None:
        """The requests that have to go for so many images of this priority: of lower priority, the lowest and last
        first; none of which an image has run. None where even that would make no room."""
        background = priority == BACKGROUND
        waiting = sum([queue.background if background else queue.clients for queue in self._queues])
        room = self._max_queued_images if priority < LOW or not waiting else self._max_queued_images // 2
        excess = waiting + size - room
        if excess <= 0:  # as a rule
            return []
        looked_at: dict[Request, bool] = {}  # whether it goes
        for image in self._queues[0].clients_backwards():
            request = image.request
            if request.priority <= priority or excess <= 0:
                break
            if request not in looked_at:
                looked_at[request] = all(one.queued and one.stage == 1 for one in request.images)
                excess -= request.size * looked_at[request]
        return [request for request, goes in looked_at.items() if goes] if excess <= 0 else None

    def _refuse_hopeless(self, size: int, priority: Priority, deadline: float, now: float) -> None:
        """Raise where not all images could pass the first stage in time, even if nothing else ran.

        The bound is on the safe side, as whoever passes the first stage has a prediction to be answered with.
        """
        assert self._seconds is not None
        left = deadline - now
        alone = self._seconds(1, 1)
        if left < alone and (left <= 0 or self._is_believed(1, alone, now)):
            raise DeadlineExceeded(f"{max(left, 0) * 1000:.1f} ms are too few for one image on an idle server")
        largest = self._max_batch_sizes[0]
        if self._queues[0].clients + size <= largest * self._executors:  # as a rule
            return
        before = self._queues[0].before(priority, deadline) + size
        full = self._seconds(1, largest)
        needed = before * full / largest / self._executors
        if before > largest * self._executors and left < needed and self._is_believed(1, full, now):
            raise Overloaded("the deadline cannot be met", retry_after_s=max(1, math.ceil(needed - left)))

    def _retry_after_s(self, now: float) -> int:
        """As long as the oldest new image has waited: a newcomer at the end of a full queue waits about that.

        BACKGROUND is not asked: it may have waited for hours, and nobody waits behind it.
        """
        return max([1, *(math.ceil(now - image.since) for _, image in self._queues[0].heads())])


def _thresholds(
    point: OperatingPoint, place: float, max_exit: int | None, min_confidence: float | None
) -> tuple[float, ...]:
    thresholds = point.thresholds_for(place)
    if min_confidence is not None:
        thresholds = (min_confidence,) * (len(thresholds) - 1) + (0.0,)
    return thresholds if max_exit is None else (*thresholds[: max_exit - 1], 0.0)


def _sure(image: Image, thresholds: Sequence[float]) -> bool:
    """Whether the last exit that the image passed lets it out."""
    exits = len(image.confidences)
    return exits > 0 and not image.confidences[-1] < thresholds[exits - 1]


def _led_here(image: Image, thresholds: Sequence[float]) -> bool:
    """Whether these thresholds, from the start, would have brought the image where it is now."""
    below = (confidence < threshold for confidence, threshold in zip(image.confidences[:-1], thresholds, strict=False))
    # A row that came back without state has left: the last exit must let it out under these thresholds, too.
    can_go_on = image.slot is not None or not image.confidences
    return all(below) and (can_go_on or _sure(image, thresholds))
