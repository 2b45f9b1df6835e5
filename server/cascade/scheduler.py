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
- *Order.* Within a stage the higher priority goes first, and of equal ones the earlier deadline, which a survivor
  keeps. A batch takes what comes next whatever its priority, so batches stay full. BACKGROUND waits until nothing
  else can run, and never shares a batch: nobody pays for it.
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
  Where the cost of batches is known (`seconds`) nobody waits for a deadline in vain: a newcomer that could not be
  answered even if only first stages ran from now on is refused at the door; a queued image that would miss its
  deadline even in a batch of its own, now, is answered with what it has, or its request is refused.
- *Rows nobody waits for.* A settled request never gets another batch. Its rows that are out are ignored when they
  come back, and their state is freed.

Conservation: images admitted = answered + degraded + failed + abandoned + in flight.

Costs are O(log n) per image and step. A swap looks at every live request once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, Literal, TypeVar, get_args

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

T = TypeVar("T")

Priority = Literal[0, 1, 2, 3]
HIGH: Priority = 0
NORMAL: Priority = 1
LOW: Priority = 2  # admitted only while the queue is less than half full
BACKGROUND: Priority = 3

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


def deepest_first(views: Sequence[StageView], now: float) -> int | None:  # noqa: ARG001
    return max((stage for stage, view in enumerate(views, start=1) if view.ready), default=None)


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
    slot: Slot | None = None  # its state, while it waits for a later stage; a batch in flight holds its own
    confidences: list[float] = field(default_factory=list)  # at the exits it has passed
    probabilities: Floats | None = None  # (K,), at the last exit it has passed
    queue_s: float = 0.0
    compute_s: float = 0.0
    result: ImageResult | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Images on their way through one stage: `run` is what the engine sees of them, row by row."""

    images: tuple[Image, ...]
    run: StageBatch
    started: float


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


class _Ordered(Generic[T]):
    """Items by key, smallest first, equal keys in order of arrival.

    `discard` leaves a dead entry in the heap. Dead entries go when they surface, or together once they outnumber the
    living, so the heap stays within twice the living and a discard costs O(1) amortised.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, T]] = []
        self._live: dict[T, None] = {}
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[T]:
        return iter(self._live)

    def __contains__(self, item: T) -> bool:
        return item in self._live

    def push(self, key: Any, item: T) -> None:
        self._live[item] = None
        heapq.heappush(self._heap, (key, next(self._arrivals), item))

    def first(self) -> T | None:
        while self._heap and self._heap[0][2] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> T:
        item = self.first()
        if item is None:
            raise IndexError("nothing left")
        heapq.heappop(self._heap)
        del self._live[item]
        return item

    def discard(self, item: T) -> bool:
        """True where the item was there."""
        if item not in self._live:
            return False
        del self._live[item]
        if len(self._heap) > 2 * len(self._live) + 16:  # 16: not worth the trouble below
            self._heap = [entry for entry in self._heap if entry[2] in self._live]
            heapq.heapify(self._heap)
        return True


