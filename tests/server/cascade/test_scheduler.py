"""The scheduler: by example, then by properties over random histories. FakeEngine runs its batches, in this thread."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.bundle.profile import LatencyProfile, LiveProfile
from server.cascade.scheduler import (
    BACKGROUND,
    BACKGROUND_SHARE,
    DOUBT,
    HIGH,
    LOW,
    NORMAL,
    Batch,
    Outcome,
    Request,
    Scheduler,
    deepest_first,
)
from server.core import Mix, OperatingPoint
from server.engines.fake import FakeEngine
from server.errors import DeadlineExceeded, Draining, EngineFailed, InvalidRequest, Overloaded, TooManyImages

POINT = OperatingPoint(1, (0.8, 0.8, 0.0))
UNSURE, SURE = 0.2, 0.9  # confidences below and above those thresholds


def units(*confidences: float) -> tuple[int, ...]:
    return tuple(round(255 * confidence) for confidence in confidences)


class Cascade:
    """A scheduler and an engine, driven by hand. `now` moves only where a test moves it."""

    def __init__(
        self,
        point: OperatingPoint = POINT,
        sizes=(4, 4, 4),
        max_queued_images: int = 64,
        max_slots: int = 64,
        **options,
    ):
        self.engine = FakeEngine(max_batch_sizes=sizes)
        self.scheduler = Scheduler(
            point, max_batch_sizes=sizes, max_queued_images=max_queued_images, max_slots=max_slots, **options
        )
        self.now = 0.0
        self.settled: list[Request] = []

    def admit(self, *images: Sequence[float], deadline: float = 1000.0, **options) -> Request:
        pixels = [self.engine.image(*units(*image)) for image in images]
        request, outcome = self.scheduler.admit(pixels, self.now, deadline=deadline, **options)
        self.carry_out(outcome)
        return request

    def dispatch(self) -> Batch:
        batch = self.scheduler.schedule(self.now)
        assert batch is not None
        return batch

    def come_back(self, batch: Batch) -> Outcome:
        return self.carry_out(self.scheduler.update(batch, self.engine.run(batch.run), self.now))

    def step(self) -> Batch:
        batch = self.dispatch()
        self.come_back(batch)
        return batch

    def run_dry(self) -> list[Batch]:
        batches = []
        while (batch := self.scheduler.schedule(self.now)) is not None:
            batches.append(batch)
            self.come_back(batch)
        return batches

    def carry_out(self, outcome: Outcome) -> Outcome:
        if outcome.freed:
            self.engine.free(outcome.freed)
        self.settled.extend(outcome.settled)
        return outcome

    def expire(self) -> Outcome:
        return self.carry_out(self.scheduler.expire(self.now))

    def cancel(self, request: Request) -> Outcome:
        return self.carry_out(self.scheduler.cancel(request, self.now))

    def retune(self, version: int, *thresholds: float) -> Outcome:
        return self.carry_out(self.scheduler.retune(OperatingPoint(version, (*thresholds, 0.0)), self.now))


def exits(request: Request) -> list[int]:
    assert request.answer is not None
    return [result.exit for result in request.answer.results]


def test_a_confidence_that_is_no_number_fails_its_request_and_no_other() -> None:
    cascade = Cascade()
    broken, sound = cascade.admit([UNSURE, SURE], [SURE], [UNSURE]), cascade.admit([UNSURE, SURE])
    batch = cascade.dispatch()
    output = cascade.engine.run(batch.run)
    confidence = output.confidence.copy()
    confidence[1] = np.nan
    cascade.carry_out(cascade.scheduler.update(batch, dataclasses.replace(output, confidence=confidence), cascade.now))
    assert isinstance(broken.error, EngineFailed)
    assert broken.abandoned == "engine_failed"
    cascade.run_dry()
    assert exits(sound) == [2]
    assert cascade.engine.slots_in_use == cascade.scheduler.load.slots == 0


def test_a_low_request_that_is_larger_than_half_the_queue_needs_an_empty_one() -> None:
    cascade = Cascade(max_queued_images=8)
    large = [[SURE]] * 6
    cascade.admit([SURE])
    with pytest.raises(Overloaded):
        cascade.admit(*large, priority=LOW)
    cascade.run_dry()
    assert cascade.admit(*large, priority=LOW).size == 6


# -- order


def test_an_image_leaves_at_the_first_exit_that_is_sure():
    cascade = Cascade()
    request = cascade.admit([SURE], [UNSURE, SURE], [UNSURE, UNSURE, UNSURE])
    cascade.run_dry()
    assert exits(request) == [1, 2, 3]
    assert cascade.engine.slots_in_use == 0


def test_confidence_equal_to_the_threshold_leaves():
    cascade = Cascade(OperatingPoint(1, (1.0, 1.0, 0.0)))
    request = cascade.admit([1.0])
    cascade.run_dry()
    assert exits(request) == [1]


def test_the_deepest_stage_runs_first_and_survivors_of_different_requests_share_its_batch():
    cascade = Cascade()
    first, second = cascade.admit([UNSURE, SURE], [SURE]), cascade.admit([UNSURE, SURE])
    cascade.admit([UNSURE, SURE], [SURE], [SURE], [SURE])
    batches = cascade.run_dry()
    assert [(batch.run.stage, len(batch.images)) for batch in batches] == [(1, 4), (2, 3), (1, 3)]
    assert {image.request for image in batches[1].images} >= {first, second}


@pytest.mark.parametrize(
    ("waiting", "idle", "shares", "sizes"),
    [
        (8, 1, (2, 2, 2), [8]),
        (8, 2, (2, 2, 2), [4, 4]),
        (8, 3, (2, 2, 2), [3, 3, 2]),
        (8, 8, (2, 2, 2), [2, 2, 2, 2]),  # less would not be worth it
        (8, 8, (1, 1, 1), [1] * 8),
        (30, 2, (2, 2, 2), [8, 8]),  # no more than a batch may have
        (1, 4, (2, 2, 2), [1]),
        (8, 2, None, [8]),  # executors that share their hardware
    ],
)
def test_idle_executors_share_what_waits(waiting: int, idle: int, shares: tuple[int, ...] | None, sizes) -> None:
    cascade = Cascade(sizes=(8, 8, 8))
    cascade.scheduler.learn(lambda _, images: 1.0 * images, deepest_first, shares=shares)
    cascade.admit(*[[UNSURE]] * waiting)
    taken = []
    while idle and (batch := cascade.scheduler.schedule(cascade.now, idle=idle)) is not None:
        taken.append(len(batch.images))
        idle -= 1
    assert taken == sizes


def test_an_image_is_judged_by_the_share_that_it_would_run_in() -> None:
    cascade = Cascade(sizes=(8, 8, 8))
    cascade.scheduler.learn(lambda _, images: 1.0 * images, deepest_first, shares=(2, 2, 2))
    request = cascade.admit(*[[SURE]] * 8, deadline=5.0)
    cascade.carry_out(cascade.scheduler.expire(cascade.now, 2))  # two batches of 4 s
    assert not request.settled
    cascade.expire()  # one of 8 s
    assert isinstance(request.error, Overloaded)


def test_survivors_run_in_order_of_admission_even_if_a_later_batch_came_back_first():
    cascade = Cascade(sizes=(1, 2, 2))
    cascade.admit([UNSURE, SURE])
    cascade.admit([UNSURE, SURE])
    earlier, later = cascade.dispatch(), cascade.dispatch()
    cascade.come_back(later)
    cascade.come_back(earlier)
    assert cascade.dispatch().images == earlier.images + later.images


def test_two_executors_hold_batches_at_once():
    cascade = Cascade(sizes=(2, 2, 2))
    request = cascade.admit([SURE], [SURE], [SURE])
    first, second = cascade.dispatch(), cascade.dispatch()
    assert (len(first.images), len(second.images)) == (2, 1)
    cascade.come_back(second)
    assert not request.settled
    cascade.come_back(first)
    assert exits(request) == [1, 1, 1]


def test_a_stage_batch_starts_only_with_slots_for_all_that_may_survive():
    cascade = Cascade(sizes=(4, 4, 4), max_slots=6)
    cascade.admit(*[[UNSURE, UNSURE]] * 12)
    first, second = cascade.dispatch(), cascade.dispatch()
    assert (len(first.images), len(second.images)) == (4, 2)
    assert cascade.scheduler.schedule(cascade.now) is None
    cascade.come_back(first)
    assert cascade.dispatch().run.stage == 2, "work that has its slots goes on"
    assert cascade.scheduler.schedule(cascade.now) is None


# -- admission


def test_a_request_that_does_not_fit_is_refused_whole():
    cascade = Cascade(max_queued_images=4)
    cascade.admit([SURE], [SURE], [SURE])
    cascade.now = 2.5
    with pytest.raises(Overloaded) as refused:
        cascade.admit([SURE], [SURE])
    assert refused.value.extra == {"retry_after_s": 3}, "as long as the oldest has waited, in whole seconds"
    assert cascade.scheduler.load.waiting == (3, 0, 0)
    cascade.admit([SURE])


def test_the_deadlines_of_those_who_wait_leave_out_lower_priorities_in_every_stage():
    cascade = Cascade()
    for priority in (HIGH, NORMAL, LOW, BACKGROUND):
        cascade.admit([UNSURE], deadline=10.0 + priority, priority=priority)
    assert [sorted(part) for part in cascade.scheduler.deadlines(NORMAL)] == [[10, 11], [], []]
    assert [sorted(part) for part in cascade.scheduler.deadlines(LOW)] == [[10, 11, 12], [], []]
    cascade.come_back(cascade.dispatch())
    assert [sorted(part) for part in cascade.scheduler.deadlines(NORMAL)] == [[], [10, 11], []]


def test_a_request_that_can_never_fit_is_not_told_to_come_back():
    with pytest.raises(TooManyImages):
        Cascade(max_queued_images=2).admit([SURE], [SURE], [SURE])


def test_a_request_without_images_is_refused():
    with pytest.raises(InvalidRequest):
        Cascade().admit()


def test_max_exit_and_min_confidence_shape_one_request_only():
    cascade = Cascade()
    capped = cascade.admit([UNSURE, UNSURE], max_exit=1)
    lenient = cascade.admit([UNSURE], min_confidence=0.1)
    strict = cascade.admit([SURE, SURE, UNSURE], min_confidence=0.95)
    both = cascade.admit([SURE, SURE], min_confidence=0.95, max_exit=2)
    cascade.run_dry()
    assert [exits(request) for request in (capped, lenient, strict, both)] == [[1], [1], [3], [2]]
    assert all(request.answer.point is POINT for request in cascade.settled)


# -- time


def test_waiting_and_computing_are_told_apart_over_all_stages():
    cascade = Cascade()
    request = cascade.admit([UNSURE, SURE])
    cascade.now = 1.0
    batch = cascade.dispatch()
    cascade.now = 3.0
    cascade.come_back(batch)
    cascade.now = 7.0
    batch = cascade.dispatch()
    cascade.now = 15.0
    cascade.come_back(batch)
    (result,) = request.answer.results
    assert (result.queue_s, result.compute_s) == (1.0 + 4.0, 2.0 + 8.0)


def test_a_deadline_without_a_prediction_fails_the_request():
    cascade = Cascade()
    request = cascade.admit([SURE], deadline=5.0)
    assert cascade.scheduler.next_deadline() == 5.0
    cascade.now = 5.0
    cascade.expire()
    assert isinstance(request.error, DeadlineExceeded)
    assert request.abandoned == "deadline"
    assert cascade.scheduler.schedule(cascade.now) is None


def test_a_deadline_answers_a_waiting_image_with_the_prediction_it_has():
    cascade = Cascade()
    request = cascade.admit([UNSURE, SURE], [SURE], deadline=5.0)
    cascade.step()
    cascade.now = 6.0
    cascade.expire()
    survivor, sure = request.answer.results
    assert (survivor.exit, survivor.degraded, survivor.queue_s) == (1, True, 6.0)
    assert (sure.exit, sure.degraded) == (1, False)
    assert cascade.engine.slots_in_use == 0


def test_a_deadline_answers_a_running_image_and_ignores_its_row_later():
    cascade = Cascade()
    request = cascade.admit([UNSURE, UNSURE], deadline=5.0)
    cascade.step()
    batch = cascade.dispatch()
    cascade.now = 5.0
    cascade.expire()
    (result,) = request.answer.results
    assert (result.exit, result.degraded, result.compute_s) == (1, True, 5.0)
    assert cascade.come_back(batch).ignored == 1
    assert cascade.engine.slots_in_use == 0
    assert len(cascade.settled) == 1


def test_one_image_without_a_prediction_fails_the_whole_request_at_its_deadline():
    cascade = Cascade(sizes=(1, 1, 1))
    request = cascade.admit([SURE], [SURE], deadline=5.0)
    cascade.step()
    cascade.now = 5.0
    cascade.expire()
    assert isinstance(request.error, DeadlineExceeded)
    assert cascade.scheduler.next_deadline() is None


def test_stopping_answers_with_what_is_known():
    cascade = Cascade(sizes=(1, 1, 1))
    known, unknown = cascade.admit([UNSURE, UNSURE]), cascade.admit([UNSURE])
    cascade.step()
    cascade.carry_out(cascade.scheduler.stop(cascade.now))
    assert known.answer.results[0].degraded
    assert isinstance(unknown.error, Draining)
    assert unknown.abandoned == "shutdown"
    assert cascade.engine.slots_in_use == 0


# -- failure and departure


def test_a_failed_batch_fails_its_requests_and_nothing_else():
    cascade = Cascade(sizes=(2, 2, 2))
    hit, spared = cascade.admit([UNSURE, UNSURE], [UNSURE, UNSURE], [SURE]), cascade.admit([UNSURE, SURE])
    cascade.step()
    batch = cascade.dispatch()
    assert batch.run.stage == 2
    cascade.carry_out(cascade.scheduler.fail(batch, cascade.now))
    assert isinstance(hit.error, EngineFailed)
    assert cascade.engine.slots_in_use == 0
    cascade.run_dry()
    assert exits(spared) == [2]


def test_a_client_that_left_is_never_dispatched_again():
    cascade = Cascade()
    gone, stays = cascade.admit([UNSURE, UNSURE], [UNSURE, UNSURE]), cascade.admit([UNSURE, SURE])
    cascade.step()
    cascade.cancel(gone)
    assert cascade.engine.slots_in_use == 1, "its slots are free at once"
    (batch,) = cascade.run_dry()
    assert [image.request for image in batch.images] == [stays]


def test_a_client_that_leaves_while_its_image_runs_costs_only_that_batch():
    cascade = Cascade()
    gone = cascade.admit([UNSURE, UNSURE])
    batch = cascade.dispatch()
    cascade.cancel(gone)
    outcome = cascade.come_back(batch)
    assert outcome.ignored == 1
    assert cascade.engine.slots_in_use == 0
    assert cascade.run_dry() == []
    assert not cascade.cancel(gone).settled, "a second departure is nothing"


def test_cancelled_and_answered_requests_leave_nothing_behind():
    cascade = Cascade(max_queued_images=2000)
    requests = [cascade.admit([UNSURE, UNSURE]) for _ in range(1000)]
    for _ in range(3):
        cascade.step()
    for request in requests:
        cascade.cancel(request)
    assert cascade.engine.slots_in_use == 0
    assert cascade.scheduler.load.slots == 0
    assert cascade.scheduler.next_deadline() is None
    assert not any(cascade.scheduler.load.waiting)


# -- priorities


def test_the_higher_priority_goes_first_then_the_earlier_deadline_and_batches_stay_full():
    cascade = Cascade(sizes=(3, 3, 3))
    low = cascade.admit([SURE], deadline=1.0, priority=LOW)
    late, early = cascade.admit([SURE], deadline=9.0), cascade.admit([SURE], deadline=5.0)
    high = cascade.admit([SURE], deadline=99.0, priority=HIGH)
    batches = cascade.run_dry()
    assert [[image.request for image in batch.images] for batch in batches] == [[high, early, late], [low]]


def test_background_work_waits_until_nothing_else_can_run_and_shares_no_batch():
    cascade = Cascade()
    background = cascade.admit([UNSURE, UNSURE, SURE], priority=BACKGROUND)
    request = cascade.admit([UNSURE, SURE])
    batches = cascade.run_dry()
    assert [[image.request for image in batch.images] for batch in batches] == [[request]] * 2 + [[background]] * 3


def test_background_survivors_cannot_lock_new_images_out():
    cascade = Cascade(max_slots=1)
    background = cascade.admit([UNSURE, UNSURE, SURE], priority=BACKGROUND)
    cascade.step()
    request = cascade.admit([SURE])
    cascade.run_dry()
    assert exits(background) == [3]
    assert exits(request) == [1]


def test_low_priority_is_refused_at_half_of_the_queue():
    cascade = Cascade(max_queued_images=4)
    cascade.admit([SURE], [SURE])
    with pytest.raises(Overloaded):
        cascade.admit([SURE], priority=LOW)
    cascade.admit([SURE], [SURE])


def test_a_higher_priority_takes_the_place_of_the_lowest_and_last():
    cascade = Cascade(max_queued_images=4)
    low = cascade.admit([SURE], priority=LOW)
    early, late = cascade.admit([SURE], deadline=5.0), cascade.admit([SURE], [SURE], deadline=9.0)
    assert cascade.scheduler.is_full(LOW)
    assert not cascade.scheduler.is_full(NORMAL)
    cascade.admit([SURE], priority=HIGH)
    assert isinstance(low.error, Overloaded)
    assert low.error.extra["retry_after_s"] >= 1
    assert not early.settled
    assert not late.settled
    cascade.admit([SURE], priority=HIGH)
    assert isinstance(late.error, Overloaded), "a request fails as a whole"
    assert cascade.scheduler.load.waiting == (3, 0, 0)
    assert not early.settled


def test_background_work_finds_room_in_a_full_queue_and_keeps_it():
    cascade = Cascade(max_queued_images=4)
    for _ in range(4):
        cascade.admit([SURE])
    background = [cascade.admit([SURE], priority=BACKGROUND) for _ in range(2)]
    with pytest.raises(Overloaded):
        cascade.admit([SURE], priority=BACKGROUND)
    with pytest.raises(Overloaded):
        cascade.admit([SURE])
    assert not any(request.settled for request in background)


def test_nobody_is_displaced_by_an_equal_or_for_one_that_is_not_let_in():
    cascade = Cascade(max_queued_images=2, seconds=seconds)
    waits = [cascade.admit([SURE], deadline=100.0) for _ in range(2)]
    assert cascade.scheduler.is_full(NORMAL)
    with pytest.raises(Overloaded):
        cascade.admit([SURE], deadline=50.0)
    with pytest.raises(DeadlineExceeded):
        cascade.admit([SURE], deadline=0.5, priority=HIGH)
    assert not any(request.settled for request in waits)


def test_what_has_begun_is_not_displaced():
    cascade = Cascade(sizes=(2, 2, 2), max_queued_images=2)
    begun = cascade.admit([UNSURE, UNSURE, SURE], [UNSURE, UNSURE, SURE])
    cascade.step()
    assert cascade.scheduler.load.waiting == (0, 2, 0)
    with pytest.raises(Overloaded):
        cascade.admit([SURE], priority=HIGH)
    cascade.run_dry()
    assert exits(begun) == [3, 3]


@pytest.mark.parametrize("first", [SURE, UNSURE])
@pytest.mark.parametrize("came_back", [True, False])
def test_a_request_that_has_begun_with_some_of_its_images_is_not_displaced(first, came_back):
    cascade = Cascade(sizes=(2, 2, 2), max_queued_images=4)
    begun = cascade.admit([first, SURE], [first, SURE], [SURE], [SURE], deadline=20.0)
    batch = cascade.dispatch()
    if came_back:
        cascade.come_back(batch)
    while not cascade.scheduler.is_full(NORMAL):
        cascade.admit([SURE], deadline=10.0)
    new = len(cascade.scheduler.deadlines(NORMAL)[0]) - 2
    for _ in range(new):
        cascade.admit([SURE], priority=HIGH)
    assert not begun.settled
    assert len(cascade.settled) == new
    with pytest.raises(Overloaded):
        cascade.admit([SURE], priority=HIGH)
    if not came_back:
        cascade.come_back(batch)
    cascade.run_dry()
    assert len(exits(begun)) == 4


def test_background_work_that_waits_gets_its_share_of_a_busy_device_and_no_more():
    cascade = Cascade(sizes=(4, 4, 4))
    taken = {True: 0.0, False: 0.0}
    waits = None
    for _ in range(20_000):
        if waits is None or waits.settled:
            waits = cascade.admit([SURE], deadline=1e9, priority=BACKGROUND)
        while cascade.scheduler.load.waiting[0] < 9:
            cascade.admit([SURE], deadline=1e8)
        batch = cascade.dispatch()
        background = batch.images[0].request.priority == BACKGROUND
        assert not background or len(batch.images) == 1
        cascade.now += (spent := 1.0 if background else 2.0)
        taken[background] += spent
        cascade.come_back(batch)
    assert taken[True] / taken[False] == pytest.approx(BACKGROUND_SHARE, rel=0.01)


def test_background_work_saves_no_time_up_while_there_is_none():
    cascade = Cascade()
    for _ in range(1000):
        cascade.admit([SURE])
        batch = cascade.dispatch()
        cascade.now += 10.0
        cascade.come_back(batch)
        cascade.now = 0.0
    for _ in range(2):
        cascade.admit([UNSURE, UNSURE, SURE], priority=BACKGROUND)
    for _ in range(8):
        cascade.admit([SURE])
    assert [batch.images[0].request.priority for batch in cascade.run_dry()[:2]] == [NORMAL, NORMAL]


def test_background_work_gets_its_share_of_a_busy_hour_however_often_clients_waited_for_it_before():
    cascade = Cascade()
    for _ in range(500):
        cascade.admit([SURE], deadline=1e9, priority=BACKGROUND)
        batch = cascade.dispatch()
        cascade.admit([SURE], deadline=1e9)
        cascade.now += 1.0
        cascade.come_back(batch)
        cascade.run_dry()
    taken, waits = 0, None
    for _ in range(1000):
        if waits is None or waits.settled:
            waits = cascade.admit([SURE], deadline=1e9, priority=BACKGROUND)
        while cascade.scheduler.load.waiting[0] < 9:
            cascade.admit([SURE], deadline=1e9)
        batch = cascade.dispatch()
        taken += batch.images[0].request.priority == BACKGROUND
        cascade.now += 1.0
        cascade.come_back(batch)
    assert taken == pytest.approx(1000 * BACKGROUND_SHARE, abs=3)


# -- deadlines that cannot be met


def seconds(stage: int, images: int) -> float:
    return stage + 0.5 * images


def test_a_belief_that_refuses_all_is_tested_now_and_then():
    cascade = Cascade(seconds=lambda *_: 2.0)
    tried = []
    for _ in range(2000):
        cascade.now += 1.0
        try:
            cascade.admit([SURE], deadline=cascade.now + 1.5)
        except DeadlineExceeded:
            continue
        cascade.expire()
        cascade.step()
        tried.append(cascade.now)
    assert np.diff(tried).tolist() == [2.0 * DOUBT + 1.0] * (len(tried) - 1)
    assert len(tried) > 5
    assert all(request.answer for request in cascade.settled)


def test_a_deep_stage_that_is_believed_too_slow_is_tried_now_and_then():
    cascade = Cascade(seconds=lambda stage, _: 2.0 if stage == 2 else 0.1)
    requests = []
    for _ in range(1000):
        requests.append(cascade.admit([UNSURE, SURE], deadline=cascade.now + 2.5))
        cascade.step()
        cascade.now += 1.0
        cascade.expire()
        cascade.run_dry()
    assert [number for number, request in enumerate(requests) if exits(request) == [2]] == [200, 401, 602, 803]


def test_a_profile_that_was_measured_on_a_busy_machine_is_unlearned_by_those_it_would_refuse():
    profile = LiveProfile(LatencyProfile.lines((0.3, 0.3, 0.3), (0.0, 0.0, 0.0)))
    cascade = Cascade(seconds=profile.seconds)
    refused_at = 0.0
    while cascade.now < 300.0:
        cascade.now += 0.05
        profile.forget(0.05)
        try:
            cascade.admit([SURE], deadline=cascade.now + 0.2)
        except DeadlineExceeded:
            refused_at = cascade.now
            continue
        cascade.expire()
        cascade.step()
        profile.observe(1, 1, 0.01)
    assert refused_at < 150.0


def test_a_newcomer_is_refused_at_the_door_where_even_first_stages_alone_would_take_too_long():
    cascade = Cascade(sizes=(2, 2, 2), seconds=seconds)
    for _ in range(5):
        cascade.admit([SURE], deadline=5.0)  # the fifth of five at one a second
    with pytest.raises(Overloaded) as refused:
        cascade.admit([SURE], deadline=5.5)
    assert refused.value.extra["retry_after_s"] == 1
    cascade.admit([SURE], deadline=2.0, priority=HIGH)  # they go before the others


def test_what_goes_behind_a_newcomer_refuses_nobody_at_the_door():
    cascade = Cascade(sizes=(2, 2, 2), seconds=seconds)
    for _ in range(40):
        cascade.admit([SURE], deadline=900.0)
    hurried = cascade.admit([SURE], deadline=2.1)
    assert hurried in {image.request for image in cascade.dispatch().images}


def test_a_deadline_that_an_idle_server_would_miss_is_refused_as_such():
    cascade = Cascade(seconds=seconds)
    with pytest.raises(DeadlineExceeded):
        cascade.admit([SURE], deadline=1.4)


def test_a_queued_image_that_cannot_make_it_is_refused_before_its_deadline():
    cascade = Cascade(sizes=(1, 1, 1), seconds=seconds)
    cascade.admit([SURE], deadline=100.0)
    doomed = cascade.admit([SURE], deadline=4.0)
    cascade.now = 2.4
    assert cascade.expire().settled == []
    cascade.now = 2.6
    cascade.expire()
    assert isinstance(doomed.error, Overloaded)
    assert doomed.abandoned == "overloaded"


def test_an_image_is_judged_by_the_batch_that_it_would_run_in():
    cascade = Cascade(sizes=(4, 4, 4), seconds=seconds)
    heads = [cascade.admit([SURE], deadline=2.6) for _ in range(2)]  # alone 1.5 s, in a batch of four 3 s
    for _ in range(2):
        cascade.admit([SURE], deadline=100.0)
    cascade.expire()
    assert [head.abandoned for head in heads] == ["overloaded", None], "without one, it is a batch of three: 2.5 s"
    assert len(cascade.dispatch().images) == 3


def test_an_image_that_the_next_batch_does_not_take_is_judged_by_one_of_its_own():
    cascade = Cascade(sizes=(2, 2, 2), seconds=seconds)
    later = cascade.admit([SURE], deadline=1.8)  # alone 1.5 s, in a batch of two 2 s
    for _ in range(2):
        cascade.admit([SURE], deadline=100.0, priority=HIGH)
    cascade.expire()
    assert not later.settled


def test_a_survivor_that_cannot_make_it_is_answered_at_once_with_what_it_has():
    cascade = Cascade(seconds=seconds)
    request = cascade.admit([UNSURE, SURE], [SURE], deadline=4.0)
    cascade.step()
    cascade.now = 1.6  # stage 2 needs 2.5
    cascade.expire()
    assert [(result.exit, result.degraded) for result in request.answer.results] == [(1, True), (1, False)]
    assert cascade.engine.slots_in_use == 0
    assert cascade.scheduler.schedule(cascade.now) is None


# -- operating points


def test_a_new_point_judges_what_has_not_begun():
    cascade = Cascade()
    request = cascade.admit([0.5])
    cascade.retune(2, 0.4, 0.4)
    cascade.run_dry()
    assert exits(request) == [1]
    assert request.answer.point.version == 2


def test_a_lowered_point_lets_waiting_survivors_out_at_once():
    cascade = Cascade()
    request, other = cascade.admit([0.5, 0.5]), cascade.admit([0.3, SURE])
    cascade.step()
    outcome = cascade.retune(2, 0.4, 0.4)
    assert outcome.settled == [request]
    assert exits(request) == [1]
    assert not request.answer.results[0].degraded
    assert request.answer.point.version == 2
    assert cascade.engine.slots_in_use == 1
    cascade.run_dry()
    assert exits(other) == [2]
    assert other.answer.point.version == 2


def test_an_image_that_the_new_point_would_have_let_out_earlier_keeps_its_own():
    cascade = Cascade(OperatingPoint(1, (0.8, 0.8, 0.0)))
    request = cascade.admit([0.5, 0.3, UNSURE])
    cascade.step()
    cascade.step()
    cascade.retune(2, 0.4, 0.2)  # 0.5 >= 0.4: it would not be here
    assert not request.settled
    cascade.run_dry()
    assert exits(request) == [3]
    assert request.answer.point.version == 1


def test_an_image_that_runs_is_looked_at_when_it_comes_back():
    cascade = Cascade()
    request = cascade.admit([0.5, UNSURE])
    batch = cascade.dispatch()
    cascade.retune(2, 0.4, 0.4)
    cascade.come_back(batch)
    assert exits(request) == [1]
    assert request.answer.point.version == 2
    assert cascade.engine.slots_in_use == 0, "the state that the old threshold kept is freed"


def test_a_raised_point_cannot_call_back_an_image_that_left_without_state():
    cascade = Cascade(OperatingPoint(1, (0.4, 0.4, 0.0)))
    request = cascade.admit([0.5, UNSURE])
    batch = cascade.dispatch()
    cascade.retune(2, 0.8, 0.8)
    cascade.come_back(batch)
    assert exits(request) == [1]
    assert request.answer.point.version == 1


def test_a_request_with_a_decided_image_keeps_its_point():
    cascade = Cascade()
    request = cascade.admit([SURE], [0.5, UNSURE, UNSURE])
    cascade.step()
    cascade.retune(2, 0.4, 0.4)
    cascade.run_dry()
    assert exits(request) == [1, 3]
    assert request.answer.point.version == 1


def test_a_request_moves_only_when_none_of_its_images_runs():
    cascade = Cascade(sizes=(1, 1, 1))
    request = cascade.admit([0.5, UNSURE], [0.5, UNSURE])
    batch = cascade.dispatch()
    cascade.retune(2, 0.4, 0.4)
    assert request.point.version == 1
    cascade.come_back(batch)
    assert request.point.version == 2
    cascade.run_dry()
    assert exits(request) == [1, 1]


def test_min_confidence_is_never_replaced_by_a_new_point():
    cascade = Cascade()
    request = cascade.admit([0.5, 0.7], min_confidence=0.6)
    cascade.step()
    cascade.retune(2, 0.4, 0.4)
    cascade.run_dry()
    assert exits(request) == [2]
    assert request.answer.point.version == 1


MIXED = OperatingPoint(1, (0.4, 0.4, 0.0), Mix((0.8, 0.8, 0.0), 0.25))


def test_a_mixed_point_judges_a_whole_request_by_one_of_its_two_sets():
    cascade = Cascade(MIXED)
    places = (0.0, 0.2499, 0.25, 0.99)
    requests = [cascade.admit([0.5, 0.5, UNSURE], [0.5, SURE], place=place) for place in places]
    cascade.run_dry()
    assert [exits(request) for request in requests] == [[3, 2], [3, 2], [1, 1], [1, 1]]
    assert all(request.answer.point is MIXED for request in requests)


def test_a_share_that_moves_takes_only_those_requests_along_that_it_passes():
    cascade = Cascade(MIXED)
    dearer, moved, cheaper = (cascade.admit([0.5, SURE], place=place) for place in (0.1, 0.2, 0.9))
    cascade.step()
    assert exits(cheaper) == [1]
    point = OperatingPoint(1, MIXED.thresholds, Mix((0.8, 0.8, 0.0), 0.15))
    assert cascade.carry_out(cascade.scheduler.retune(point, cascade.now)).settled == [moved]
    assert exits(moved) == [1]
    cascade.run_dry()
    assert exits(dearer) == [2]


def test_a_mixed_point_whose_second_set_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        Cascade(OperatingPoint(1, (0.5, 0.5, 0.0), Mix((0.5, 0.0), 0.5)))


@pytest.mark.parametrize("thresholds", [(0.5, 0.0), (0.5, 0.5, 0.1)])
def test_a_point_that_does_not_fit_the_cascade_is_refused(thresholds):
    cascade = Cascade()
    with pytest.raises(ValueError, match="threshold"):
        cascade.scheduler.retune(OperatingPoint(2, thresholds), 0.0)


# -- properties

# Few values, so that confidences and thresholds often meet; mostly unsure images, so that histories run deep.
CONFIDENCES = st.sampled_from([0.2, 0.2, 0.4, 0.4, 0.6, 1.0])
THRESHOLDS = st.sampled_from([0.0, 0.3, 0.5, 0.5, 0.7, 1.0])
PLACES = st.sampled_from([0.0, 0.3, 0.6, 0.9])
MIXES = st.none() | st.builds(
    lambda a, b, share: Mix((a, b, 0.0), share), THRESHOLDS, THRESHOLDS, st.sampled_from([0.0, 0.3, 0.5, 1.0])
)
IMAGES = st.lists(st.tuples(CONFIDENCES, CONFIDENCES, CONFIDENCES), min_size=1, max_size=4)


class Histories(RuleBasedStateMachine):
    """Anything that can happen, in any order, with up to three batches out at once."""

    @initialize(
        sizes=st.tuples(*[st.integers(1, 4)] * 3),
        slots=st.integers(1, 12),
        thresholds=st.tuples(THRESHOLDS, THRESHOLDS),
        mix=MIXES,
        costs=st.sampled_from([None, (0.0, 0.5), (2.0, 1.0)]),
        shares=st.tuples(*[st.integers(1, 4)] * 3),
    )
    def begin(self, sizes, slots, thresholds, mix, costs, shares):
        self.sizes, self.max_slots = sizes, slots
        self.shares = sizes if costs is None else [min(pair) for pair in zip(sizes, shares, strict=True)]
        self.versions = [OperatingPoint(0, (*thresholds, 0.0), mix)]
        self.seconds = None if costs is None else lambda stage, size: costs[0] + costs[1] * size  # noqa: ARG005
        self.cascade = Cascade(
            self.versions[0], sizes=sizes, max_queued_images=12, max_slots=slots, seconds=self.seconds
        )
        if self.seconds is not None:
            self.cascade.scheduler.learn(self.seconds, deepest_first, shares=self.shares)
        self.confidences: dict[Request, list[tuple[float, ...]]] = {}
        self.deepest: dict[int, int] = {}  # by order of admission: the deepest stage an image was dispatched to
        self.orders: dict[Request, list[int]] = {}
        self.flying: list[Batch] = []

    @rule(
        images=IMAGES,
        patience=st.sampled_from([1, 5, 50, 50, 50]),
        max_exit=st.sampled_from([None, None, None, None, 1, 2, 3]),
        min_confidence=st.sampled_from([None, None, None, None, 0.0, 0.5, 1.0]),
        priority=st.sampled_from([NORMAL, NORMAL, HIGH, LOW, BACKGROUND]),
        place=PLACES,
    )
    def admit(self, images, patience, max_exit, min_confidence, priority, place):
        load = self.cascade.scheduler.load
        running = {image for batch in self.flying for image in batch.images}
        live = [request for request in self.confidences if not request.settled]
        kind = [request for request in live if (request.priority == BACKGROUND) == (priority == BACKGROUND)]
        waiting = sum(image.result is None and image not in running for request in kind for image in request.images)
        room = 12 if priority < LOW or not waiting else 6
        excess = waiting + len(images) - room
        waits = {
            request: request.size
            for request in live
            if all(image.stage == 1 and image not in running and image.result is None for image in request.images)
        }
        lower = [request for request in waits if priority < request.priority < BACKGROUND]
        full = excess > sum(waits[request] for request in lower)
        before = len(self.cascade.settled)
        try:
            request = self.cascade.admit(
                *images,
                deadline=self.cascade.now + patience,
                max_exit=max_exit,
                min_confidence=min_confidence,
                priority=priority,
                place=place,
            )
        except Overloaded:
            # Or the first stage alone would take too long.
            assert full or (self.seconds and patience < self.seconds(1, 1) * (load.waiting[0] + len(images)))
            assert len(self.cascade.settled) == before, "nobody goes for one that is not let in"
        except DeadlineExceeded:
            assert self.seconds
            assert patience < self.seconds(1, 1)
        else:
            assert not full
            gone = self.cascade.settled[before:]
            assert set(gone) <= set(lower), "only a higher priority displaces"
            assert all(one.abandoned == "overloaded" for one in gone)
            assert (sum(waits[one] for one in gone) >= excess) if excess > 0 else not gone
            if gone:
                stayed = [(one.priority, one.deadline) for one in lower if one not in gone]
                most = max(gone, key=lambda one: (one.priority, one.deadline))
                assert all((most.priority, most.deadline) >= kept for kept in stayed), "the lowest and last go first"
            self.confidences[request] = [tuple(float(np.float32(u / 255)) for u in units(*image)) for image in images]
            self.orders[request] = [image.order for image in request.images]

    @precondition(lambda self: len(self.flying) < 3 and any(self.cascade.scheduler.load.waiting))
    @rule(returns=st.booleans(), executors=st.integers(1, 6))
    def dispatch(self, returns, executors):
        """Start a batch; `returns`: it comes back before anything else happens."""
        executors = max(1, executors - len(self.flying))  # that are idle
        self.cascade.carry_out(self.cascade.scheduler.expire(self.cascade.now, executors))
        if not any(self.cascade.scheduler.load.waiting):
            return
        load = self.cascade.scheduler.load
        live = [image for request in self.confidences if not request.settled for image in request.images]
        running = {image for batch in self.flying for image in batch.images}
        queued = [image for image in live if image.result is None and image not in running]
        waiting = Counter(image.stage for image in queued if image.request.priority != BACKGROUND)
        hidden = Counter(image.stage for image in queued if image.request.priority == BACKGROUND)
        due = self.cascade.scheduler._credit > self.cascade.scheduler._last_s
        batch = self.cascade.scheduler.schedule(self.cascade.now, idle=executors)
        free = load.max_slots - load.slots
        if batch is None:
            assert not any(load.waiting[1:]), "idle while deeper work waits"
            assert not load.waiting[0] or not free, "idle while new images could start"
            return
        stage = batch.run.stage
        background = {image.request.priority == BACKGROUND for image in batch.images}
        assert len(background) == 1, "background work shares no batch"
        if background == {True}:
            idle = not waiting[2] and not waiting[3] and (not waiting[1] or not free)
            assert idle or due, "background work before a client's"
            assert idle or len(batch.images) == 1
            waiting = hidden if idle else Counter({stage: 1})
        elif self.seconds:
            ends = self.cascade.now + self.seconds(stage, len(batch.images))
            assert all(image.request.deadline >= ends for image in batch.images), "it brings none of them in time"
        assert not any(waiting[deeper] for deeper in range(stage + 1, 4)), "a deeper stage was passed over"
        can_start = waiting[stage] if stage > 1 else min(waiting[1], free)
        share = max(self.shares[stage - 1], math.ceil(load.waiting[stage - 1] / executors))
        most = self.sizes[stage - 1] if executors == 1 else min(self.sizes[stage - 1], share)
        assert len(batch.images) == min(can_start, most), "as full as it can be"
        orders = [(image.request.priority, image.request.deadline, image.order) for image in batch.images]
        assert orders == sorted(orders)
        assert not any(image.request.settled for image in batch.images), "nobody waits for it"
        assert batch.run.thresholds == [image.request.thresholds[stage - 1] for image in batch.images]
        for image in batch.images:
            assert self.deepest.get(image.order, 0) == stage - 1
            self.deepest[image.order] = stage
        if returns:
            self.cascade.come_back(batch)
        else:
            self.flying.append(batch)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def come_back(self, data):
        self.cascade.come_back(self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1))))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def fail(self, data):
        batch = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        alive = {image.request for image in batch.images if not image.request.settled}
        outcome = self.cascade.carry_out(self.cascade.scheduler.fail(batch, self.cascade.now))
        assert set(outcome.settled) == alive

    @rule(seconds=st.integers(1, 4))
    def time_passes(self, seconds):
        self.cascade.now += seconds
        self.cascade.expire()
        deadline = self.cascade.scheduler.next_deadline()
        assert deadline is None or deadline > self.cascade.now

    @precondition(lambda self: len(self.confidences) > len(self.cascade.settled))
    @rule(data=st.data())
    def cancel(self, data):
        live = [request for request in self.confidences if not request.settled]
        self.cascade.cancel(data.draw(st.sampled_from(live)))

    @rule(thresholds=st.tuples(THRESHOLDS, THRESHOLDS), mix=MIXES)
    def retune(self, thresholds, mix):
        point = OperatingPoint(len(self.versions), (*thresholds, 0.0), mix)
        self.versions.append(point)
        self.cascade.carry_out(self.cascade.scheduler.retune(point, self.cascade.now))

    @invariant()
    def every_image_is_accounted_for_once(self):
        settled = Counter(self.cascade.settled)
        assert not settled or max(settled.values()) == 1
        assert set(settled) <= set(self.confidences)
        live = {request for request in self.confidences if not request.settled}
        assert live == set(self.confidences) - set(settled)
        load = self.cascade.scheduler.load
        held = sum(load.waiting) + sum(not i.request.settled for batch in self.flying for i in batch.images)
        assert held == sum(request.undecided for request in live)

    @invariant()
    def slots_in_use_are_the_live_survivors(self):
        load = self.cascade.scheduler.load
        assert load.running == tuple(
            sum(len(batch.images) for batch in self.flying if batch.run.stage == stage) for stage in (1, 2, 3)
        )
        assert self.cascade.engine.slots_in_use == sum(load.waiting[1:]) + sum(load.running[1:])
        assert load.slots == sum(load.waiting[1:]) + sum(load.running) <= self.max_slots

    @invariant()
    def every_answer_follows_from_the_one_point_that_it_names(self):
        for request in self.cascade.settled:
            if request.answer is None:
                assert request.abandoned in ("disconnect", "deadline", "engine_failed", "overloaded")
                continue
            assert request.answer.point == self.versions[request.answer.point.version]
            rows = zip(self.confidences[request], self.orders[request], request.answer.results, strict=True)
            for confidences, order, result in rows:
                thresholds = list(request.answer.point.thresholds_for(request.place))
                if request.min_confidence is not None:
                    thresholds[:2] = [request.min_confidence] * 2
                if request.max_exit is not None:
                    thresholds[request.max_exit - 1] = 0.0
                due = next(e for e, (c, t) in enumerate(zip(confidences, thresholds, strict=True), 1) if c >= t)
                assert result.confidence == confidences[result.exit - 1]
                assert result.exit < due if result.degraded else result.exit == due
                assert self.deepest[order] - result.exit in ((0, 1) if result.degraded else (0,))

    def teardown(self):
        if not hasattr(self, "cascade"):
            return
        for batch in self.flying:
            self.cascade.come_back(batch)
        self.flying = []
        self.cascade.run_dry()
        self.every_image_is_accounted_for_once()
        assert self.cascade.engine.slots_in_use == 0
        assert len(self.cascade.settled) == len(self.confidences)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=True)


@given(
    arrivals=st.lists(IMAGES, min_size=1, max_size=30),
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    executors=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_image_is_passed_over_for_ever(arrivals, sizes, executors):
    cascade = Cascade(sizes=sizes, max_queued_images=1000)
    flying: list[Batch] = []
    waiting_since: list[tuple[Request, int, int]] = []  # request, batches started before it, most that may run before
    started = 0
    pending = list(arrivals)
    while pending or flying or any(cascade.scheduler.load.waiting):
        if pending:  # a request comes with every step, for as long as there are any
            load = cascade.scheduler.load
            request = cascade.admit(*pending.pop())
            ahead = sum(load.waiting) + sum(load.running) + request.size
            # Every image ahead, and those that share its first batches, can be in three batches at most.
            waiting_since.append((request, started, 3 * (ahead + executors * sizes[0])))
        while len(flying) < executors and (batch := cascade.scheduler.schedule(cascade.now)) is not None:
            flying.append(batch)
            started += 1
        cascade.come_back(flying.pop(0))
        for request, since, most in waiting_since:
            assert request.settled or started - since <= most
        waiting_since = [entry for entry in waiting_since if not entry[0].settled]
    assert len(cascade.settled) == len(arrivals)
