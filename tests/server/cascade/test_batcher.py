"""The batcher over FakeEngine: real threads and futures; gates hold runs, so nothing sleeps."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from server.cascade.batcher import AHEAD_S, Batcher
from server.cascade.scheduler import Scheduler, deepest_first
from server.core import Answer, EngineLost, ImageResult, OperatingPoint, StageBatch, StageOutput
from server.engines.fake import FakeEngine
from server.errors import DeadlineExceeded, Draining, EngineFailed, Overloaded

POINT = OperatingPoint(1, (0.8, 0.8, 0.0))
LOW, HIGH = 51, 230  # confidences of 0.2 and 0.9


class Tally:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int]] = []  # stage, size, abandoned
        self.seconds: list[float] = []
        self.waited_s = 0.0
        self.finished: list[ImageResult] = []
        self.abandoned: Counter[str] = Counter()

    def batch_finished(self, stage: int, size: int, seconds: float, abandoned: int, waited_s: float) -> None:
        assert seconds >= 0
        self.seconds.append(seconds)
        self.waited_s += waited_s
        self.batches.append((stage, size, abandoned))

    def image_finished(self, result: ImageResult) -> None:
        self.finished.append(result)

    def image_abandoned(self, reason: str) -> None:
        self.abandoned[reason] += 1


class Clock:
    """Stands still until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Server:
    def __init__(self, engine: FakeEngine, executors: int, clock: Callable[[], float], **bounds: int) -> None:
        self.engine, self.clock, self.tally = engine, clock, Tally()
        self.scheduler = Scheduler(
            POINT,
            max_batch_sizes=engine.max_batch_sizes,
            **{"max_queued_images": 2000, "max_slots": 64, **bounds},
        )
        self.batcher = Batcher(engine, self.scheduler, self.tally, executors, clock)

    def ask(self, *images: tuple[int, ...], timeout_s: float = 60.0, **options) -> asyncio.Task[Answer]:
        pixels = [self.engine.image(*confidences) for confidences in images]
        return asyncio.create_task(self.batcher.submit(pixels, deadline=self.clock() + timeout_s, **options))

    async def next_run(self) -> StageBatch:
        """Wait until one more run has begun."""
        assert await asyncio.to_thread(self.engine.began.acquire, timeout=30)
        return self.engine.batches[-1]


@asynccontextmanager
async def serving(
    executors: int = 1, engine: FakeEngine | None = None, clock: Callable[[], float] = time.monotonic, **bounds: int
) -> AsyncIterator[Server]:
    server = Server(engine or FakeEngine(), executors, clock, **bounds)
    await server.batcher.start()
    try:
        yield server
    finally:
        server.engine.open_gates()
        await server.batcher.close()


async def test_images_are_answered_in_order():
    async with serving() as server:
        answer = await server.ask((HIGH,), (LOW, HIGH), (LOW, LOW, LOW))
    assert [result.exit for result in answer.results] == [1, 2, 3]
    assert answer.point is POINT
    assert server.tally.finished == list(answer.results)
    assert all(result.compute_s > 0 and result.queue_s >= 0 for result in answer.results)


async def test_requests_of_one_loop_iteration_share_a_batch_and_so_do_their_survivors():
    async with serving() as server:
        await asyncio.gather(*[server.ask((LOW, HIGH)) for _ in range(4)])
    assert server.tally.batches == [(1, 4, 0), (2, 4, 0)]


async def test_every_executor_gets_a_batch():
    async with serving(executors=2, engine=FakeEngine(max_batch_sizes=(1, 1, 1))) as server:
        server.engine.gates[1].clear()
        answers = asyncio.gather(server.ask((HIGH,)), server.ask((HIGH,)), server.ask((HIGH,)))
        await server.next_run()
        await server.next_run()
        assert server.batcher.load.running == (2, 0, 0)
        assert server.batcher.load.waiting == (1, 0, 0)
        server.engine.open_gates()
        assert len(await answers) == 3


