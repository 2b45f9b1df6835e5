"""Load by wrk (https://github.com/wg/wrk): a driver that nobody here wrote, and that takes next to no CPU."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import HOST, Server, Snapshot, Window, process_cpu_seconds

SCRIPT = Path(__file__).with_name("post.lua")
SETTLE_S = 2.0  # from an empty server to a steady state, before anything is counted
TAIL_S = 0.3  # the load goes on until after the last reading
GIVE_UP_S = 60.0


@dataclass(frozen=True)
class Loaded:
    """A load's steady part, as the server counted it, and all of the load, as wrk saw it."""

    window: Window
    requests: int  # answered, from wrk's start to its end
    failed: int  # answered with an error, or not at all
    p50_ms: float
    p99_ms: float
    driver_cpu_s: float  # of wrk, in the window

    @property
    def images_per_s(self) -> float:
        return self.window.images / self.window.seconds


def require() -> str:
    """The command. Exits with a hint where it is not installed."""
    if (found := shutil.which("wrk")) is None:
        raise SystemExit("wrk is needed and not installed: apt-get install wrk (Debian, Ubuntu), brew install wrk")
    return found


class Driver:
    """Posts these files in turn: `with Driver(files) as driver`."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._command = require()
        self._count = len(files)
        self._folder = tempfile.TemporaryDirectory(prefix="photos-")
        for number, file in enumerate(files):
            (Path(self._folder.name) / f"{number}.jpg").write_bytes(file)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def load(self, server: Server, clients: int, seconds: float, settle_s: float = SETTLE_S) -> Loaded:
        """Keep `clients` keep-alive connections busy; look at `seconds` of it, once it is steady."""
        duration = math.ceil(settle_s + seconds + TAIL_S)  # wrk takes whole seconds
        process = subprocess.Popen(
            [
                *(self._command, "-t", "1", "-c", str(clients), "-d", f"{duration}s", "--timeout", "30s"),
                *(
                    "-s",
                    str(SCRIPT),
                    f"http://{HOST}:{server.port}/classify",
                    "--",
                    self._folder.name,
                    str(self._count),
                ),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            time.sleep(settle_s)
            before, cpu_before = server.snapshot(), process_cpu_seconds(process.pid)
            time.sleep(seconds)
            after, cpu_after = server.snapshot(), process_cpu_seconds(process.pid)
            output, _ = process.communicate(timeout=GIVE_UP_S)
        finally:
            process.kill()
        return _loaded(before, after, output, cpu_after - cpu_before)


def _loaded(before: Snapshot, after: Snapshot, output: str, cpu_s: float) -> Loaded:
    told = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    failed = sum(told[kind] for kind in ("status", "connect", "read", "write", "timeout"))
    return Loaded(Window(before, after), told["requests"], failed, told["p50_ms"], told["p99_ms"], cpu_s)
