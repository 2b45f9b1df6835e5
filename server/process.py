"""What belongs to the process and not to the server in it: descriptors, what is said on them, signals, the last exit.

Whatever becomes of stdout and stderr (a full disk, a reader that left, a pipe that nobody reads), the server serves:
log records and lines go through a bounded queue, one for each of the two, to a thread that may fail, or wait for ever.
What a queue cannot take is dropped, and counted.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import queue
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler, QueueListener
from typing import NoReturn

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MAX_RECORDS = 10_000  # that may wait to be written
FLUSH_S = 1.0  # for what is not yet written when the process ends

# Windows has no SIGHUP.
STOP = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP") if name in signal.Signals.__members__)


def open_standard_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr was closed: else the next file or socket would get its number, and
    with it whatever is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def raise_descriptor_limit() -> None:
    """As many as may be: every connection takes one, and the usual 1024 are fewer than the requests that may come."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS takes no "unlimited" here
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def importing() -> Iterator[None]:
    """What imports make stays: the garbage collector need not look through it, neither meanwhile, some two hundred
    times, nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def settle() -> None:
    """Everything is there that will stay. The garbage collector need not look at it again: some 90,000 objects, for
    which all requests would wait 30 ms and more, every few thousand of them."""
    gc.collect()
    gc.freeze()


# -- what is said


class _Descriptor(logging.Handler):
    """Writes to a descriptor, not to Python's stream of it: a write that blocks would hold the stream's lock for ever,
    also against the interpreter's end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        data = f"{self.format(record)}\n".encode(errors="backslashreplace")
        with suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]


class _Outlet(QueueHandler):
    """Takes records at once, and has a thread write them to a descriptor."""

    def __init__(self, descriptor: int, form: str) -> None:
        self._records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_RECORDS)
        super().__init__(self._records)
        self._dropped = 0
        writer = _Descriptor(descriptor)
        writer.setFormatter(logging.Formatter(form))
        QueueListener(self._records, writer).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                told = f"{self._dropped} log records were dropped: nobody took them"
                self._records.put_nowait(logging.makeLogRecord({**record.__dict__, "msg": told, "levelname": "ERROR"}))
                self._dropped = 0
            self._records.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def wait_written(self, within_s: float) -> None:
        with self._records.all_tasks_done:
            self._records.all_tasks_done.wait_for(lambda: not self._records.unfinished_tasks, within_s)


_outlets: dict[int, _Outlet] = {}  # by descriptor


def _outlet(descriptor: int, form: str) -> _Outlet:
    if descriptor not in _outlets:
        _outlets[descriptor] = _Outlet(descriptor, form)
    return _outlets[descriptor]


def say(text: str) -> None:
    """A line on stdout, best effort. Returns at once."""
    _outlet(1, "%(message)s").handle(logging.makeLogRecord({"msg": text}))


def log_to_stderr(level: str) -> None:
    """What we say, from `level` on, and the errors of libraries. What those say below that, and some that they call an
    error, is about what a client did: it is for "debug"."""
    logging.raiseExceptions = False  # it would print to stderr by another way
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.addHandler(_outlet(2, FORMAT))
    logging.getLogger("server").setLevel(level.upper())
    if level == "debug":
        root.setLevel(logging.DEBUG)
        return
    root.setLevel(logging.ERROR)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # broken images
    logging.getLogger("uvicorn.error").addFilter(_is_no_clients_fault)


def _is_no_clients_fault(record: logging.LogRecord) -> bool:
    """At the end uvicorn cancels the requests whose clients do not read, or send, on, and logs that twice."""
    cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and not str(record.msg).startswith("Cancel %s running task(s)")


def hush() -> None:
    """Keep libraries from warning of what clients send. Before the first thread starts: warnings have one filter for
    all of them. (What libraries log is `log_to_stderr`'s.)

    Pillow warns of broken EXIF blocks, APNG headers, palettes and much more, once for every text that it comes upon,
    and Python remembers every one of those texts.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.|server\.frontend\.images\Z")  # ours, where it blames who called it


# -- the end


def hear_stop(tell: Callable[[int], object]) -> None:
    """Call `tell`, in the main thread, with each signal that asks to stop: SIGTERM, Ctrl-C, and SIGHUP, which comes
    when the terminal is closed, and is left alone where it is ignored (nohup)."""

    def hear(number: int, _: object) -> None:
        tell(number)

    for number in STOP:
        if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, hear)


def leave(status: int) -> NoReturn:
    """End the process now; what was said is written as far as that takes no longer than a second.

    Not by way of the interpreter's end: that waits for threads, which may hang.
    """
    until = time.monotonic() + FLUSH_S
    for outlet in list(_outlets.values()):
        outlet.wait_written(max(0.0, until - time.monotonic()))
    os._exit(status)
