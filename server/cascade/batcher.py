"""The asyncio edge of the scheduler: it reads the clock, runs the batches in threads, and owns the waiters' futures.

Nothing is decided here. Every call into the scheduler gives an `Outcome`, and `_carry_out` does what it says: states
freed, futures resolved, the observer told.

- Each executor is one thread that runs one batch at a time. A batch is formed as late, and as full, as it can be: when
  a thread is idle. With one exception: a batch that would hardly gain from more images, while nobody is in a hurry, is
  formed when a thread is expected to be idle within AHEAD_S. The way of a result to the loop and of the next batch to
  the thread takes milliseconds where the loop has much to do, and was 15 % of what two cores can do.
- Submissions are scheduled in one step at the end of the loop's iteration, so that images that arrive together share a
  batch. Nothing waits for more images on purpose.
- One timer stands for all deadlines.
- The loop-side code is watched: should it fail (a bug), every waiter is answered, `healthy` turns False and `died`
  resolves, so that the application can end the process. An engine that raises fails that batch only; one that says
  that it is lost ends the loop in the same way.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Concatenate, ParamSpec, Protocol, Required, TypedDict, Unpack

from server.cascade.scheduler import BACKGROUND, Batch, Load, Outcome, Priority, Request, Scheduler
from server.core import Answer, Engine, EngineLost, Observer, OperatingPoint, Pixels, StageOutput
from server.errors import Draining, EngineFailed, ServeError

log = logging.getLogger(__name__)

RETRY_ELSEWHERE_S = 1  # a server that stops does not come back: another one may answer at once

NICE = 5  # of the executor threads
AHEAD_S = 0.01  # nine in ten threads had their next batch within 5 ms, and what a batch takes is known as well as that

P = ParamSpec("P")


def step_back(niceness: int) -> None:
    """Let the event loop go before this thread where cores are short: it has little to do, and everybody waits for it.

    On Linux a thread has a niceness of its own, here on top of the process's; elsewhere all threads stay equal.
    (SCHED_BATCH, under which a thread pushes no other one off its core, was tried: goodput fell by 4 to 10 %.)
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + niceness))


