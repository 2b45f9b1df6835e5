"""The cascade's deadline lies before the client's, by what an answer takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from server.engines.fake import FakeEngine
from server.frontend.answer_time import AnswerTime


@pytest.mark.parametrize("scale", [0.001, 0.03])
def test_it_learns_the_time_that_nearly_all_answers_need(scale: float) -> None:
    answers, rng = AnswerTime(), np.random.default_rng(0)
    seconds = scale * rng.exponential(size=20_000)
    for one in seconds[:10_000]:
        answers.observe(one)
    late = 0
    for one in seconds[10_000:]:
        late += one > answers.seconds
        answers.observe(one)
    assert 0.005 <= late / 10_000 <= 0.02


def test_a_stall_moves_it_by_a_tenth_and_nothing_beyond_its_bounds() -> None:
    answers = AnswerTime()
    before = answers.seconds
    answers.observe(60.0)
    assert answers.seconds < 1.11 * before
    for _ in range(1000):
        answers.observe(60.0)
    assert answers.seconds == pytest.approx(0.25)
    assert answers.within(1.0) == pytest.approx(0.75)
    assert answers.within(0.1) == pytest.approx(0.05), "at most half of a request's time"
    for _ in range(20_000):
        answers.observe(0.0)
    assert answers.seconds == pytest.approx(0.0005)


async def test_a_request_is_decided_before_its_clients_time_is_over(
    served: Any, engine: FakeEngine, photo: Callable[..., bytes]
) -> None:
    for _ in range(100):
        served.service.answer_time.observe(60.0)  # answers take a quarter of a second and more
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
