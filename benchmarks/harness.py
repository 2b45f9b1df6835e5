"""What all benchmarks share: a real server process, what can be read of it from outside, options, and the report.

Loopback only. Everything that waits has a limit.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from server.bundle.manifest import EMBEDDED, Bundle

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HOST = "127.0.0.1"
START_S, STOP_S = 120.0, 60.0
PACKAGES = ("dvt-serve", "numpy", "onnxruntime", "pillow", "simplejpeg", "uvicorn", "uvloop", "fastapi")

# Of the server's threads: the name of one, the beginnings of those of the others.
LOOP_THREAD = "event-loop"
GROUPS = ("executor", "decode")

Options = argparse.Namespace


# --- options and report -----------------------------------------------------------------------------------------------


def parse(
    name: str,
    description: str | None,
    arguments: Sequence[str] | None,
    more: Callable[[argparse.ArgumentParser], object] = lambda _: None,
) -> Options:
    """The options that every benchmark has, and those that `more` adds."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="folder of the bundle; by default the embedded one")
    parser.add_argument("--images", type=int, default=200, help="distinct photos, made by code (default %(default)s)")
    parser.add_argument(
        "--mix", type=fractions, default=(0.45, 0.30, 0.25), help="fractions at the exits (default 0.45,0.30,0.25)"
    )
    parser.add_argument(
        "--out", type=Path, nargs="?", const=RESULTS, help="write <name>.json there (default benchmarks/results)"
    )
    more(parser)
    options = parser.parse_args(arguments)
    options.command = command_line(name, sys.argv[1:] if arguments is None else arguments)
    return options


def fractions(text: str) -> tuple[float, ...]:
    fractions = tuple(float(part) for part in text.split(","))
    if not np.isclose(sum(fractions), 1.0) or min(fractions) < 0:
        raise argparse.ArgumentTypeError(f"{text} does not add up to 1")
    return fractions


def command_line(name: str, arguments: Sequence[str]) -> str:
    """As it can be shown: a path of this machine is cut to its last part."""
    shown = [Path(part).name if os.path.isabs(part) else part for part in arguments]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *shown])


@dataclass
class Report:
    """The figures of one run: lines for people, values for the file, and what should never be."""

    name: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, what: str, value: str, **figures: Any) -> None:
        self.lines.append((what, value))
        self.figures |= figures

    def must_be_zero(self, what: str, count: int, **figures: Any) -> None:
        """A promise of the server: the run fails where it is broken."""
        self.add(what, f"{count}" if count == 0 else f"{count}   MUST BE 0", **figures)
        if count:
            self.broken.append(f"{what}: {count}")


