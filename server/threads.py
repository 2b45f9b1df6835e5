"""How the threads share the cores: the event loop first."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress


def step_back(niceness: int) -> None:
    """Let the event loop go before this thread where cores are short: it has little to do, and everybody waits for it.

    On Linux a thread has a niceness of its own; elsewhere all threads stay equal.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