async def test_a_batch_that_gains_nothing_by_waiting_is_formed_before_a_thread_is_idle():
    async with serving(clock=Clock()) as server:
        asked = [await one_runs(server, 0.1, 2)]
        server.clock.now = 0.1 - 1.5 * AHEAD_S
        asked += [server.ask((HIGH,)), server.ask((HIGH,))]
        await turns()
        assert server.batcher.load.waiting == (2, 0, 0), "too early"
        server.clock.now = 0.1 - 0.5 * AHEAD_S
        asked.append(server.ask((HIGH,)))
        await turns()
        assert server.batcher.load.running == (4, 0, 0), "the next batch is there"
        asked += [server.ask((HIGH,)), server.ask((HIGH,))]
        await turns()
        assert server.batcher.load.waiting == (2, 0, 0), "one for each thread, no more"
        server.clock.now = 7.0
        server.engine.open_gates()
        await asyncio.gather(*asked)
    assert [size for _, size, _ in server.tally.batches] == [1, 3, 2]
    assert server.tally.seconds[1:] == [0.0, 0.0], "from when it ran, not from when it was formed"


async def test_a_batch_that_may_grow_waits_for_a_thread():
    async with serving(clock=Clock()) as server:
        asked = [await one_runs(server, 0.1, 2)]
        server.clock.now = 0.1
        asked.append(server.ask((HIGH,)))
        await turns()
        assert server.batcher.load.waiting == (1, 0, 0)
        server.engine.open_gates()
        await asyncio.gather(*asked)


async def test_where_somebody_is_in_a_hurry_no_batch_is_formed_before_a_thread_is_idle():
    async with serving(clock=Clock()) as server:
        asked = [await one_runs(server, 0.1, 1)]
        server.clock.now = 0.1 - 0.5 * AHEAD_S
        # It begins at 0.1 and takes 0.1, and who came behind it would take as long once more.
        asked.append(server.ask((HIGH,), timeout_s=0.1999))
        await turns()
        assert server.batcher.load.waiting == (1, 0, 0)
        asked[-1].cancel()
        asked.append(server.ask((HIGH,), timeout_s=0.21))
        await turns()
        assert server.batcher.load.running == (2, 0, 0)
        server.engine.open_gates()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_it_needs_no_news_to_be_formed_in_time():
    async with serving() as server:
        asked = [await one_runs(server, 3 * AHEAD_S, 1)]
        asked.append(server.ask((HIGH,)))
        async with asyncio.timeout(30):
            while server.batcher.load.running != (2, 0, 0):
                await asyncio.sleep(0.001)
        server.engine.open_gates()
        await asyncio.gather(*asked)


async def test_the_images_of_a_request_are_shared_among_idle_executors():
    async with serving(executors=3, engine=FakeEngine(max_batch_sizes=(16, 16, 16))) as server:
        server.scheduler.learn(lambda _, images: 0.001 * images, deepest_first, shares=(2, 2, 2))
        server.engine.gates[1].clear()
        asked = server.ask(*[(HIGH,)] * 9)
        for _ in range(3):
            await server.next_run()
        assert [len(batch.pixels) for batch in server.engine.batches] == [3, 3, 3]
        server.engine.open_gates()
        assert len((await asked).results) == 9


async def one_runs(server: Server, seconds: float, ripe_from: int) -> asyncio.Task[Answer]:
    """An image that the engine keeps; a batch is believed to take so long, and to pay from so many images on."""
    server.scheduler.learn(lambda *_: seconds, deepest_first, lambda _, images: images >= ripe_from)
    server.engine.gates[1].clear()
    task = server.ask((HIGH,))
    await server.next_run()
    return task


