"""Post every file of a folder, however broken, and see what the server says and what it costs.

A manifest, a CSV file with the columns `path` (inside the folder) and `expect`, says what each file should get. In an
expectation the word "decode" allows a 200; "4xx", or a number like 413, allows a 4xx that is a problem document and
names its cause. Where nothing is said both are right. A 4xx of another number than those that are named is listed, and
is no failure. Normal clients ask all the while.

First the files come one by one, each with its own time and peak of memory; then several at once.

    python -m benchmarks.hostile FOLDER --manifest FOLDER/MANIFEST.csv --out
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clients import Line, Load, Reply, classify
from benchmarks.harness import Options, Report, Server, finish, load_bundle, parse, quantile_ms
from server.bench.photos import photos

CONTENT_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
}
MAX_EXTRA_MB = 300
NO_LIMIT = 10**6


def main(arguments: list[str] | None = None) -> int:
    options = parse("hostile", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(images=20)
    parser.add_argument("folder", type=Path, help="files to post, also in folders below")
    parser.add_argument("--manifest", type=Path, help="CSV with `path` and `expect`")
    parser.add_argument("--at-once", type=int, default=8, help="clients of the second pass (default %(default)s)")
    parser.add_argument("--clients", type=int, default=2, help="normal clients beside (default %(default)s)")
    parser.add_argument(
        "--alone", type=int, default=200, help="requests of the normal clients alone (default %(default)s)"
    )


@dataclass(frozen=True)
class Posted:
    path: str
    expect: str
    reply: Reply | None  # None: no answer
    peak_mb: float  # of the server, over what it had before the first file
    seconds: float

    @property
    def status(self) -> int:
        return self.reply.status if self.reply else 0

    @property
    def wrong(self) -> str:
        """What is wrong with the answer, or nothing."""
        if self.reply is None:
            return "no answer"
        if self.status == 200:
            return "" if takes_200(self.expect) else "200"
        if not 400 <= self.status < 500 or not takes_4xx(self.expect):
            return f"{self.status} {self.reply.body[:160].decode('utf-8', 'replace')}"
        return "" if _names_its_cause(self.reply) else f"{self.status} without a problem document"

    @property
    def other_number(self) -> bool:
        """Whether the expectation names numbers, and the status is another 4xx."""
        numbers = {int(number) for number in re.findall(r"\b4\d\d\b", self.expect)}
        return bool(numbers) and 400 <= self.status < 500 and self.status not in numbers


def takes_200(expect: str) -> bool:
    return not expect or re.search(r"\bdecodes?\b", expect.lower()) is not None


def takes_4xx(expect: str) -> bool:
    return not expect or re.search(r"\b4(xx|\d\d)\b", expect.lower()) is not None


def _names_its_cause(reply: Reply) -> bool:
    if reply.headers.get("content-type") != "application/problem+json":
        return False
    problem = json.loads(reply.body)
    return bool(problem.get("code")) and bool(problem.get("detail")) and problem.get("status") == reply.status


def read_manifest(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["expect"] for row in csv.DictReader(file)}


def find(folder: Path, manifest: Path | None) -> list[str]:
    """The files below `folder`, without the manifest."""
    files = (file for file in folder.rglob("*") if file.is_file() and (manifest is None or not file.samefile(manifest)))
    return sorted(file.relative_to(folder).as_posix() for file in files)


class Poster:
    """Posts files to a server."""

    def __init__(self, server: Server, folder: Path, expected: Mapping[str, str]) -> None:
        self._server = server
        self._folder = folder
        self._expected = expected
        self.base_mb = server.resident_mb()
        server.reset_peak()

    def post(self, path: str) -> Posted:
        content_type = CONTENT_TYPES.get(Path(path).suffix.lower(), "application/octet-stream")
        line = Line(self._server.port)
        began = time.monotonic()
        try:
            reply = line.ask(classify((self._folder / path).read_bytes(), content_type))
        except OSError:
            reply = None
        finally:
            line.close()
        seconds = time.monotonic() - began
        return Posted(path, self._expected.get(path, ""), reply, self._server.peak_mb() - self.base_mb, seconds)

    def one_by_one(self, paths: Sequence[str]) -> list[Posted]:
        posted = []
        for path in paths:
            self._server.reset_peak()
            posted.append(self.post(path))
        return posted

    def at_once(self, paths: Sequence[str], clients: int) -> list[Posted]:
        """Every file once, `clients` at a time."""
        self._server.reset_peak()
        left, posted, lock = iter(paths), [], threading.Lock()

        def run() -> None:
            while True:
                with lock:
                    path = next(left, None)
                if path is None:
                    return
                posted.append(self.post(path))

        threads = [threading.Thread(target=run) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return posted


def measure(options: Options) -> Report:
    report = Report("hostile")
    bundle = load_bundle(options)
    expected = read_manifest(options.manifest)
    paths = find(options.folder, options.manifest)
    missing = sorted(expected.keys() - set(paths))
    normal = [classify(file) for file in photos(options.images)]
    with Server(bundle.path, timeout_ms=30000) as server:
        with Load(server.port, normal, options.clients, options.alone) as alone:
            alone.join()
        poster = Poster(server, options.folder, expected)
        with Load(server.port, normal, options.clients, NO_LIMIT) as beside:
            posted = poster.one_by_one(paths)
        with Load(server.port, normal, options.clients, NO_LIMIT) as beside_all:
            together = poster.at_once(paths, options.at_once)
        grown_mb = server.resident_mb() - poster.base_mb
        after = server.settled()
    report.add("files", f"{len(paths)}, each posted twice", files=len(paths))
    by_expectation: dict[str, Counter[int]] = defaultdict(Counter)
    for one in posted:
        by_expectation[one.expect or "(nothing said)"][one.status] += 1
    for expect, counter in sorted(by_expectation.items()):
        statuses = ", ".join(f"{status or 'no answer'}: {number}" for status, number in sorted(counter.items()))
        report.add(f"  {expect[:60]}", statuses)
    report.figures["statuses"] = by_expectation
    worst = max(posted, key=lambda one: one.peak_mb, default=None)
    if worst is not None:
        report.add(
            "extra memory, one by one", f"at most {worst.peak_mb:.0f} MB, at {worst.path}", extra_mb=worst.peak_mb
        )
        slowest = max(posted, key=lambda one: one.seconds)
        report.add("slowest, one by one", f"{slowest.seconds:.2f} s, {slowest.path}", slowest_s=slowest.seconds)
    peak = max((one.peak_mb for one in together), default=0.0)
    report.add(f"extra memory, {options.at_once} at once", f"at most {peak:.0f} MB", extra_together_mb=peak)
    report.add("memory kept at the end", f"{grown_mb:.0f} MB", kept_mb=grown_mb)
    loads = {"alone": alone, "beside one file": beside, f"beside {options.at_once} files": beside_all}
    for what, load in loads.items():
        seconds = [asked.seconds for asked in load.asked]
        p50, p99 = quantile_ms(seconds, 0.5), quantile_ms(seconds, 0.99)
        key = what.replace(" ", "_")
        report.add(
            f"normal clients, {what}",
            f"{len(seconds)} requests, p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {1000 * max(seconds):.1f} ms",
            **{f"normal_{key}_p50_ms": p50, f"normal_{key}_p99_ms": p99, f"normal_{key}_max_ms": 1000 * max(seconds)},
        )
    everything = [*posted, *together]
    wrong = sorted({f"{one.path}: {one.wrong}" for one in everything if one.wrong})
    for line in wrong:
        report.add("  wrong", line)
    other = sorted({f"{one.path}: {one.status}" for one in everything if one.other_number})
    report.add("4xx of another number", ", ".join(other) or "none", other_numbers=other)
    report.must_be_zero("answers that were not expected", len(wrong), wrong=wrong)
    report.must_be_zero("answers 5xx", sum(one.status >= 500 for one in everything))
    report.must_be_zero("files of the manifest that are not there", len(missing), missing=missing)
    over = sum(one.peak_mb > MAX_EXTRA_MB for one in everything)
    report.must_be_zero(f"files with more than {MAX_EXTRA_MB} MB of extra memory", over)
    failed = sum(len(load.failed) for load in loads.values())
    failures = "; ".join(filter(None, (load.failures() for load in loads.values())))
    report.must_be_zero("normal requests that failed", failed, failures=failures)
    report.must_be_zero("slots in use afterwards", int(after.total("dvt_slots_in_use")))
    return report


if __name__ == "__main__":
    sys.exit(main())