def finish(report: Report, options: Options) -> int:
    """Print the table, write the file where one is wanted, give the exit status: 1 where a promise was broken."""
    width = max(len(what) for what, _ in report.lines)
    print(f"{report.name}")
    for what, value in report.lines:
        print(f"  {what:<{width}}  {value}")
    if options.out is not None:
        document = {
            "benchmark": report.name,
            "command": options.command,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "table": [list(line) for line in report.lines],
            "figures": report.figures,
            "broken": report.broken,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{report.name}.json").write_text(json.dumps(document, indent=2, default=plain) + "\n")
    return 1 if report.broken else 0


def plain(value: Any) -> Any:
    """What JSON knows of a number or an array."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(type(value).__name__)


def machine() -> dict[str, Any]:
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next((int(line.split()[1]) // 2**10 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu or platform.processor(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_mb": memory,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def failure(error: BaseException) -> str:
    """In one line, with the place."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def quantile_ms(seconds: Iterable[float], q: float) -> float:
    values = list(seconds)
    return float(np.quantile(values, q)) * 1000 if values else float("nan")


def load_bundle(options: Options) -> Bundle:
    bundle = Bundle.load(options.bundle or EMBEDDED)
    if len(options.mix) != len(bundle.manifest.stages):
        raise SystemExit(f"--mix needs {len(bundle.manifest.stages)} fractions")
    return bundle


# --- the server -------------------------------------------------------------------------------------------------------


class ServerFailed(RuntimeError):
    """It did not start, or did not stop. The message has its log."""


class Server:
    """`dvt serve` in a process of its own: `with Server(bundle, timeout_ms=30000) as server`.

    Settings come from here alone, not from the environment; the budget is kept in memory, and nothing is audited: what
    runs is what clients asked for. `module` serves in place of it, with `arguments` after the bundle.
    """

    def __init__(
        self, bundle: Path | str, module: str = "", arguments: Sequence[str] = (), root: Path = ROOT, **settings: object
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DVT_")}
        values = {"state_dir": "", "audit_fraction": 0, **settings}
        environment |= {f"DVT_{name.upper()}": str(value) for name, value in values.items()}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed at the end of the block
        serve = ["benchmarks.named_threads", "serve", *([str(bundle)] if bundle else [])]
        served = [module, str(bundle), *arguments] if module else serve
        command = [sys.executable, "-m", *served, *([] if module else ["--port", "0"])]
        self._process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.pid = self._process.pid
        self.port = 0

    def __enter__(self) -> Server:
        too_late = threading.Timer(START_S, self._process.kill)
        too_late.start()
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if line.startswith("Listening on "):
                    self.port = int(line.split()[2].rpartition(":")[2])
                    break
        finally:
            too_late.cancel()
        if not self.port or self.get("/readyz")[0] != 200:  # it says where it listens once it is warmed up
            self._process.kill()
            raise ServerFailed(f"the server did not start:\n{self.log()}")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Its exit status. It is killed where it has not ended in time; then the status is -9."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    def stop(self) -> int:
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request on a connection of its own, JSON both ways where there is JSON."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
            is_json = "json" in (answer.getheader("content-type") or "")
            return answer.status, json.loads(data) if is_json else data.decode()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        return self.request("GET", path)

    def set_thresholds(self, thresholds: Sequence[float]) -> int:
        """The version of the new budget."""
        status, state = self.request("PUT", "/budget", {"thresholds": list(thresholds)})
        if status != 200:
            raise ServerFailed(f"PUT /budget: {status} {state}")
        number: int = state["version"]
        return number

    def snapshot(self) -> Snapshot:
        status, text = self.get("/metrics")
        if status != 200:
            raise ServerFailed(f"GET /metrics: {status}")
        samples = {
            (sample.name, frozenset(sample.labels.items())): float(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return Snapshot(time.monotonic(), samples, cpu_seconds(self.pid))

    def settled(self, timeout_s: float = 30.0) -> Snapshot:
        """A snapshot once nothing is in the server any more; the last one there was at the timeout."""
        until = time.monotonic() + timeout_s
        while True:
            now = self.snapshot()
            if not now.total("dvt_requests_in_flight") + now.total("dvt_slots_in_use") or time.monotonic() > until:
                return now
            time.sleep(0.05)

    def resident_mb(self) -> float:
        return _status_mb(self.pid, "VmRSS")

    def reset_peak(self) -> None:
        """Let `peak_mb` begin anew (proc(5), clear_refs)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        return _status_mb(self.pid, "VmHWM")


@dataclass(frozen=True)
class Snapshot:
    """All metrics, and the CPU time by group of threads, at one moment."""

    at: float
    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]
    cpu: Mapping[str, float]

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name that have these labels."""
        wanted = labels.items()
        return sum(value for (found, having), value in self.samples.items() if found == name and wanted <= having)


@dataclass(frozen=True)
class Window:
    """What happened between two snapshots."""

    before: Snapshot
    after: Snapshot

    @property
    def seconds(self) -> float:
        return self.after.at - self.before.at

    def total(self, name: str, **labels: str) -> float:
        return self.after.total(name, **labels) - self.before.total(name, **labels)

    @property
    def images(self) -> float:
        return self.total("dvt_images_total")

    def exits(self, count: int) -> list[float]:
        """The fraction of the images that left at each exit."""
        return [self.total("dvt_images_total", exit=str(exit_)) / max(1, self.images) for exit_ in range(1, count + 1)]

    def fill(self, stage: int) -> float:
        """Mean images in a batch."""
        batches = self.total("dvt_batches_total", stage=str(stage))
        return self.total("dvt_batch_images_total", stage=str(stage)) / batches if batches else float("nan")

    @property
    def cpu(self) -> dict[str, float]:
        """Seconds by group of threads."""
        return {group: self.after.cpu[group] - self.before.cpu.get(group, 0.0) for group in self.after.cpu}


def process_cpu_seconds(pid: int) -> float:
    """CPU time so far of all threads, those that have ended too; in the kernel's ticks, 10 ms as a rule."""
    columns = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(columns[11]) + int(columns[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, proc(5)


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time so far by group of threads: `loop`, GROUPS, `other`."""
    groups = dict.fromkeys(("loop", *GROUPS, "other"), 0.0)
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            nanoseconds = int((task / "schedstat").read_text().split()[0])
        except OSError:  # it ended meanwhile
            continue
        known = next((group for group in GROUPS if name.startswith(group)), "other")
        groups["loop" if name == LOOP_THREAD else known] += nanoseconds / 1e9
    return groups


def _status_mb(pid: int, name: str) -> float:
    return next(int(line.split()[1]) / 1024 for line in _lines(f"/proc/{pid}/status") if line.startswith(f"{name}:"))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
