"""What the service makes of the engine that it is given."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from server.bundle.manifest import Bundle
from server.engines.fake import FakeEngine
from server.service import Service
from server.settings import Settings


def service(bundle: Bundle, engine: FakeEngine, **settings: Any) -> Service:
    return Service(Settings(**{"state_dir": None, "profile_seconds": 0, **settings}), bundle, engine)


@pytest.mark.parametrize(("holds", "allowed"), [(None, 40), (12, 12), (64, 40)])
def test_no_more_states_than_the_engine_can_hold(
    bundle: Bundle, engine: FakeEngine, holds: int | None, allowed: int
) -> None:
    engine.max_slots = holds
    assert service(bundle, engine, max_slots=40).scheduler.load.max_slots == allowed


@pytest.mark.parametrize(("asked", "runs"), [(None, 3), (5, 5)])
def test_the_engine_says_how_many_batches_run_at_once_unless_it_is_told(
    bundle: Bundle, engine: FakeEngine, asked: int | None, runs: int
) -> None:
    engine.executors = 3
    made = service(bundle, engine, executors=asked)
    assert made.executors == made.machine.executors == len(made.batcher._threads) == runs
    assert orjson.loads(made.model_document)["engine"]["executors"] == runs
