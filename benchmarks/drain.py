"""SIGTERM under load: every request that was sent in full while the server listened must get an answer.

Half of the clients keep their connection, half make a new one for each request. Some time into the load the server is
told to end; the clients go on until they find nobody. An answer is an answer, 200 or 503; a reset or an end of the
connection in its place is what must not be. Several trials, each with a new server.

Until when the socket listened is read from the kernel's table of sockets, so no connection is made to find out. Counted
apart are requests sent later, and those on a new connection that was reset in the moment in which the socket closed:
the kernel had taken the connection, and perhaps the request, but the server had not accepted it yet.

    taskset -c 0,1 python -m benchmarks.drain --bundle build/t2t-vit-12 --out
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.clients import Line, classify
from benchmarks.harness import STOP_S, Options, Report, Server, finish, load_bundle, parse
from benchmarks.offline import know_bundle, thresholds_for
from server.bench.photos import photos

LISTEN = "0A"  # of the state column
POLL_S = 0.001
AFTER_503_S = 0.05  # less patient than Retry-After asks for, so that many requests meet the closing socket
MOMENT_S = 0.05  # a reset takes no time on loopback; the client's threads may need some to see it


def main(arguments: list[str] | None = None) -> int:
    options = parse("drain", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="(default %(default)s)")
    parser.add_argument("--answers", type=int, default=100, help="answers before SIGTERM (default %(default)s)")
    parser.add_argument("--drain-delay", type=float, default=0.0, help="DVT_DRAIN_DELAY_S (default %(default)s)")


@dataclass(frozen=True, slots=True)
class Sent:
    """One request that was sent in full: when its last byte was handed to the kernel, and what came."""

    at: float
    ended: float
    status: int  # 0: nothing
    new: bool  # the first request of its connection
    error: str = ""


class Crowd:
    """Clients that ask until they find no server."""

    def __init__(self, port: int, files: Sequence[bytes], clients: int) -> None:
        self.sent: list[Sent] = []
        self.not_sent = 0  # the connection was refused, or ended before the last byte
        self._port = port
        self._keeping = [classify(file) for file in files]
        self._closing = [classify(file, close=True) for file in files]
        self._numbers = count()
        self._change = threading.Condition()
        self._give_up = float("inf")
        self.threads = [threading.Thread(target=self._run, args=(n % 2 == 0,)) for n in range(clients)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def wait_for(self, answers: int) -> None:
        with self._change:
            self._change.wait_for(lambda: len(self.sent) >= answers, STOP_S)

    def join(self, timeout_s: float) -> None:
        """Until all have found nobody, or the time is over."""
        self._give_up = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.join()

    def _run(self, keeps: bool) -> None:
        requests = self._keeping if keeps else self._closing
        line = Line(self._port)
        while time.monotonic() < self._give_up:
            fresh = line.socket is None
            try:
                line.send(requests[next(self._numbers) % len(requests)])
            except OSError:
                line.close()
                self.not_sent += 1
                if fresh:  # nobody there; on a kept connection it is worth another try, as any client would
                    return
                continue
            at = time.monotonic()
            status, error = 0, ""
            try:
                status = line.receive().status
            except OSError as cause:
                error = f"{type(cause).__name__}: {cause}, {'new' if fresh else 'kept'} connection"
            sent = Sent(at, time.monotonic(), status, fresh, error)
            with self._change:
                self.sent.append(sent)
                self._change.notify_all()
            if status == 503:
                time.sleep(AFTER_503_S)
        line.close()


class Watch:
    """When a port was last seen to listen, and first seen not to."""

    def __init__(self, port: int) -> None:
        self.listened_until = time.monotonic()
        self.closed_by = float("inf")
        self._local = f":{port:04X}"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            if not self._listens():
                self.closed_by = time.monotonic()
                return
            self.listened_until = now  # taken before the look: no later than what was seen
            if self._stopping.wait(POLL_S):
                return

    def _listens(self) -> bool:
        for line in Path("/proc/net/tcp").read_text().splitlines():
            columns = line.split()
            if columns[3] == LISTEN and columns[1].endswith(self._local):
                return True
        return False


def judge(sent: Sent, listened_until: float, closed_by: float) -> str:
    """One of `answered`, `in_backlog` (see the module's docstring), `late`, and `unanswered`, which must not be."""
    if sent.status:
        return "answered"
    if sent.new and listened_until <= sent.ended <= closed_by + MOMENT_S:
        return "in_backlog"
    return "late" if sent.at > listened_until else "unanswered"


@dataclass(frozen=True)
class Trial:
    answers: Counter[int]  # by status, all
    after_signal: Counter[int]  # by status, of requests sent after SIGTERM
    unanswered: list[str]  # sent in full while the server listened
    late: int  # unanswered, but sent after the socket had closed
    in_backlog: int  # reset with the socket, before the server had accepted the connection
    not_sent: int
    exit_status: int
    took_s: float  # from SIGTERM to the end of the process


def trial(bundle: Path, files: Sequence[bytes], thresholds: Sequence[float], options: Options) -> Trial:
    with Server(bundle, timeout_ms=30000, drain_delay_s=options.drain_delay) as server:
        server.set_thresholds(thresholds)
        crowd = Crowd(server.port, files, options.clients)
        crowd.start()
        crowd.wait_for(options.answers)
        watch = Watch(server.port)
        signalled = time.monotonic()
        server.signal(signal.SIGTERM)
        exit_status = server.wait()
        took_s = time.monotonic() - signalled
        crowd.join(STOP_S)
        watch.stop()
    kinds = [(judge(sent, watch.listened_until, watch.closed_by), sent) for sent in crowd.sent]
    number = Counter(kind for kind, _ in kinds)
    return Trial(
        answers=Counter(sent.status for sent in crowd.sent if sent.status),
        after_signal=Counter(sent.status for sent in crowd.sent if sent.status and sent.at > signalled),
        unanswered=[
            f"{s.error}, {s.ended - signalled:+.3f} s from SIGTERM" for kind, s in kinds if kind == "unanswered"
        ],
        late=number["late"],
        in_backlog=number["in_backlog"],
        not_sent=crowd.not_sent,
        exit_status=exit_status,
        took_s=took_s,
    )


def measure(options: Options) -> Report:
    report = Report("drain")
    bundle = load_bundle(options)
    files = photos(options.images)
    thresholds = thresholds_for(know_bundle(bundle, files).confidence, options.mix)
    trials = [trial(bundle.path, files, thresholds, options) for _ in range(options.trials)]
    answers = sum((one.answers for one in trials), Counter[int]())
    after = sum((one.after_signal for one in trials), Counter[int]())
    unanswered = [error for one in trials for error in one.unanswered]
    report.add("trials", str(len(trials)), trials=len(trials), drain_delay_s=options.drain_delay)
    report.add("answers", _counts(answers), answers=answers)
    report.add("  to requests sent after SIGTERM", _counts(after), after_signal=after)
    took = [one.took_s for one in trials]
    report.add("from SIGTERM to the end", f"{min(took):.2f} to {max(took):.2f} s", took_s=took)
    late, not_sent = sum(one.late for one in trials), sum(one.not_sent for one in trials)
    in_backlog = sum(one.in_backlog for one in trials)
    report.add("reset with the socket, not yet accepted", str(in_backlog), in_backlog=in_backlog)
    report.add("unanswered, sent after the socket had closed", str(late), late=late)
    report.add("not sent: refused, or cut before the last byte", str(not_sent), not_sent=not_sent)
    for error in unanswered[:5]:
        report.add("  unanswered", error)
    report.must_be_zero("accepted requests without an answer", len(unanswered), unanswered=unanswered)
    report.must_be_zero("answers other than 200 and 503", sum(n for s, n in answers.items() if s not in (200, 503)))
    report.must_be_zero("servers that did not end well", sum(one.exit_status != 0 for one in trials))
    return report


def _counts(counter: Counter[int]) -> str:
    return ", ".join(f"{status}: {number}" for status, number in sorted(counter.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
