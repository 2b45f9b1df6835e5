"""Executor threads step back behind the event loop, each for itself."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from server.cascade.batcher import step_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux has a thread a niceness of its own")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_a_thread(*steps: int) -> int:
    found = []

    def work() -> None:
        for step in steps:
            step_back(step)
        found.append(niceness())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_that_steps_back_does_so_alone_and_from_where_the_process_is() -> None:
    before = niceness()
    assert in_a_thread(3) == min(19, before + 3)
    assert niceness() == before


def test_nobody_steps_back_further_than_there_is_room() -> None:
    assert in_a_thread(15, 15) == 19
