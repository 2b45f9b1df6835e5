"""The cascade's deadline lies before the client's, by what an answer takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engines.fake import FakeEngine
from server.frontend.answer_time import TICK_S, AnswerTime


def tell(answers: AnswerTime, waits: Iterable[float], since: float = 0.0) -> None:
    """Answers that waited so long, one after the other."""
    for number, wait in enumerate(waits):
        decided = since + 1000.0 * number
        answers.observe(decided, decided + wait)


@pytest.mark.parametrize("scale", [0.001, 0.03])
def test_it_learns_the_time_that_nearly_all_answers_need(scale: float) -> None:
    answers, rng = AnswerTime(), np.random.default_rng(0)
    seconds = scale * rng.exponential(size=20_000)
    tell(answers, seconds[:10_000])
    late, since = 0, 10_000_000.0
    for one in seconds[10_000:]:
        late += one > answers.seconds
        since += 1000.0
        tell(answers, [one], since)
    assert 0.005 <= late / 10_000 <= 0.02


def test_it_moves_within_bounds_and_takes_at_most_half_of_a_requests_time() -> None:
    answers = AnswerTime()
    tell(answers, [60.0] * 1000)
    assert answers.seconds == pytest.approx(0.25)
    assert answers.within(1.0, 0.0) == pytest.approx(0.75)
    assert answers.within(0.1, 0.0) == pytest.approx(0.05)
    tell(answers, [0.0] * 20_000, since=1_000_000.0)
    assert answers.seconds == pytest.approx(0.0005)


def test_a_stall_moves_it_by_a_tenth_however_many_answers_waited_for_it() -> None:
    answers = AnswerTime()
    tell(answers, [0.0001] * 100)
    before = answers.seconds
    for number in range(64):  # decided while the loop stood still for a second; then one after the other
        answers.observe(200_000.0 + number / 64, 200_001.0 + number / 10_000)
    tell(answers, [0.0001] * 2, since=300_000.0)
    assert before < answers.seconds < 1.11 * before


def test_answers_of_one_batch_count_by_the_last_of_them() -> None:
    answers = AnswerTime()
    for batch in range(20_000):
        for row in range(32):
            answers.observe(float(batch), batch + 0.0003 * (row + 1))
    assert answers.seconds == pytest.approx(0.0096, rel=0.15)


def test_what_a_client_has_waited_is_no_longer_left() -> None:
    answers = AnswerTime()
    tell(answers, [0.0] * 20_000)
    assert answers.within(0.2, 0.05) == pytest.approx(0.15 - answers.seconds)
    assert answers.within(0.2, 0.2 + TICK_S) <= 0


seconds = st.floats(0.0001, 100.0)


@given(timeout_s=seconds, waited_s=st.floats(0.0, 100.0), more_s=seconds, wait=st.sampled_from([0.0, 0.003, 60.0]))
def test_a_short_timeout_is_not_eaten_up_by_what_may_be_wrong(
    timeout_s: float, waited_s: float, more_s: float, wait: float
) -> None:
    answers = AnswerTime()
    tell(answers, [wait] * 100)
    within = answers.within(timeout_s, waited_s)
    assert answers.within(timeout_s, waited_s + more_s) <= within <= timeout_s
    surely_left = timeout_s - max(0.0, waited_s - TICK_S)
    if surely_left > 0:
        assert within >= 0.5 * surely_left
        if 0.5 * surely_left >= TICK_S + answers.seconds:  # there is enough: all of both ways is taken
            assert within == pytest.approx(timeout_s - waited_s - answers.seconds)
    else:
        assert within <= 0


async def test_a_request_is_decided_before_its_clients_time_is_over(
    served: Any, engine: FakeEngine, photo: Callable[..., bytes]
) -> None:
    tell(served.service.answer_time, [60.0] * 100)  # answers take a quarter of a second and more
    reserve = served.service.answer_time.seconds
    engine.gates[2].clear()
    asked = served.service.clock()
    request = asyncio.create_task(served.classify(photo(10, 10, 255), params={"timeout_ms": 2000}))
    while (deadline := served.service.scheduler.next_deadline()) is None:
        await asyncio.sleep(0)
    assert deadline <= served.service.clock() + 2.0 - reserve
    assert deadline >= asked + 2.0 - reserve
    result = (await request).json()["results"][0]
    assert (result["exit"], result["degraded"]) == (1, True)
    engine.open_gates()
