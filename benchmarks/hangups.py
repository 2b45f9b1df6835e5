"""Clients that send a whole request and hang up before the answer: they should cost nothing from then on.

Some clients connect, send a request, hang up at a random moment, and come again; beside them a few normal clients ask
all the time. Engine time spent on those that left is read from the server's own metrics: of every batch that came back,
the share of the rows whose client had gone. What such a batch cost before the hang-up is in it as well, so the figure
is an upper bound. Images that waited are dropped from the queues and cost nothing.

    taskset -c 0,1 python -m benchmarks.hangups --bundle build/t2t-vit-12 --out
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.clients import Line, Load, classify
from benchmarks.harness import Options, Report, Server, Window, finish, load_bundle, parse, quantile_ms
from benchmarks.offline import know_bundle, thresholds_for
from server.bench.photos import photos

NO_LIMIT = 10**6


def main(arguments: list[str] | None = None) -> int:
    options = parse("hangups", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hangups", type=int, default=1000, help="(default %(default)s)")
    parser.add_argument("--at-once", type=int, default=16, help="clients that hang up (default %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="normal clients beside them (default %(default)s)")
    parser.add_argument(
        "--alone", type=int, default=100, help="requests of the normal clients alone (default %(default)s)"
    )


@dataclass
class HungUp:
    """What became of the requests of those that hang up."""

    before_answer: int = 0
    after_answer: int = 0  # the answer was quicker than the hang-up
    refused: int = 0  # no connection, or it broke while sending


class Leavers:
    """Threads that share `count` hang-ups. The moment is drawn up to `patience_s` after the request's last byte."""

    def __init__(self, port: int, requests: Sequence[bytes], count: int, at_once: int, patience_s: float) -> None:
        self.done = HungUp()
        self._port = port
        self._requests = requests
        self._patience_s = patience_s
        self._numbers = iter(range(count))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(at_once)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (number := self._next()) is not None:
            chance = random.Random(number)
            line = Line(self._port)
            try:
                line.send(self._requests[number % len(self._requests)])
                time.sleep(chance.uniform(0, self._patience_s))
                answered = _readable(line)
                if chance.random() < 0.5 and line.socket is not None:  # half of them with a reset in place of a FIN
                    line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                with self._lock:
                    self.done.refused += 1
            else:
                with self._lock:
                    self.done.after_answer += answered
                    self.done.before_answer += not answered
            finally:
                line.close()

    def _next(self) -> int | None:
        with self._lock:
            return next(self._numbers, None)


def _readable(line: Line) -> bool:
    """Whether some of an answer is there."""
    assert line.socket is not None
    line.socket.setblocking(False)
    try:
        return bool(line.socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def measure(options: Options) -> Report:
    report = Report("hangups")
    bundle = load_bundle(options)
    exits = len(bundle.manifest.stages)
    files = photos(options.images)
    thresholds = thresholds_for(know_bundle(bundle, files).confidence, options.mix)
    requests = [classify(file) for file in files]
    with Server(bundle.path, timeout_ms=30000) as server:
        server.set_thresholds(thresholds)
        with Load(server.port, requests, options.clients, options.alone) as alone:
            alone.join()
        # With twice as many clients an answer takes about so much longer: then about half of them leave before it.
        patience_s = quantile_ms([asked.seconds for asked in alone.asked], 0.5) / 1000
        patience_s *= (options.at_once + options.clients) / options.clients
        before = server.snapshot()
        leavers = Leavers(server.port, requests, options.hangups, options.at_once, patience_s)
        with Load(server.port, requests, options.clients, NO_LIMIT) as beside:
            leavers.run()
        after = server.settled()
    window, done = Window(before, after), leavers.done
    engine_s = window.total("dvt_engine_seconds_total")
    lost_s = window.total("dvt_abandoned_engine_seconds_total")
    left = window.total("dvt_images_abandoned_total", reason="disconnect")
    report.add("hang-ups", str(options.hangups), hangups=options.hangups, patience_s=patience_s)
    report.add("  before the answer", str(done.before_answer), before_answer=done.before_answer)
    report.add("  after it", str(done.after_answer), after_answer=done.after_answer)
    report.add("  noticed before or while decoding", f"{window.total('dvt_requests_total', status='499') - left:.0f}")
    report.add("  noticed in a queue or a batch", f"{left:.0f}", images_abandoned=left)
    ran = [_rows_abandoned(window, stage, exits) for stage in range(1, exits + 1)]
    report.add("batch rows run for them, per stage", ", ".join(f"{rows:.0f}" for rows in ran), rows_of_leavers=ran)
    per = 1000 * lost_s / max(1, done.before_answer)
    report.add(
        "engine time on them, at most",
        f"{lost_s:.3f} s of {engine_s:.3f} s ({lost_s / engine_s:.2%}); {per:.3f} ms each that left before its answer",
        abandoned_engine_s=lost_s,
        engine_s=engine_s,
        abandoned_engine_ms_each=per,
    )
    for what, load in (("alone", alone), ("beside them", beside)):
        seconds = [asked.seconds for asked in load.asked]
        p50, p99 = quantile_ms(seconds, 0.5), quantile_ms(seconds, 0.99)
        key = what.partition(" ")[0]
        report.add(
            f"normal clients, {what}",
            f"{len(load.asked)} requests, p50 {p50:.1f} ms, p99 {p99:.1f} ms",
            **{f"normal_{key}": len(load.asked), f"normal_{key}_p50_ms": p50, f"normal_{key}_p99_ms": p99},
        )
    failures = "; ".join(filter(None, (alone.failures(), beside.failures())))
    report.must_be_zero("normal requests that failed", len(alone.failed) + len(beside.failed), failures=failures)
    report.must_be_zero("hang-ups that found no server", done.refused)
    report.must_be_zero(
        "answers 5xx", int(sum(window.total("dvt_requests_total", status=str(s)) for s in range(500, 600)))
    )
    for name in ("dvt_slots_in_use", "dvt_requests_in_flight", "dvt_held_bytes", "dvt_queue_depth"):
        report.must_be_zero(f"{name.removeprefix('dvt_').replace('_', ' ')} afterwards", int(after.total(name)))
    return report


def _rows_abandoned(window: Window, stage: int, exits: int) -> float:
    """Rows of a stage's batches whose image got no answer in the end: those that ran less those of answered images."""
    answered = sum(window.total("dvt_images_total", exit=str(exit_)) for exit_ in range(stage, exits + 1))
    return window.total("dvt_batch_images_total", stage=str(stage)) - answered


if __name__ == "__main__":
    sys.exit(main())
