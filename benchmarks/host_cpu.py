"""Host CPU per request, and where it goes: by thread, and inside the threads by what their Python code is doing.

Two loads of the same kind, one after the other. In the first the kernel's own count of CPU time is read for each
thread. In the second py-spy, where it is installed, samples the threads' stacks; its shares are applied to the first
load's microseconds, so that what sampling costs is not counted.

    taskset -c 0,1 python -m benchmarks.host_cpu --out
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import wrk
from benchmarks.harness import GROUPS, LOOP_THREAD, Options, Report, Server, finish, load_bundle, parse
from benchmarks.offline import know_bundle, thresholds_for
from server.bench.photos import photos

SAMPLES_PER_S = 250

# What a stack frame says of the work under way: the innermost frame that one of these fits decides. (function, file):
# parts of a frame as py-spy shows it, `function (path/of/file.py)`.
Buckets = Sequence[tuple[str, str]]
LOOP: Buckets = (
    ("metrics", r"server/metrics|prometheus_client"),
    ("budget", r"server/budget/"),
    ("batcher", r"server/(cascade/|core)"),
    ("decoding", r"server/frontend/images|PIL/|simplejpeg"),
    ("decode hand-over", r"server/frontend/decoding"),
    ("reading the body", r"server/frontend/bodies|multipart"),
    ("answer", r"^(shape_answer|predictions|json_response) |orjson|starlette/responses"),
    ("HTTP protocol", r"server/frontend/(listener|connection|framing)|uvicorn"),
    ("route and edge", r"server/(frontend/|service|app)|starlette|fastapi"),
    ("asyncio, uvloop", r"asyncio|uvloop"),
)
EXECUTOR: Buckets = (
    ("onnxruntime", r"onnxruntime"),
    ("engine: gather, slots", r"server/engines/|numpy"),
    ("batcher", r"server/(cascade/|core)"),
)
DECODE: Buckets = (
    ("Pillow and libjpeg", r"PIL/|simplejpeg|^(_decode_\w+|decode) .*server/frontend/images"),
    ("header checks", r"server/frontend/images"),
    ("decode threads", r"server/frontend/decoding"),
)
BUCKETS = {"loop": LOOP, "executor": EXECUTOR, "decode": DECODE}


def main(arguments: list[str] | None = None) -> int:
    options = parse("host_cpu", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=32, help="connections (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each of both loads (default %(default)s)")
    parser.add_argument(
        "--settle", type=float, default=wrk.SETTLE_S, help="before anything counts (default %(default)s)"
    )


def measure(options: Options) -> Report:
    wrk.require()
    report = Report("host_cpu")
    bundle = load_bundle(options)
    files = photos(options.images)
    thresholds = thresholds_for(know_bundle(bundle, files).confidence, options.mix)
    with Server(bundle.path, timeout_ms=30000) as server, wrk.Driver(files) as driver:
        server.set_thresholds(thresholds)
        load = driver.load(server, options.clients, options.seconds, options.settle)
        sampler = Sampler.start(server.pid, options.settle, options.seconds)
        second = driver.load(server, options.clients, options.seconds, options.settle) if sampler else None
        shares = sampler.finish() if sampler else {}
    window, images = load.window, max(1.0, load.window.images)
    report.add("bundle", bundle.manifest.name, images_per_s=load.images_per_s, p50_ms=load.p50_ms)
    report.add("throughput", f"{load.images_per_s:.1f} images/s, {options.clients} clients, p50 {load.p50_ms:.1f} ms")
    fills = [window.fill(stage) for stage in range(1, len(bundle.manifest.stages) + 1)]
    report.add("mean batch fill", ", ".join(f"{fill:.2f}" for fill in fills), fills=fills)
    micros = {group: 1e6 * spent / images for group, spent in window.cpu.items()}
    engine_wall = 1e6 * window.total("dvt_engine_seconds_total") / images
    report.add(
        "CPU per request", f"{sum(micros.values()):8.0f} us", cpu_us=sum(micros.values()), cpu_us_by_thread=micros
    )
    split: dict[str, dict[str, float]] = defaultdict(dict)
    for group, us in micros.items():
        report.add(f"  {_TITLES[group]}", f"{us:8.0f} us")
        for bucket, share in sorted(shares.get(group, {}).items(), key=lambda item: -item[1]):
            split[group][bucket] = us * share
            report.add(f"      {bucket}", f"{us * share:8.0f} us")
    host = sum(micros.values()) - micros["executor"]
    report.add("CPU outside of the executors", f"{host:8.0f} us", host_cpu_us=host, cpu_us_by_part=split)
    report.add("engine, wall time", f"{engine_wall:8.0f} us", engine_wall_us=engine_wall)
    report.add(
        "driver (wrk)", f"{1e6 * load.driver_cpu_s / images:8.0f} us", driver_cpu_us=1e6 * load.driver_cpu_s / images
    )
    report.add(
        "parts by", "py-spy" if shares else (sampler.failure if sampler else "threads only: py-spy is not installed")
    )
    report.must_be_zero("failed requests", load.failed + (second.failed if second else 0))
    return report


_TITLES = {
    "loop": "event loop",
    "executor": "executors (engine)",
    "decode": "decoding threads",
    "other": "other threads",
}


class Sampler:
    """py-spy on a process."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self._process = process
        self._output = output
        self.failure = ""

    @classmethod
    def start(cls, pid: int, settle_s: float, seconds: float) -> Sampler | None:
        """Sampling begins on its own once the load is steady. None where py-spy is not installed."""
        beside = Path(sys.executable).with_name("py-spy")
        command = str(beside) if beside.exists() else shutil.which("py-spy")
        if command is None:
            return None
        output = Path(tempfile.mkstemp(prefix="samples-")[1])
        arguments = [command, "record", "--pid", str(pid), "--format", "raw", "--threads", "--output", str(output)]
        arguments += ["--rate", str(SAMPLES_PER_S), "--duration", str(max(1, round(seconds)))]
        delayed = [sys.executable, "-c", _DELAYED, str(settle_s), *arguments]
        process = subprocess.Popen(delayed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return cls(process, output)

    def finish(self) -> dict[str, dict[str, float]]:
        """Of each group of threads, the shares of its buckets. Empty where sampling failed: see `failure`."""
        try:
            _, complaint = self._process.communicate(timeout=wrk.GIVE_UP_S)
            text = self._output.read_text()
        finally:
            self._process.kill()
            self._output.unlink(missing_ok=True)
        if not text:
            self.failure = f"threads only: py-spy failed: {' '.join(complaint.split())[-120:]}"
        return shares(text)


# Started as a process that sleeps and then becomes py-spy: nothing of ours runs beside the load.
_DELAYED = "import os, sys, time; time.sleep(float(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"


def shares(stacks: str) -> dict[str, dict[str, float]]:
    """From py-spy's raw format, `thread;outermost;...;innermost count` a line, to shares by group and bucket."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        if group := _group(thread):
            counts[group][bucket_of(frames, BUCKETS[group])] += int(count)
    return {group: _normalised(counter) for group, counter in counts.items()}


def bucket_of(frames: Sequence[str], buckets: Buckets) -> str:
    """That of the innermost frame that has one."""
    for frame in reversed(frames):
        for bucket, pattern in buckets:
            if re.search(pattern, frame):
                return bucket
    return "other"


def _group(thread: str) -> str | None:
    name = re.sub(r"^thread \(\w+\): ", "", thread)
    return "loop" if name.startswith(LOOP_THREAD) else next((group for group in GROUPS if name.startswith(group)), None)


def _normalised(counter: Mapping[str, int]) -> dict[str, float]:
    total = sum(counter.values())
    return {bucket: count / total for bucket, count in counter.items()}


if __name__ == "__main__":
    sys.exit(main())
