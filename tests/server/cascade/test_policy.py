"""Which stage runs next, by example: three stages, ten seconds a batch and one an image, at most 100 a batch."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from server.bundle.profile import LatencyProfile
from server.cascade.policy import DeepestRipe
from server.cascade.scheduler import StageView

SIZES = (100, 100, 100)
COSTLY_BATCHES = DeepestRipe(LatencyProfile.lines((10, 10, 10), (1, 1, 1)).seconds, SIZES)
RIPE = 68  # 68 / (68 + 10) is 0.959 of 100 / (100 + 10); 67 is below 0.95 of it by a hair
COSTLY_IMAGES = DeepestRipe(LatencyProfile.lines((0, 0, 0), (1, 1, 1)).seconds, SIZES)


def view(waiting: int, deadline: float = math.inf) -> StageView:
    if not waiting:
        return StageView(0, 0, math.inf, math.inf)
    return StageView(min(waiting, 100), waiting, 0.0, deadline)


def choice(*waiting: int | StageView, policy=COSTLY_BATCHES, now: float = 0.0) -> int | None:
    return policy([one if isinstance(one, StageView) else view(one) for one in waiting], now)


def test_nothing_waits_nothing_runs():
    assert choice(0, 0, 0) is None


def test_what_fits_into_a_batch_runs_to_completion():
    assert choice(50, 0, 0) == 1
    assert choice(50, 1, 0) == 2
    assert choice(50, 90, 1) == 3


def test_survivors_are_gathered_once_first_batches_are_full():
    assert choice(200, 1, 1) == 1
    assert choice(200, 30, 40) == 1


def test_nothing_is_gathered_where_deadlines_leave_no_time_for_full_batches():
    assert choice(view(200, deadline=331), 1, 1) == 1  # 330 s: three full batches
    assert choice(view(200, deadline=329), 1, 1) == 3


def test_the_deepest_ripe_stage_runs():
    assert choice(200, 100, RIPE) == 3
    assert choice(200, RIPE, 60) == 2
    assert choice(200, 60, 60) == 1


def test_where_none_is_ripe_the_ripest_runs_and_of_equals_the_deepest():
    assert choice(51, 60, 1) == 2
    assert choice(60, 60, 60) == 3


def test_urgent_survivors_go_before_other_work():
    # Alone at stage 3: 11 s. Behind a full first-stage batch of 110 s: 121 s.
    assert choice(200, 0, view(1, deadline=122)) == 1
    assert choice(200, 0, view(1, deadline=120)) == 3
    assert choice(200, 0, view(1, deadline=220), now=100) == 3


def test_the_stages_that_are_still_to_come_count_in_urgency():
    assert choice(200, view(1, deadline=131), 0) == 2  # 11 s at stage 2, 11 s at stage 3
    assert choice(200, view(1, deadline=133), 0) == 1


def test_what_cannot_make_its_deadline_is_not_urgent():
    assert choice(200, 0, view(1, deadline=10)) == 1


def test_new_images_are_never_urgent():
    """They would go before survivors that are nearer to an answer, and under load all of them are late."""
    assert choice(view(200, deadline=331), 0, 100, now=220) == 3


def test_without_a_fixed_cost_every_batch_is_ripe():
    assert choice(200, 100, 1, policy=COSTLY_IMAGES) == 3
    assert choice(200, 1, 0, policy=COSTLY_IMAGES) == 2


def test_fewer_images_than_are_ripe_are_worth_an_idle_executor():
    assert COSTLY_BATCHES.shares == [27, 27, 27]  # 27 / (27 + 10) is 0.80 of 100 / (100 + 10)
    assert COSTLY_IMAGES.shares == [1, 1, 1]
    assert DeepestRipe(LatencyProfile.lines((0, 0, 0), (0, 0, 0)).seconds, SIZES).shares == [1, 1, 1]


def test_a_stage_that_costs_nothing_is_ripe():
    free = DeepestRipe(LatencyProfile.lines((10, 0, 10), (1, 0, 1)).seconds, SIZES)
    assert choice(200, 1, 1, policy=free) == 2


def test_a_stage_that_cannot_run_is_not_chosen():
    """No slot is free for survivors of the first stage."""
    assert choice(StageView(0, 200, 0.0, math.inf), 0, 0) is None
    assert choice(StageView(0, 200, 0.0, math.inf), 1, 0) == 2


@settings(deadline=None)
@given(
    waiting=st.tuples(*[st.integers(0, 300)] * 3),
    deadlines=st.tuples(*[st.floats(0, 1e4)] * 3),
    fixed=st.tuples(*[st.floats(0, 50)] * 3),
    per_image=st.tuples(*[st.floats(0, 5)] * 3),
)
def test_it_never_idles_and_never_runs_an_empty_stage(waiting, deadlines, fixed, per_image):
    policy = DeepestRipe(LatencyProfile.lines(fixed, per_image).seconds, (16, 8, 4))
    views = [StageView(min(n, size), n, 0.0, d) for n, size, d in zip(waiting, (16, 8, 4), deadlines, strict=True)]
    stage = policy(views, 1.0)
    assert (stage is None) == (not any(waiting))
    assert stage is None or waiting[stage - 1]