class _Queue:
    """The images that wait for one stage: by priority, and of each priority by deadline, then order of admission."""

    def __init__(self) -> None:
        self._by_priority: tuple[_Ordered[Image], ...] = tuple(_Ordered() for _ in get_args(Priority))
        self._images = 0  # kept, as it is asked for at every turn

    def __len__(self) -> int:
        return self._images

    def deadlines(self, least: Priority) -> list[float]:
        """Of the images of this priority or a higher one, in no order."""
        return [image.request.deadline for part in self._by_priority[: least + 1] for image in part]

    def __contains__(self, image: Image) -> bool:
        return image in self._by_priority[image.request.priority]

    def push(self, image: Image) -> None:
        self._by_priority[image.request.priority].push((image.request.deadline, image.order), image)
        self._images += 1

    def discard(self, image: Image) -> bool:
        """True where the image was there."""
        there = self._by_priority[image.request.priority].discard(image)
        self._images -= there
        return there

    def waiting(self, least: Priority) -> int:
        """Images of this priority or a higher one."""
        return sum(map(len, self._by_priority[: least + 1]))

    def take(self, size: int, *, background: bool) -> tuple[Image, ...]:
        """At most so many, in order; either BACKGROUND or the others."""
        chosen = self._by_priority[BACKGROUND:] if background else self._by_priority[:BACKGROUND]
        images: list[Image] = []
        for part in chosen:
            images.extend(part.pop() for _ in range(min(len(part), size - len(images))))
        self._images -= len(images)
        return tuple(images)

    def view(self, limit: int) -> StageView:
        waiting = self._images - len(self._by_priority[BACKGROUND])
        head = next((part.first() for part in self._by_priority[:BACKGROUND] if len(part)), None)
        if head is None:
            return StageView(0, 0, math.inf, math.inf)
        return StageView(min(waiting, limit), waiting, head.since, head.request.deadline)

    def heads(self) -> Iterator[Image]:
        """The earliest deadline of each priority."""
        for part in self._by_priority:
            if (image := part.first()) is not None:
                yield image