async def turns() -> None:
    """Of the event loop: submissions are scheduled at the end of one."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_full_queue_refuses():
    async with serving(max_queued_images=1) as server:
        server.engine.gates[1].clear()
        running = server.ask((HIGH,))
        await server.next_run()
        waiting = server.ask((HIGH,))
        with pytest.raises(Overloaded) as refused:
            await server.ask((HIGH,))
        assert refused.value.extra["retry_after_s"] >= 1
        server.engine.open_gates()
        await asyncio.gather(running, waiting)


async def test_an_image_that_runs_at_its_deadline_is_answered_with_its_earlier_prediction():
    async with serving(clock=Clock()) as server:
        server.engine.gates[2].clear()
        task = server.ask((LOW, HIGH), timeout_s=0.01)
        await server.next_run()
        assert (await server.next_run()).stage == 2
        server.clock.now = 1.0  # the timer rings in vain until then
        (result,) = (await task).results
        assert (result.exit, result.degraded) == (1, True)
        server.engine.open_gates()
    assert server.tally.batches[-1] == (2, 1, 1), "the row was ignored, and counted"
    assert server.scheduler.load.slots == 0


async def test_a_deadline_without_any_prediction_is_an_error():
    async with serving() as server:
        server.engine.gates[1].clear()
        with pytest.raises(DeadlineExceeded):
            await server.ask((HIGH,), timeout_s=0.005)
        assert server.tally.abandoned == {"deadline": 1}


async def test_an_earlier_deadline_sets_the_timer_anew():
    async with serving() as server:
        server.engine.gates[1].clear()
        patient = server.ask((HIGH,), timeout_s=60)
        with pytest.raises(DeadlineExceeded):
            await server.ask((HIGH,), timeout_s=0.005)
        server.engine.open_gates()
        await patient


async def test_an_engine_error_fails_that_batch_only(caplog):
    async with serving() as server:
        server.engine.gates[2].clear()
        hit = [server.ask((LOW, LOW)), server.ask((LOW, LOW))]
        await server.next_run()
        await server.next_run()
        server.engine.fail_next, spared = 1, server.ask((HIGH,))
        server.engine.open_gates()
        assert (await spared).results[0].exit == 1
        for error in await asyncio.gather(*hit, return_exceptions=True):
            assert isinstance(error, EngineFailed)
        assert server.engine.slots_in_use == 0
        assert server.batcher.healthy
        assert server.tally.abandoned == {"engine_failed": 2}
    assert "stage 2" in caplog.text


async def test_a_thousand_clients_that_leave_cost_nothing_more():
    async with serving(executors=2) as server:
        server.engine.gates[2].clear()
        tasks = [server.ask((LOW, LOW, LOW)) for _ in range(1000)]
        while (await server.next_run()).stage == 1:
            pass
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert server.tally.abandoned == {"disconnect": 1000}
        ran = sum(server.scheduler.load.running)
        assert sum(server.scheduler.load.waiting) == 0
        server.engine.open_gates()
        (answer,) = (await server.ask((HIGH,))).results
        assert answer.exit == 1
    assert 1 <= sum(abandoned for *_, abandoned in server.tally.batches) <= ran, "only what was running was in vain"
    assert server.scheduler.load.slots == 0


async def test_a_swap_under_way_lets_waiting_survivors_out():
    async with serving(engine=FakeEngine(max_batch_sizes=(2, 1, 1))) as server:
        server.engine.gates[2].clear()
        runs, waits = server.ask((128, HIGH)), server.ask((128, HIGH))
        await server.next_run()
        await server.next_run()
        server.batcher.retune(OperatingPoint(2, (0.4, 0.8, 0.0)))
        answer = await waits
        assert (answer.point.version, answer.results[0].exit) == (2, 1)
        server.engine.open_gates()
        answer = await runs
        assert (answer.point.version, answer.results[0].exit) == (1, 2), "it was past the exit that would let it out"


async def test_answers_under_swaps_name_the_point_that_judged_them():
    def expected(confidences: tuple[int, ...], point: OperatingPoint) -> int:
        values = [float(np.float32(unit / 255)) for unit in confidences]
        return next(e for e, (c, t) in enumerate(zip(values, point.thresholds, strict=True), 1) if c >= t)

    rng = np.random.default_rng(7)
    points = [OperatingPoint(version, (*rng.uniform(0.2, 0.9, 2), 0.0)) for version in range(100)]
    async with serving(executors=2) as server:
        server.batcher.retune(points[0])
        asked = []
        for point in points:
            images = [tuple(rng.integers(0, 256, 3).tolist()) for _ in range(rng.integers(1, 4))]
            asked.append((images, server.ask(*images)))
            await asyncio.sleep(0)
            server.batcher.retune(point)
        for images, task in asked:
            answer = await task
            point = points[answer.point.version]
            assert answer.point is point
            assert [result.exit for result in answer.results] == [expected(image, point) for image in images]


async def test_a_point_that_does_not_fit_is_refused_and_harms_nobody():
    async with serving() as server:
        with pytest.raises(ValueError, match="threshold"):
            server.batcher.retune(OperatingPoint(2, (0.5, 0.0)))
        assert server.batcher.healthy
        await server.ask((HIGH,))


async def test_draining_refuses_new_work_and_answers_what_was_accepted():
    async with serving() as server:
        server.engine.gates[1].clear()
        accepted = [server.ask((LOW, LOW, LOW)) for _ in range(20)]
        await server.next_run()
        drained = asyncio.create_task(server.batcher.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await server.ask((HIGH,))
        assert not drained.done()
        server.engine.open_gates()
        await drained
        assert [(await task).results[0].exit for task in accepted] == [3] * 20


async def test_a_drain_that_takes_too_long_answers_the_rest():
    async with serving(engine=FakeEngine(max_batch_sizes=(1, 1, 1))) as server:
        server.engine.gates[2].clear()
        known, unknown = server.ask((LOW, LOW)), server.ask((LOW,))
        await server.next_run()
        await server.next_run()
        await server.batcher.drain(0)
        assert (await known).results[0].degraded
        with pytest.raises(Draining):
            await unknown
        assert server.tally.abandoned == {"shutdown": 1}


async def test_draining_an_idle_server_returns_at_once():
    async with serving() as server:
        await server.batcher.drain(60)


async def test_closing_ends_threads_and_frees_what_was_held():
    async with serving(executors=2) as server:
        server.engine.gates[2].clear()
        task = server.ask((LOW, LOW))
        await server.next_run()
        await server.next_run()
        closing = asyncio.create_task(server.batcher.close())
        assert (await task).results[0].degraded
        server.engine.open_gates()
        await closing
        assert server.scheduler.load.slots == 0
        assert server.engine.closed
        assert not any(thread.is_alive() for thread in server.batcher._threads)
        with pytest.raises(Draining):
            await server.ask((HIGH,))


async def test_closing_what_was_never_started_closes_the_engine():
    server = Server(FakeEngine(), 1, time.monotonic)
    await server.batcher.close()
    assert server.engine.closed


class TooFewRows(FakeEngine):
    """Breaks the contract, so that taking its output in fails: stands for any bug of the batch loop."""

    def run(self, batch: StageBatch) -> StageOutput:
        output = super().run(batch)
        return StageOutput(output.probabilities[:-1], output.confidence[:-1], output.slots[:-1])


async def test_when_the_batch_loop_dies_every_waiter_is_answered(caplog):
    async with serving(engine=TooFewRows(max_batch_sizes=(1, 1, 1))) as server:
        for error in await asyncio.gather(*[server.ask((HIGH,)) for _ in range(5)], return_exceptions=True):
            assert isinstance(error, EngineFailed)
        assert not server.batcher.healthy
        assert isinstance(await server.batcher.died, ValueError)
        with pytest.raises(Draining):
            await server.ask((HIGH,))
        await server.batcher.drain(60)
    assert "died" in caplog.text


class Lost(FakeEngine):
    """Its device is lost with the first batch."""

    def run(self, batch: StageBatch) -> StageOutput:
        super().run(batch)
        raise EngineLost("the device is lost")


async def test_when_the_engine_is_lost_every_waiter_is_answered_and_nothing_runs_any_more(caplog):
    async with serving(engine=Lost(max_batch_sizes=(1, 1, 1))) as server:
        for error in await asyncio.gather(*[server.ask((HIGH,)) for _ in range(5)], return_exceptions=True):
            assert isinstance(error, EngineFailed)
        assert not server.batcher.healthy
        assert isinstance(await server.batcher.died, EngineLost)
        with pytest.raises(Draining):
            await server.ask((HIGH,))
        assert len(server.engine.batches) == 1
    assert "the device is lost" in caplog.text


@pytest.mark.parametrize("ending", ["answered", "deadline", "disconnect"])
async def test_the_pixels_of_a_request_do_not_outlive_it(ending):
    async with serving(clock=Clock()) as server:
        pixels = server.engine.image(HIGH)
        alive = weakref.ref(pixels)
        gc.disable()
        try:
            server.engine.gates[1].clear()
            task = asyncio.create_task(server.batcher.submit([pixels], deadline=0.01))
            del pixels
            await server.next_run()
            if ending == "deadline":
                server.clock.now = 1.0
                with pytest.raises(DeadlineExceeded):
                    await task
            elif ending == "disconnect":
                task.cancel()
                await asyncio.wait([task])
            server.engine.open_gates()
            await asyncio.wait([task])
            del task
            server.engine.batches.clear()
            await server.batcher.close()
            assert alive() is None
        finally:
            gc.enable()
