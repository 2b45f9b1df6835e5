"""A DVT on a GPU, in one command and a few minutes: limits of the card, profile, throughput, correctness, the server.

    python -m benchmarks.gpu --engine torch-cuda --bundles build/gpu --minutes 4.5 --out

`--bundles` holds, for every one of `--models`, the folders MODEL-fp16 and MODEL-fp32 (the cascade) and
MODEL-alone-fp16 (its backbone alone), and `micro-fp32`: bundles, or what `benchmarks.seeded_graphs strip` leaves of
them. The embedded model is served and compared, in fp16 where a folder `photo10-fp16` is there.

What it finds is written as it goes: a part that fails leaves one line that says so, and the rest goes on. Parts run in
processes of their own, so that an illegal access, a hang or a crash of one costs no other; a part that failed takes its
process along. When the minutes are over, what has not begun is left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Options, Report, command_line, failure, machine, plain, versions
from benchmarks.seeded_graphs import fill
from server.bundle.manifest import MANIFEST

FILES = {"torch-cuda-compiled": "gpu_compiled"}  # beside the other's
ENGINES = ("torch-cuda", "torch-cuda-compiled", "tensorrt", "onnx-cuda", "fake")
MINUTES = 4.5  # for which the parts' times are meant; with fewer they shrink alike
GRACE_S = 40.0  # beyond its time, before a part is ended: engines are opened within
LAST_S = 10.0  # beyond the minutes
MODELS = ("t2t-vit-14", "t2t-vit-12")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    document = Document(options)
    until = math.inf if options.small else time.monotonic() + 60 * options.minutes
    processes = get_context("forkserver")  # every part inherits torch from a process that did nothing but import it
    processes.set_forkserver_preload(["benchmarks.gpu_parts"])
    forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        document.run("bundles", lambda report: prepare(options.bundles, Path(folder), report))
        parts = [part for part in plan(options.models) if part.name.startswith(tuple(options.only))]
        while parts:
            parts = _in_a_process(processes, options, Path(folder), parts, document, until)
    document.finish()
    return 1 if document.failed else 0


@dataclass(frozen=True)
class Part:
    """A function of `gpu_parts`, for one model or none. Parts of a group share a process, and engines."""

    function: str
    group: str
    seconds: float  # to measure for
    model: str = ""

    @property
    def name(self) -> str:
        return f"{self.function} {self.model}".strip()


def plan(models: Sequence[str]) -> list[Part]:
    """What is asked first is told first: minutes may be over, and machines go away."""
    first, *others = models
    return [
        Part("products", "limits", 8),
        Part("copies", "limits", 5),
        Part("launches", "limits", 2),
        Part("answers", "answers", 15),
        Part("shuffled", "answers", 6),
        Part("profile", first, 18, first),
        Part("shuffled", first, 3, first),
        Part("throughput", first, 32, first),
        Part("switches", first, 16, first),
        Part("state", first, 5, first),
        *(
            part
            for model in others
            for part in (Part("profile", model, 12, model), Part("throughput", model, 24, model))
        ),
        Part("pool", "pool", 8),
        Part("capped", "pool", 6),
        Part("single", "single", 10, first),
        Part("server", "server", 16),
    ]


def prepare(bundles: Path, folder: Path, report: Report) -> None:
    """Link the bundles that are whole into the folder, and fill those that were stripped."""
    stripped = []
    for bundle in sorted(path for path in bundles.iterdir() if (path / MANIFEST).exists()):
        if any(bundle.glob("*.gz")):
            stripped.append(bundle)
        else:
            (folder / bundle.name).symlink_to(bundle.resolve())
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda bundle: fill(bundle, folder / bundle.name), stripped))
    report.add("bundles", f"{', '.join(sorted(path.name for path in folder.iterdir()))}; filled: {len(stripped)}")


def _parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=ENGINES, default="torch-cuda", help="(default %(default)s)")
    parser.add_argument("--bundles", type=Path, required=True, help="folder of the bundles, see above")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="(default %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", help="batch sizes of all engines (default: each part's own)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose names begin so (default all)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that every part runs")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="write gpu.json there, as it goes")
    options = parser.parse_args(arguments)
    options.command = command_line("gpu", sys.argv[1:] if arguments is None else arguments)
    return options


class Document:
    """The file of results, and the table: written with every line that a part reports."""

    def __init__(self, options: Options) -> None:
        self._file = None if options.out is None else options.out / f"{FILES.get(options.engine, 'gpu')}.json"
        self._parts: dict[str, dict[str, Any]] = {}
        self._began = time.monotonic()
        self._document: dict[str, Any] = {
            "benchmark": "gpu",
            "command": options.command,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "engine": options.engine,
            "parts": self._parts,
        }

    @property
    def failed(self) -> list[str]:
        return [name for name, part in self._parts.items() if part["error"] or part["broken"]]

    def run(self, name: str, work: Callable[[Report], None]) -> None:
        """A part in this process."""
        self.begin(name)
        report = LiveReport(name, lambda what, value, figures: self.add(name, what, value, figures))
        try:
            work(report)
        except Exception as error:
            self.end(name, failure(error))
        else:
            self.end(name)

    def begin(self, name: str) -> None:
        self._parts[name] = {"seconds": None, "error": None, "broken": [], "table": [], "figures": {}}
        self._at = time.monotonic()
        print(f"{name}   [{time.monotonic() - self._began:.0f} s]", flush=True)

    def add(self, name: str, what: str, value: str, figures: dict[str, Any]) -> None:
        self._parts[name]["table"].append([what, value])
        self._parts[name]["figures"] |= figures
        print(f"  {what:<44}  {value}", flush=True)
        self._write()

    def break_(self, name: str, promises: list[str]) -> None:
        """What should never be, and was."""
        self._parts[name]["broken"] = promises

    def end(self, name: str, error: str | None = None) -> None:
        self._parts[name] |= {"seconds": round(time.monotonic() - self._at, 2), "error": error}
        if error:
            print(f"  {name}: {error}", flush=True)
        self._write()

    def finish(self) -> None:
        took = time.monotonic() - self._began
        self._document["seconds"] = round(took, 1)
        self._write()
        failed = f"; FAILED: {', '.join(self.failed)}" if self.failed else ""
        print(f"{len(self._parts)} parts in {took:.0f} s{failed}", flush=True)

    def _write(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_suffix(".part")
        beside.write_text(json.dumps(self._document, indent=1, default=plain) + "\n")
        os.replace(beside, self._file)


class LiveReport(Report):
    """A report whose lines are told at once."""

    def __init__(self, name: str, tell: Callable[[str, str, dict[str, Any]], None]) -> None:
        super().__init__(name)
        self._tell = tell

    def add(self, what: str, value: str, **figures: Any) -> None:
        super().add(what, value, **figures)
        self._tell(what, value, figures)


# --- a process for parts that share engines ---------------------------------------------------------------------------


def _in_a_process(
    processes: Any, options: Options, folder: Path, parts: list[Any], document: Document, until: float
) -> list[Any]:
    """Run the parts of the first one's group, as far as they go; the parts that are left to do."""
    group = [part for part in parts if part.group == parts[0].group]
    others = [part for part in parts if part.group != parts[0].group]
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_serve, args=(theirs, options, folder))
    process.start()
    theirs.close()
    try:
        while group:
            part, *rest = group
            left = until - time.monotonic()
            if left <= 0:
                document.begin(part.name)
                document.end(part.name, "left out: the minutes were over")
                group = rest
                continue
            document.begin(part.name)
            error = _follow(ours, part.name, document, min(part.seconds * scale(options) + GRACE_S, left + LAST_S))
            document.end(part.name, error)
            group = rest
            if error:
                process.kill()
                break
    finally:
        ours.close()  # it ends at that, if it still lives
        process.join(5)
        process.kill()
        process.join()
    return [*group, *others]


