"""Audits say what leaving early costs, at nobody's expense: over the real batcher and FakeEngine."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.budget.audit import MAX_PENDING, Auditor
from server.cascade.batcher import Batcher
from server.cascade.scheduler import Scheduler
from server.core import OperatingPoint, Pixels
from server.engines.fake import FakeEngine
from server.errors import Overloaded
from server.metrics import Metrics

POINT = OperatingPoint(1, (0.5, 0.5, 0.0))
SURE, UNSURE = 255, 10  # 10/255: less than the other nine classes have, so class 0 is named
IMAGES = {False: (SURE,), True: (UNSURE, UNSURE, SURE)}  # by whether they reach the last exit


class Audited:
    """A batcher whose answers are offered to an auditor, as the route does."""

    def __init__(self, fraction: float, clock: Callable[[], float], seed: int, **bounds: int) -> None:
        self.engine = FakeEngine()
        self.clock = clock
        self.metrics = Metrics(model="m", version="v", release="r", stage_gmacs=(1.0, 2.0, 3.0))
        values = {"max_queued_images": 512, "max_slots": 64, **bounds}
        scheduler = Scheduler(POINT, max_batch_sizes=self.engine.max_batch_sizes, **values)
        self.batcher = Batcher(self.engine, scheduler, self.metrics, 1, clock)
        self.auditor = Auditor(
            self.batcher, self.metrics, fraction=fraction, exits=3, version=1, lots=random.Random(seed)
        )

    def photo(self, *confidences: int, klass: int = 0) -> Pixels:
        return self.engine.image(*confidences, klass=klass)

    def ask(self, *images: Pixels, **options: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.batcher.submit(images, deadline=self.clock() + 60, **options))

    def offer(self, pixels: Sequence[Pixels], answer: Any) -> None:
        self.auditor.offer(pixels, answer)

    async def answer(self, *images: Pixels) -> None:
        """Answer a request and offer it."""
        self.offer(images, await self.ask(*images))

    async def settle(self) -> None:
        """Wait until the auditor has nothing to do, or can do nothing."""
        while self.auditor._task is not None:
            await asyncio.wait([self.auditor._task])

    async def next_run(self, stage: int | None = None) -> int:
        """The stage of the next batch that is run, or of the next one of this stage."""
        while True:
            assert await asyncio.to_thread(self.engine.began.acquire, timeout=30)
            if (found := self.engine.batches[-1].stage) == stage or stage is None:
                return found

    def count(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(name, labels)
        assert value is not None
        return value

    def dropped(self, reason: str) -> float:
        return self.count("dvt_audits_dropped_total", reason=reason)


@asynccontextmanager
async def auditing(
    fraction: float = 1.0, clock: Callable[[], float] = time.monotonic, seed: int = 0, **bounds: int
) -> AsyncIterator[Audited]:
    here = Audited(fraction, clock, seed, **bounds)
    await here.batcher.start()
    try:
        yield here
    finally:
        here.engine.open_gates()
        await here.auditor.close()
        await here.batcher.close()
        assert here.engine.slots_in_use == 0


def stages(engine: FakeEngine) -> list[tuple[int, int]]:
    """(stage, images) of every batch."""
    return [(batch.stage, len(batch.pixels)) for batch in engine.batches]


async def test_an_image_that_left_early_is_run_to_the_last_exit_behind_its_answer() -> None:
    async with auditing() as here:
        await here.answer(here.photo(SURE, SURE, SURE, klass=3))
        await here.settle()
        state = here.auditor.state()
        assert stages(here.engine) == [(1, 1), (1, 1), (2, 1), (3, 1)]
        assert (state.images, state.pending, state.confidence) == (1, 0, 0.95)
        assert (state.agreement.mean, state.accuracy_gap.mean) == (1, 0)


async def test_the_gap_is_what_the_last_exit_finds_its_own_class_more_probable() -> None:
    async with auditing() as here:
        await here.answer(here.photo(SURE, SURE, 10, klass=3))
        await here.settle()
        state = here.auditor.state()
        assert state.agreement.mean == 0
        assert state.accuracy_gap.mean == pytest.approx((1 - 10 / 255) / 9 - 10 / 255, abs=1e-6)
        assert here.count("dvt_audit_disagreements_total") == 1


async def test_an_image_that_reached_the_last_exit_by_itself_costs_nothing_more() -> None:
    async with auditing() as here:
        await here.answer(here.photo(UNSURE, UNSURE, SURE))
        await here.settle()
        state = here.auditor.state()
        assert stages(here.engine) == [(1, 1), (2, 1), (3, 1)]
        assert (state.images, state.agreement.mean, state.accuracy_gap.mean) == (1, 1, 0)


async def test_before_the_first_audit_nothing_is_said() -> None:
    async with auditing() as here:
        state = here.auditor.state()
        assert (state.images, state.agreement.mean, state.accuracy_gap.high) == (0, None, None)


async def test_audits_are_no_clients_images() -> None:
    async with auditing() as here:
        await here.answer(here.photo(SURE))
        await here.settle()
        assert here.count("dvt_images_total", exit="1", degraded="false") == 1
        assert here.count("dvt_images_total", exit="3", degraded="false") == 0
        assert here.count("dvt_image_macs_total") == 1e9
        assert here.count("dvt_audited_images_total") == 1


async def test_a_request_goes_before_every_audit() -> None:
    async with auditing() as here:
        early = await here.ask(here.photo(SURE))
        here.engine.gates[2].clear()
        running = here.ask(here.photo(UNSURE, SURE))
        await here.next_run(2)
        here.offer([here.photo(SURE)], early)
        await asyncio.sleep(0)
        assert here.batcher.load.waiting[0] == 1
        asked = [here.ask(here.photo(SURE)) for _ in range(3)]
        await asyncio.sleep(0)
        here.engine.open_gates()
        await asyncio.gather(running, *asked)
        await here.settle()
        assert stages(here.engine) == [(1, 1), (1, 1), (2, 1), (1, 3), (1, 1), (2, 1), (3, 1)]
        assert here.auditor.state().images == 1


async def test_a_full_queue_keeps_no_audit_out() -> None:
    async with auditing(max_queued_images=2) as here:
        early = await here.ask(here.photo(SURE, klass=3))
        here.engine.gates[1].clear()
        running = here.ask(here.photo(SURE))
        assert [await here.next_run() for _ in range(2)] == [1, 1]
        waiting = [here.ask(here.photo(SURE)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await here.ask(here.photo(SURE))
        here.offer([here.photo(SURE, klass=3)], early)
        await asyncio.sleep(0)
        assert here.batcher.load.waiting[0] == 3
        here.engine.open_gates()
        await asyncio.gather(running, *waiting)
        await here.settle()
        assert (here.auditor.state().images, here.auditor.state().pending) == (1, 0)


async def test_an_audit_that_waits_does_not_tell_refused_clients_to_wait_as_long() -> None:
    now = [0.0]
    async with auditing(clock=lambda: now[0], max_queued_images=2) as here:
        here.engine.gates[1].clear()
        running = here.ask(here.photo(SURE))
        await here.next_run()
        here.offer([here.photo(SURE)], await answer_elsewhere())
        await asyncio.sleep(0)
        assert here.batcher.load.waiting[0] == 1
        now[0] = 50.0
        waiting = [here.ask(here.photo(SURE)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await here.ask(here.photo(SURE))
        assert refused.value.extra["retry_after_s"] == 1
        here.engine.open_gates()
        await asyncio.gather(running, *waiting)


async def answer_elsewhere() -> Any:
    """An answer from another batcher: the one at hand is held."""
    async with auditing(0) as other:
        return await other.ask(other.photo(SURE))


async def test_what_is_pending_is_bounded_and_what_is_over_has_others_to_stand_for_it() -> None:
    async with auditing(seed=3) as here:
        answers = [await here.ask(here.photo(*IMAGES[deep], klass=3)) for deep in (False, True)]
        here.engine.gates[1].clear()
        pixels = [here.photo(SURE, SURE, 10, klass=3)]  # the last exit gives another class
        here.offer(pixels, answers[0])
        await here.next_run(1)
        for _ in range(2 * MAX_PENDING):
            for answer in answers:
                here.offer(pixels, answer)
        assert here.auditor.state().pending == MAX_PENDING + 1, "and the one that runs"
        assert here.dropped("full") == 3 * MAX_PENDING
        here.engine.open_gates()
        await here.settle()
        state = here.auditor.state()
        assert (state.chosen, state.images, state.pending) == (4 * MAX_PENDING + 1, MAX_PENDING + 1, 0)
        assert state.audited_ratio == pytest.approx(0.25, abs=0.001)
        assert here.count("dvt_audit_represented_total") == state.represented == state.chosen
        assert state.agreement.mean == pytest.approx(0.5, abs=0.1)


async def test_a_request_of_many_images_takes_no_more_of_the_sample_than_any_other() -> None:
    async with auditing() as here:
        await here.answer(*[here.photo(SURE)] * 64)
        await here.settle()
        state = here.auditor.state()
        assert (state.chosen, state.images) == (1, 1)
        assert stages(here.engine)[-3:] == [(1, 1), (2, 1), (3, 1)]


async def test_requests_are_counted_in_their_order_also_those_with_nothing_to_run() -> None:
    async with auditing() as here:
        answers = {deep: await here.ask(here.photo(*image)) for deep, image in IMAGES.items()}
        here.engine.gates[3].clear()
        here.offer([here.photo(SURE)], answers[False])
        here.offer([here.photo(*IMAGES[True])], answers[True])
        await asyncio.sleep(0)
        assert (here.auditor.state().images, here.auditor.state().pending) == (0, 2)
        here.engine.open_gates()
        await here.settle()
        assert here.auditor.state().images == 2


async def test_a_new_budget_starts_anew_and_what_the_old_one_left_counts_for_all_since_the_start() -> None:
    async with auditing() as here:
        await here.answer(here.photo(SURE))
        await here.settle()
        early = await here.ask(here.photo(SURE))
        here.engine.gates[2].clear()
        here.offer([here.photo(SURE)], early)
        await here.next_run(2)
        here.auditor.retune(OperatingPoint(1, (0.4, 0.4, 0.0)))
        assert here.auditor.state().images == 1, "the cost loop moves within one budget"
        here.auditor.retune(OperatingPoint(2, (0.4, 0.4, 0.0)))
        state = here.auditor.state()
        assert (state.chosen, state.images, state.pending) == (0, 0, 1)
        here.offer([here.photo(SURE)], early)  # judged by the old budget, answered after it
        here.engine.open_gates()
        await here.settle()
        state = here.auditor.state()
        assert (state.chosen, state.images, state.audited_ratio, state.agreement.mean) == (0, 0, None, None)
        assert (state.since_start.chosen, state.since_start.images) == (3, 3)


async def test_budgets_that_come_faster_than_audits_lose_none_of_them() -> None:
    async with auditing() as here:
        photos = [here.photo(SURE, SURE, 10, klass=3), here.photo(UNSURE, UNSURE, SURE, klass=3)]
        answers = [await here.ask(photo) for photo in photos]  # the last exit gives another class, the same
        here.engine.gates[2].clear()
        for version in range(2, 2 + MAX_PENDING // 2):
            point = OperatingPoint(version, POINT.thresholds)
            here.auditor.retune(point)
            for photo, answer in zip(photos, answers, strict=True):
                here.offer([photo], replace(answer, point=point))
        here.engine.open_gates()
        await here.settle()
        state = here.auditor.state()
        assert (state.chosen, state.images) == (2, 2), "of the last"
        assert (state.since_start.chosen, state.since_start.images) == (MAX_PENDING, MAX_PENDING)
        assert state.since_start.agreement.mean == 0.5
        assert here.dropped("full") == here.dropped("engine_failed") == 0


async def test_an_engine_that_fails_costs_that_audit_and_no_other() -> None:
    async with auditing() as here:
        answers = [await here.ask(here.photo(SURE)) for _ in range(2)]
        here.engine.fail_next = 1
        for answer in answers:
            here.offer([here.photo(SURE)], answer)
        await here.settle()
        assert (here.auditor.state().images, here.auditor.state().pending) == (1, 0)
        assert here.dropped("engine_failed") == 1
        assert here.count("dvt_images_abandoned_total", reason="engine_failed") == 0


async def test_closing_waits_for_no_audit_and_loses_nobodys_image() -> None:
    async with auditing() as here:
        answer = await here.ask(*[here.photo(SURE)] * 5)
        here.engine.gates[2].clear()
        here.offer([here.photo(SURE)] * 5, answer)
        await here.next_run(2)
        await asyncio.wait_for(here.auditor.close(), 10)
        await asyncio.wait_for(here.batcher.drain(10), 5)
        assert here.auditor.state().pending == 0
        assert sum(here.count("dvt_images_abandoned_total", reason=r) for r in ("disconnect", "shutdown")) == 0
        here.offer([here.photo(SURE)] * 5, answer)
        assert here.auditor.state().pending == 0


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
async def test_the_fraction_of_requests_is_chosen_by_lot(fraction: float) -> None:
    async with auditing(fraction) as here:
        answer = await here.ask(here.photo(*IMAGES[True]))
        for _ in range(2000):
            here.offer([here.photo(*IMAGES[True])], answer)
        await here.settle()
        state = here.auditor.state()
        assert state.chosen / 2000 == pytest.approx(fraction, abs=0.04)
        assert here.count("dvt_audits_chosen_total") == state.chosen == state.images + here.dropped("full")


async def test_the_lots_of_a_process_are_its_own() -> None:
    """Else a client could work out which of its requests will be audited."""
    async with auditing(0.5) as here:
        answer = await here.ask(here.photo(*IMAGES[True]))
        chosen = []
        for _ in range(2):
            auditor = Auditor(here.batcher, here.metrics, fraction=0.5, exits=3, version=1)
            before = [auditor.state().chosen]
            for _ in range(64):
                auditor.offer([here.photo(*IMAGES[True])], answer)
                before.append(auditor.state().chosen)
            chosen.append(before)
            await auditor.close()
        assert chosen[0] != chosen[1]


async def test_the_images_of_a_request_are_looked_at_alike() -> None:
    async with auditing() as here:
        wrong, right = here.photo(SURE, SURE, 10, klass=3), here.photo(SURE, SURE, SURE, klass=3)
        images = [wrong, right, right, right]
        answer = await here.ask(*images)
        for _ in range(400):
            here.offer(images, answer)
            await here.settle()
        assert here.auditor.state().agreement.mean == pytest.approx(0.75, abs=0.08)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.sampled_from([(SURE, SURE, SURE), (UNSURE, SURE, SURE), (UNSURE, UNSURE, SURE), (SURE, SURE, 10)]),
        max_size=12,
    )
)
def test_every_image_of_every_chosen_request_is_audited_once(images: Sequence[tuple[int, ...]]) -> None:
    async def check() -> None:
        async with auditing() as here:
            await asyncio.gather(*[here.answer(here.photo(*image, klass=3)) for image in images])
            await here.settle()
            assert here.count("dvt_audited_images_total") == here.auditor.state().images == len(images)
            assert here.count("dvt_audit_disagreements_total") == sum(image == (SURE, SURE, 10) for image in images)

    asyncio.run(check())
