"""What a peer is: what it needs, how it is started, how it is asked, what it answers. And one that runs.

A peer is a table row, one file each in this package; what its server does is a file in `servers/<name>`, which runs in
an environment of the peer's own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.clients import Line
from benchmarks.harness import HOST, ROOT, process_cpu_seconds

SERVERS = Path(__file__).with_name("servers")
ENVIRONMENTS = ROOT / "build" / "peers"
START_S, STOP_S, END_S = 60.0, 8.0, 2.0

# The same runtime, decoder and arrays for all, as far as a peer's own requirements allow.
COMMON = ("onnxruntime==1.31.1", "simplejpeg==1.9.0")


class PeerFailed(RuntimeError):
    """It could not be installed, or did not start. The message says why."""


@dataclass(frozen=True)
class Task:
    """What every contender serves, and with what."""

    bundle: Path
    mode: str  # full: every image runs through all stages; cascade: as far as a peer can express it
    side: int
    thresholds: tuple[float, ...]
    gmacs: float  # what an image costs with them in the mean
    workers: int  # processes, or what a peer has in their place: one a core
    batch: int  # largest batch
    window_ms: float  # how long a batch may wait for more
    timeout_s: float  # what a peer can be told about its patience


@dataclass(frozen=True)
class Answer:
    class_id: int
    exit: int


def plain_body(jpeg: bytes) -> bytes:
    return jpeg


def plain_answer(body: bytes) -> Answer:
    """The answer as `servers/cascade.py` shapes it."""
    return _answer(json.loads(body))


def _answer(document: Any) -> Answer:
    return Answer(document["predictions"][0]["class_id"], document["exit"])


def answer_in(text: str) -> Answer:
    return _answer(json.loads(text))


class Running(Protocol):
    """A contender that runs. It has classified a photo."""

    port: int
    path: str
    headers: Mapping[str, str]
    start_s: float  # from its start to that photo's answer

    def body(self, jpeg: bytes) -> bytes: ...
    def request(self, jpeg: bytes, deadline_s: float | None = None) -> bytes: ...
    def read(self, body: bytes) -> Answer: ...
    def log(self) -> str: ...
    def cpu_s(self) -> float: ...
    def memory_mb(self) -> float: ...
    def batches(self) -> NDArray[np.int64]: ...  # (stages, 2): batches, and images in them, so far
    def terminate(self) -> None: ...
    def wait(self) -> tuple[float, int]: ...  # seconds until it has ended, processes that it left behind
    def close(self) -> None: ...


class Contender(Protocol):
    """Us, or a peer."""

    name: str
    modes: tuple[str, ...]
    about: str

    def install(self) -> None: ...
    def versions(self) -> dict[str, str]: ...
    def start(self, task: Task, photo: bytes) -> Running: ...


Command = Callable[["Peer", Task, Path, int], Sequence[str | Path]]  # with a folder of its own, and a port


@dataclass(frozen=True)
class Peer:
    name: str
    requirements: tuple[str, ...]  # pinned
    command: Command
    path: str  # where an image is posted
    about: str  # how it is set up, and what is unfair about that; for the page
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "image/jpeg"})
    body: Callable[[bytes], bytes] = plain_body
    read: Callable[[bytes], Answer] = plain_answer
    modes: tuple[str, ...] = ("full", "cascade")
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    @property
    def servers(self) -> Path:
        return SERVERS / self.name

    def request(self, jpeg: bytes, deadline_s: float | None = None) -> bytes:
        """The bytes of a whole request. No peer is told a deadline that is this request's alone."""
        del deadline_s
        body = self.body(jpeg)
        head = [f"POST {self.path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body

    def start(self, task: Task, photo: bytes) -> RunningPeer:
        return RunningPeer(self, task, photo)

    def install(self) -> None:
        """Make the environment, unless it is there. Raises PeerFailed."""
        stamp = self.environment / "installed.txt"
        wanted = "\n".join(self.requirements) + "\n"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        print(f"installing {self.name} in {self.environment.relative_to(ROOT)}", flush=True)
        shutil.rmtree(self.environment, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(self.environment)],
            [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.requirements],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
                raise PeerFailed(f"could not be installed: {' '.join(lines[-2:])[:300]}")
        stamp.write_text(wanted)

    def versions(self) -> dict[str, str]:
        """Of the packages that were asked for, as they are installed."""
        listing = subprocess.run(
            [str(self.python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
            capture_output=True,
            text=True,
            check=True,
        )
        found = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(listing.stdout)}
        names = [requirement.partition("==")[0].partition("[")[0].lower() for requirement in self.requirements]
        return {name: found.get(name, "not installed") for name in (*names, "numpy")}


class RunningPeer:
    """A peer's server. All its processes, whatever their parents, are known by a variable that they inherit."""

    def __init__(self, peer: Peer, task: Task, photo: bytes) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=f"peer-{peer.name}-")
        folder = Path(self._folder.name)
        self._counts = folder / "counts"
        self._counts.mkdir()
        self._mark = f"PEER_COUNTS={self._counts}".encode()
        self._stages = len(task.thresholds)
        self.port = free_port()
        self.path, self.headers = peer.path, peer.headers
        self.body, self.read, self.request = peer.body, peer.read, peer.request
        values = {
            "bundle": task.bundle.resolve(),
            "mode": task.mode,
            "thresholds": ",".join(map(repr, task.thresholds)),
            "side": task.side,
            "workers": task.workers,
            "batch": task.batch,
            "window_ms": task.window_ms,
            "timeout_s": task.timeout_s,
            "port": self.port,
            "counts": self._counts,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PEER_"))}
        environment |= {f"PEER_{name.upper()}": str(value) for name, value in values.items()}
        environment |= {
            "PATH": f"{peer.environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(SERVERS),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            **peer.variables,
        }
        self._log = (folder / "log").open("w+")
        began = time.monotonic()
        self._process = subprocess.Popen(
            [str(part) for part in peer.command(peer, task, folder, self.port)],
            cwd=folder,
            env=environment,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self._wait_for_answer(peer.request(photo), began)
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - began

    def _wait_for_answer(self, request: bytes, began: float) -> None:
        status = 0
        while status != 200:
            line = Line(self.port, timeout_s=30)
            try:
                status = line.ask(request).status
            except OSError:
                status = 0
            finally:
                line.close()
            if status != 200:
                if self._process.poll() is not None or time.monotonic() - began > START_S:
                    raise PeerFailed(f"did not start: {self.log()[-3000:]}")
                time.sleep(0.02)

    def log(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if self._mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return sorted({self._process.pid, *found} if self._process.poll() is None else found)

    def cpu_s(self) -> float:
        total = 0.0
        for pid in self.processes():
            with suppress(OSError):
                total += process_cpu_seconds(pid)
        return total

    def memory_mb(self) -> float:
        return sum(map(proportional_mb, self.processes()))

    def batches(self) -> NDArray[np.int64]:
        """(stages, 2): batches, and images in them, since the start; every process counts its own."""
        total = np.zeros((self._stages, 2), np.int64)
        for file in self._counts.glob("*.int64"):
            counts = np.fromfile(file, np.int64)
            if counts.size == total.size:
                total += counts.reshape(total.shape)
        return total

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[float, int]:
        began = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        seconds = time.monotonic() - began
        return seconds, len(self.processes())

    def close(self) -> None:
        self.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        until = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < until:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
        self._log.close()
        self._folder.cleanup()


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def proportional_mb(pid: int) -> float:
    """Memory of a process; what several share counts in parts (proc(5), smaps_rollup: Pss)."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