def scale(options: Options) -> float:
    """Of the times that parts are meant to take."""
    return min(1.0, options.minutes / MINUTES)


def _follow(pipe: Connection, name: str, document: Document, limit_s: float) -> str | None:
    """Have a part run, and take in what it reports; the error that ended it, if any."""
    until = time.monotonic() + limit_s
    try:
        pipe.send(name)
        while pipe.poll(max(0.0, until - time.monotonic())):
            kind, *content = pipe.recv()
            if kind == "ended":
                error, broken = content
                document.break_(name, broken)
                return error
            document.add(name, *content)
    except (EOFError, OSError):
        return "its process died"
    return f"ended after {limit_s:.0f} s"


def _serve(pipe: Connection, options: Options, folder: Path) -> None:
    """Run the parts that are asked for, with the engines that they share."""
    from benchmarks import gpu_parts

    with gpu_parts.Bench(options, folder) as bench:
        parts = {part.name: part for part in plan(options.models)}
        for name in _asked(pipe):
            part = parts[name]
            report = LiveReport(name, lambda what, value, figures: pipe.send(("line", what, value, figures)))
            bench.seconds = part.seconds * scale(options)
            try:
                getattr(gpu_parts, part.function)(bench, report, *([part.model] if part.model else []))
            except Exception as error:
                traceback.print_exc(limit=-6)
                pipe.send(("ended", failure(error), report.broken))
            else:
                pipe.send(("ended", None, report.broken))


def _asked(pipe: Connection) -> Iterator[str]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


if __name__ == "__main__":
    sys.exit(main())
