from __future__ import annotations

import os
import sys
import threading

import pytest

from server.threads import step_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux has a thread a priority of its own")


def told_by_a_thread(*niceness: int) -> tuple[int, int]:
    found = []

    def work() -> None:
        for step in niceness:
            step_back(step)
        found.append((os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_that_steps_back_does_so_alone_and_from_where_the_process_is() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)
    assert told_by_a_thread(3) == (min(19, before[0] + 3), os.SCHED_BATCH)
    assert told_by_a_thread() == before
    assert before == (os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0))


def test_nobody_steps_back_further_than_there_is_room() -> None:
    assert told_by_a_thread(15, 15) == (19, os.SCHED_BATCH)
