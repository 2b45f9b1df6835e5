"""How the threads share the cores: the event loop first."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress


def step_back(niceness: int) -> None:
    """Let the event loop go before this thread where cores are short: it has little to do, and everybody waits for it.

    On Linux a thread has a niceness of its own, here on top of the process's; elsewhere all threads stay equal.
    (SCHED_BATCH, under which a thread pushes no other one off its core, was tried: goodput fell by 4 to 10 %.)
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + niceness))