class Scheduler:
    """Owns all images between admission and answer. The module's docstring tells the rules.

    `max_queued_images` bounds the images that wait, all stages, when a request asks to be admitted; `max_slots` those
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
        self._executors = executors
        self.check(point)
        self._point = point
        self._queues = tuple(_Queue() for _ in max_batch_sizes)
        self._running = [0] * len(max_batch_sizes)
        self._requests: _Ordered[Request] = _Ordered()  # all that are not settled, by deadline
        self._orders = count()

    def learn(self, seconds: Seconds, policy: Policy) -> None:
        """What a batch costs is known from now on, and a policy that goes by it."""
        self._seconds, self._policy = seconds, policy

    # -- what the caller may ask

    @property
    def load(self) -> Load:
        return Load(
            waiting=tuple(len(queue) for queue in self._queues),
            running=tuple(self._running),
            slots=self._slots(),
            max_slots=self._max_slots,
        )

    def deadlines(self, least: Priority) -> list[list[float]]:
        """By stage, those of the images that wait with this priority or a higher one; in no order."""
        return [queue.deadlines(least) for queue in self._queues]

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to do."""
        request = self._requests.first()
        return None if request is None else request.deadline

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
    ) -> Request:
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
        waiting = sum(map(len, self._queues))
        room = self._max_queued_images if priority < LOW or not waiting else self._max_queued_images // 2
        if waiting + len(pixels) > room:
            raise Overloaded("the queue is full", retry_after_s=self._retry_after_s(now))
        if self._seconds is not None:
            self._refuse_hopeless(len(pixels), priority, deadline - now)
        thresholds = _thresholds(self._point, place, max_exit, min_confidence)
        size = len(pixels)
        request = Request(
            deadline, max_exit, min_confidence, place, self._point, thresholds, size, undecided=size, priority=priority
        )
        request.images = tuple(Image(request, next(self._orders), one, since=now) for one in pixels)
        for image in request.images:
            self._queues[0].push(image)
        self._requests.push(deadline, request)
        return request

    def schedule(self, now: float) -> Batch | None:
        """The batch to run next, or None where nothing can run."""
        limits = list(self._max_batch_sizes)
        limits[0] = min(limits[0], self._max_slots - self._slots())
        views = [queue.view(limit) for queue, limit in zip(self._queues, limits, strict=True)]
        # Also where new images wait for slots that only background work can free.
        background = not any(view.ready for view in views)
        if background:
            able = [n for n, queue in enumerate(self._queues, start=1) if len(queue) and limits[n - 1]]
            stage = max(able, default=None)
        else:
            stage = self._policy(views, now)
        if stage is None:
            return None
        images = self._queues[stage - 1].take(limits[stage - 1], background=background)
        run = StageBatch(
            stage=stage,
            pixels=[image.pixels for image in images],
            slots=[image.slot for image in images if image.slot is not None],  # none has one at stage 1, all later
            thresholds=[image.request.thresholds[stage - 1] for image in images],
        )
        for image in images:
            image.slot = None
            image.queue_s += now - image.since
            image.since = now
            image.request.running += 1
        self._running[stage - 1] += len(images)
        return Batch(images, run, started=now)

    def update(self, batch: Batch, output: StageOutput, now: float) -> Outcome:
        """Take in what a batch said: images leave or go on to the next stage."""
        outcome = self._take_back(batch)
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
        outcome = self._take_back(batch)
        outcome.freed.extend(batch.run.slots)
        for image in batch.images:
            error = EngineFailed(f"the engine failed on this batch at stage {batch.run.stage}")
            self._fail(image.request, error, "engine_failed", now, outcome)
        return outcome

    def expire(self, now: float) -> Outcome:
        """Settle every request whose deadline has come, and what could not meet it any more."""
        outcome = Outcome()
        while (request := self._requests.first()) is not None and request.deadline <= now:
            error = DeadlineExceeded("the deadline passed before every image had reached an exit")
            self._cut_short(request, error, "deadline", now, outcome)
        if self._seconds is not None:
            for stage, queue in enumerate(self._queues, start=1):
                least = now + self._seconds(stage, 1)
                while late := [image for image in queue.heads() if image.request.deadline < least]:
                    for image in late:
                        self._give_up(image, now, outcome)
        return outcome

    def stop(self, now: float) -> Outcome:
        """Settle every request now, as if its deadline had come, to end the process."""
        outcome = Outcome()
        for request in list(self._requests):
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
        for request in list(self._requests):
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
            if image in self._queues[image.stage - 1] and _sure(image, thresholds):
                self._decide(image, now, outcome)

    # -- how images and requests end

    def _take_back(self, batch: Batch) -> Outcome:
        self._running[batch.run.stage - 1] -= len(batch.images)
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
        if self._queues[image.stage - 1].discard(image):
            image.queue_s += spent
        else:
            image.compute_s += spent
        if image.slot is not None:
            outcome.freed.append(image.slot)
            image.slot = None

    def _answer_if_complete(self, request: Request, now: float, outcome: Outcome) -> None:
        if request.undecided == 0:
            results = tuple(image.result for image in request.images if image.result is not None)
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
        self._requests.discard(request)
        outcome.settled.append(request)

    # -- bounds

    def _slots(self) -> int:
        """Slots taken: a survivor that waits has one, a row that runs has one or may come back with one."""
        return sum(map(len, self._queues[1:])) + sum(self._running)

    def _refuse_hopeless(self, size: int, priority: Priority, left: float) -> None:
        """Raise where not all images could pass the first stage within `left` seconds, even if nothing else ran.

        The bound is on the safe side, as whoever passes the first stage has a prediction to be answered with.
        """
        assert self._seconds is not None
        if left < self._seconds(1, 1):
            raise DeadlineExceeded(f"{max(left, 0) * 1000:.1f} ms are too few for one image on an idle server")
        largest = self._max_batch_sizes[0]
        before = self._queues[0].waiting(priority) + size
        needed = before * self._seconds(1, largest) / largest / self._executors
        if before > largest * self._executors and left < needed:
            raise Overloaded("the deadline cannot be met", retry_after_s=max(1, math.ceil(needed - left)))

    def _retry_after_s(self, now: float) -> int:
        """As long as the oldest new image has waited: a newcomer at the end of a full queue waits about that.

        BACKGROUND is not asked: it may have waited for hours, and nobody waits behind it.
        """
        heads = (image for image in self._queues[0].heads() if image.request.priority != BACKGROUND)
        return max([1, *(math.ceil(now - image.since) for image in heads)])


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
