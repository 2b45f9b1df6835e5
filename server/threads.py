"""How the threads share the cores: the event loop first."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress


def step_back(niceness: int = 0) -> None:
    """Let the event loop go before this thread where cores are short: it has little to do, and everybody waits for it.

    On Linux a thread has a niceness and a policy of its own, and under SCHED_BATCH it does not push another one off its
    core as it wakes; elsewhere all threads stay equal.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + niceness))
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
