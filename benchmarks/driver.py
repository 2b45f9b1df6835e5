"""What `dvt bench` can send at most, with one process and with several, beside wrk: the same requests to the same
server, which answers everybody with the same bytes and does nothing else.

    taskset -c 0,1 python -m benchmarks.driver --out

All run in turn, in every round. On few cores the server that only answers takes one of them from the senders.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.harness import HOST, Options, Report, finish, parse, process_cpu_seconds
from benchmarks.wrk import SCRIPT, require
from server.bench.ceiling import CLIENTS, answering, ceiling
from server.bench.orders import Body
from server.bench.photos import photos
from server.bench.senders import Senders

ANSWER = (
    b'{"model":"photo10-dvt","version":"3993d2658803","budget_version":1,"results":[{"predictions":[{"label":"landscape",'
    b'"class_id":9,"probability":0.78055}],"exit":1,"confidence":0.78055,"degraded":false,"gmacs":0.0218336,'
    b'"timing_ms":{"decode":0.904,"queue":0.036,"compute":1.133,"total":2.202}}]}'
)


def main(arguments: list[str] | None = None) -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seconds", type=int, default=3, help="of one run (default %(default)s)")
        parser.add_argument("--rounds", type=int, default=3, help="of all (default %(default)s)")
        parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of dvt bench (default 1 2)")

    options = parse("driver", __doc__, arguments, more)
    return finish(measure(options), options)


def measure(options: Options) -> Report:
    report = Report("driver", figures={"clients_a_process": CLIENTS})
    files = photos(options.images)
    bodies = [Body(file, "image/jpeg", (None,)) for file in files]
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for count in options.processes:
            with Senders(count, bodies) as senders:
                top = ceiling(senders, ANSWER, len(bodies), options.seconds)
            rates.setdefault(f"dvt bench, {count}", []).append(top.per_s)
            cpu.setdefault(f"dvt bench, {count}", []).append(top.cpu_us)
        per_s, cpu_us = _wrk(files, options.seconds)
        rates.setdefault("wrk", []).append(per_s)
        cpu.setdefault("wrk", []).append(cpu_us)
    for name, found in rates.items():
        key = name.replace(", ", "_").replace(" ", "_")
        report.add(
            f"{name}{'' if name == 'wrk' else ' process(es)'}",
            f"{median(found):8.0f} requests/s   {median(cpu[name]):6.1f} us of CPU a request",
            **{f"{key}_per_s": found, f"{key}_cpu_us": cpu[name]},
        )
    return report


def _wrk(files: list[bytes], seconds: int) -> tuple[float, float]:
    """Requests a second, and microseconds of CPU for each."""
    with tempfile.TemporaryDirectory(prefix="photos-") as folder, answering(ANSWER) as port:
        for number, file in enumerate(files):
            (Path(folder) / f"{number}.jpg").write_bytes(file)
        command = [require(), "-t", "1", "-c", str(CLIENTS), "-d", f"{seconds}s", "-s", str(SCRIPT)]
        url = f"http://{HOST}:{port}/classify"
        told: dict[str, float] = {}
        cpu_s = 0.0
        with subprocess.Popen(
            [*command, url, "--", folder, str(len(files))], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:  # its last words come before it ends: its CPU time can still be read
                if line.startswith("{"):
                    told = json.loads(line)
                    cpu_s = process_cpu_seconds(process.pid)
    return told["requests"] / told["seconds"], 1e6 * cpu_s / told["requests"]


if __name__ == "__main__":
    sys.exit(main())
