"""The load on a contender: closed by wrk, open by `benchmarks.open_loop`. Another driver would be exchanged here."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import wrk
from benchmarks.harness import HOST
from benchmarks.open_loop import Shot, fire
from server.bench import arrivals


@dataclass(frozen=True)
class Closed:
    answered: int  # with 200
    failed: int
    seconds: float
    p50_ms: float
    p99_ms: float


def closed(
    port: int, path: str, headers: Mapping[str, str], bodies: Sequence[bytes], clients: int, seconds: float
) -> Closed:
    """`clients` keep-alive connections that each post one body after the other, for whole seconds."""
    with tempfile.TemporaryDirectory(prefix="bodies-") as folder:
        for number, body in enumerate(bodies):
            (Path(folder) / f"{number}.jpg").write_bytes(body)
        lines = [f"{name}: {value}" for name, value in headers.items()]
        arguments = ["-t", "1", "-c", str(clients), "-d", f"{math.ceil(seconds)}s", "--timeout", "30s"]
        done = subprocess.run(
            [
                *(wrk.require(), *arguments, "-s", str(wrk.SCRIPT), f"http://{HOST}:{port}{path}"),
                *("--", folder, str(len(bodies)), *lines),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds + wrk.GIVE_UP_S,
        )
    told = json.loads(done.stdout.splitlines()[-1])
    # wrk counts every answer as a request, whatever its status.
    failed = sum(told[kind] for kind in ("connect", "read", "write", "timeout"))
    answered = told["requests"] - told["status"]
    return Closed(answered, failed + told["status"], told["seconds"], told["p50_ms"], told["p99_ms"])


def open_loop(port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int) -> list[Shot]:
    """Poisson arrivals; a latency counts from the moment that the schedule set."""
    times = arrivals.poisson(rate, seconds, seed)
    return fire(port, requests, np.random.default_rng(seed).integers(len(requests), size=len(times)), times)