def _watched(step: Callable[Concatenate[Batcher, P], None]) -> Callable[Concatenate[Batcher, P], None]:
    """Around all loop-side code: what it raises is a bug, and the state may not be sound. Nothing runs after it."""

    @functools.wraps(step)
    def watched(self: Batcher, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.healthy:
            try:
                step(self, *args, **kwargs)
            except Exception as error:
                self._die(error)

    return watched


class Terms(TypedDict, total=False):
    """What a request asks for, as `Scheduler.admit` explains it; `deadline`: absolute, on the batcher's clock."""

    deadline: Required[float]
    max_exit: int | None
    min_confidence: float | None
    priority: Priority
    place: float


class Waiter(Protocol):
    """Who is told how a request ends, once. A future is one; what it is told, it must take without calling back."""

    def done(self) -> bool:
        """Nobody wants to hear of it any more."""
        ...

    def set_result(self, answer: Answer, /) -> None: ...

    def set_exception(self, error: ServeError, /) -> None: ...


class Batcher:
    """Runs one scheduler on one engine. `start` it on the event loop that will call it, `close` it at the end.

    Owns the scheduler, the threads, the futures and the engine's end of life.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        observer: Observer,
        executors: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._observer = observer
        self._clock = clock
        self._threads = [
            threading.Thread(target=self._execute, name=f"executor-{number}", daemon=True)
            for number in range(1, executors + 1)
        ]
        self._handoff: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()  # bounded: a batch a thread at most
        self._out: dict[Batch, float] = {}  # in the engine, or about to be; the oldest first. When it is expected back
        self._waiters: dict[Request, Waiter] = {}
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_for = 0.0  # the deadline that the timer was set for
        self._step_is_due = False
        self._draining = False
        self._closed = False
        self.healthy = True  # False once the batch loop has died: nothing is answered any more

    async def start(self) -> None:
        """Warm the engine up and start the threads; then the first request is not slower than the next."""
        self._loop = asyncio.get_running_loop()
        self.died: asyncio.Future[BaseException] = self._loop.create_future()
        await asyncio.to_thread(self._engine.warm_up)
        for thread in self._threads:
            thread.start()

    @property
    def load(self) -> Load:
        return self._scheduler.load

    def is_full(self, priority: Priority) -> bool:
        """Whether not even one image of this priority would find a place."""
        return self._scheduler.is_full(priority)

    def deadlines(self, least: Priority) -> list[list[float]]:
        return self._scheduler.deadlines(least)

    @property
    def out(self) -> list[Batch]:
        """The batches that are in the engine, the oldest first."""
        return list(self._out)

    @property
    def oldest(self) -> float:
        """When the oldest batch in the engine began; inf where there is none."""
        return next((batch.started for batch in self._out), math.inf)

    async def submit(self, images: Sequence[Pixels], **terms: Unpack[Terms]) -> Answer:
        """Classify the images of one request, as `enter` says. Raises also what comes later: EngineFailed, too.

        Cancelling the awaiting task abandons the images.
        """
        future: asyncio.Future[Answer] = self._loop.create_future()
        request = self.enter(images, future, **terms)
        try:
            return await future
        except asyncio.CancelledError:
            self.withdraw(request)
            raise
        finally:
            # The traceback of an error holds this frame: with these names in it, error, request and pixels would form
            # a cycle and stay in memory until some garbage collection.
            del images, request, future

    def enter(self, images: Sequence[Pixels], waiter: Waiter, **terms: Unpack[Terms]) -> Request:
        """Take in the images of one request; `waiter` is told of its end.

        Raises Overloaded, DeadlineExceeded and Draining at the door; then nobody is told.
        """
        if self._draining or not self.healthy:
            raise Draining("the server is shutting down", retry_after_s=RETRY_ELSEWHERE_S)
        request, outcome = self._scheduler.admit(images, self._clock(), **terms)
        self._waiters[request] = waiter
        self._all_answered.clear()
        if outcome.settled:
            self._displace(outcome)
        self._step_soon()
        return request

    def withdraw(self, request: Request) -> None:
        """Its client has left: its images go. Nothing happens to one that has ended."""
        self._abandon(request)

    def retune(self, point: OperatingPoint) -> None:
        """Put a new operating point into force. Call it on the event loop. Raises ValueError for one that cannot be."""
        self._scheduler.check(point)  # that would be the sender's mistake; anything later is ours
        self._retune(point)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait until the accepted ones are answered; after the timeout, answer the rest.

        Those end as at a deadline: with the prediction they have, or with Draining where they have none.
        """
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._all_answered.wait(), timeout_s)
        self._answer_the_rest()

    async def close(self) -> None:
        """Answer what is left, stop the threads, free what is held, close the engine. May be called twice."""
        if self._closed:
            return
        self._closed = self._draining = True
        self._answer_the_rest()
        for _ in self._threads:
            self._handoff.put(None)
        # When the last thread has ended, the batches that were running have come back and their states are freed.
        await asyncio.to_thread(self._join)
        if self._timer is not None:
            self._timer.cancel()
        self._engine.close()

    # -- in the executor threads

    def _execute(self) -> None:
        step_back(NICE)
        while (batch := self._handoff.get()) is not None:
            result: StageOutput | BaseException
            batch.started = self._clock()
            try:
                result = self._engine.run(batch.run)
            except BaseException as error:  # whatever it was, the loop must hear of it, or the images wait forever
                result = error
            self._loop.call_soon_threadsafe(self._came_back, batch, result, self._clock())
            del batch, result  # an idle thread must not keep a batch alive

    def _join(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:  # started
                thread.join()

    # -- on the loop

    @_watched
    def _came_back(self, batch: Batch, result: StageOutput | BaseException, ended: float) -> None:
        del self._out[batch]
        if isinstance(result, BaseException):
            log.error("the engine failed on a batch of stage %d", batch.run.stage, exc_info=result)
            self._carry_out(self._scheduler.fail(batch, ended))
            if isinstance(result, EngineLost):
                self._die(result)
                return
        else:
            outcome = self._scheduler.update(batch, result, ended)
            self._carry_out(outcome)
            self._loop.call_soon(self._observe_batch, batch, ended - batch.started, outcome.ignored)
        self._step()

    def _step_soon(self) -> None:
        if not self._step_is_due:
            self._step_is_due = True
            self._loop.call_soon(self._step)

    @_watched
    def _step(self) -> None:
        """Expire, hand out what can run, set the timer."""
        self._step_is_due = False
        now = self._clock()
        self._carry_out(self._scheduler.expire(now, self._idle))
        while (batch := self._next_batch(now)) is not None:
            self._handoff.put(batch)
            self._carry_out(self._scheduler.expire(now, self._idle))  # what waits would run in other batches now
        self._set_timer(now)

    def _next_batch(self, now: float) -> Batch | None:
        """One that can be handed out. Which thread it will be for does not matter: the first that is idle takes it."""
        begins = self._next_idle(now)
        if begins > now + AHEAD_S:
            return None
        batch = self._scheduler.schedule(now, None if self._idle > 0 else begins, self._idle)
        if batch is not None:
            self._out[batch] = begins + self._scheduler.seconds(batch)
        return batch

    @property
    def _idle(self) -> int:
        """Threads without a batch; below 0 where batches wait for a thread."""
        return len(self._threads) - len(self._out)

    def _next_idle(self, now: float) -> float:
        """When a thread that has no next batch is expected to be idle; inf where nobody knows, or all have theirs."""
        over = len(self._out) - len(self._threads)
        if over < 0:
            return now
        return max(now, sorted(self._out.values())[over]) if over < len(self._threads) else math.inf

    @_watched
    def _displace(self, outcome: Outcome) -> None:
        self._carry_out(outcome)

    @_watched
    def _abandon(self, request: Request) -> None:
        self._carry_out(self._scheduler.cancel(request, self._clock()))

    @_watched
    def _retune(self, point: OperatingPoint) -> None:
        self._carry_out(self._scheduler.retune(point, self._clock()))

    @_watched
    def _answer_the_rest(self) -> None:
        self._carry_out(self._scheduler.stop(self._clock()))

    def _set_timer(self, now: float) -> None:
        """One timer, at the next deadline, or when the next batch may be formed, or before both: where it comes early
        it only sets the next one.

        Most deadlines are met, and the next one is then later; to leave the timer saves a cancelled timer a request.
        """
        due = self._scheduler.next_deadline()
        if due is None:
            return
        ahead = self._next_idle(now) - AHEAD_S
        if ahead > now:
            due = min(due, ahead)
        if self._timer is not None:
            if self._timer_for <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, due - now), self._timer_rang)
        self._timer_for = due

    def _timer_rang(self) -> None:
        self._timer = None
        self._step()

    def _carry_out(self, outcome: Outcome) -> None:
        if outcome.freed:
            self._engine.free(outcome.freed)
        for request in outcome.settled:
            waiter = self._waiters.pop(request)
            if not waiter.done():  # done: cancelled in this very iteration
                if request.answer is not None:
                    waiter.set_result(request.answer)
                elif request.error is not None:
                    waiter.set_exception(request.error)
        if outcome.settled:
            # In the loop's queue behind the waiters that were just woken: no answer waits for the counting.
            self._loop.call_soon(self._observe_settled, outcome.settled)
        if not self._waiters:
            self._all_answered.set()

    @_watched
    def _observe_batch(self, batch: Batch, seconds: float, ignored: int) -> None:
        self._observer.batch_finished(batch.run.stage, len(batch.images), seconds, ignored, batch.waited_s)

    @_watched
    def _observe_settled(self, settled: Sequence[Request]) -> None:
        for request in settled:
            if request.priority == BACKGROUND:  # no client's: nobody was answered, nobody lost
                continue
            if request.answer is not None:
                for result in request.answer.results:
                    self._observer.image_finished(result)
            elif request.abandoned is not None:
                for _ in range(request.size):
                    self._observer.image_abandoned(request.abandoned)

    def _die(self, error: Exception) -> None:
        log.critical("the batch loop died", exc_info=error)
        self.healthy = False
        self.died.set_result(error)
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(EngineFailed("the server failed and is stopping"))
        self._waiters.clear()
        self._all_answered.set()
