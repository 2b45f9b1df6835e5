"""This server, seen as its peers are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.clients import Line, classify
from benchmarks.harness import Server, process_cpu_seconds
from benchmarks.peers.peer import Answer, PeerFailed, Task, answer_in, proportional_mb
from server.bundle.frontier import NEVER

ABOUT = (
    "`dvt serve` as it comes, one process; nothing is audited. *full*: thresholds that no confidence reaches. "
    "*cascade*: fixed thresholds, as its peers have them. *budget*: the same operating point asked for as a mean "
    "cost, which the server keeps to where fixed thresholds come to more or less than was solved, and leaves for "
    "cheaper ones while there is too much to do. It takes the batch sizes that it finds to pay, and has no window. "
    "In open loop each request tells its deadline (`timeout_ms`); peers are told once, at their start, where they can "
    "be told at all."
)


@dataclass(frozen=True)
class Ours:
    name: str = "ours"
    modes: tuple[str, ...] = ("full", "cascade", "budget")
    about: str = ABOUT
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "image/jpeg"})

    def install(self) -> None:
        """It is what runs this."""

    def versions(self) -> dict[str, str]:
        return {}  # in the report's own list

    def start(self, task: Task, photo: bytes) -> RunningOurs:
        return RunningOurs(task, photo)


class RunningOurs:
    path = "/classify"

    def __init__(self, task: Task, photo: bytes) -> None:
        self.headers = Ours().headers
        self._stages = len(task.thresholds)
        began = time.monotonic()
        self._server = Server(task.bundle, timeout_ms=30_000).__enter__()
        try:
            self._set_operating_point(task)
            self.port, self._pid = self._server.port, self._server.pid
            line = Line(self.port)
            if line.ask(classify(photo)).status != 200:
                raise PeerFailed(f"does not answer: {self._server.log()[-600:]}")
            line.close()
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - began

    def _set_operating_point(self, task: Task) -> None:
        if task.mode == "budget":
            status, said = self._server.request("PUT", "/budget", {"gmacs": task.gmacs})
            if status != 200:
                raise PeerFailed(f"PUT /budget: {status} {said}")
        else:
            full = [*[NEVER] * (self._stages - 1), 0.0]
            self._server.set_thresholds(full if task.mode == "full" else task.thresholds)

    def body(self, jpeg: bytes) -> bytes:
        return jpeg

    def request(self, jpeg: bytes, deadline_s: float | None = None) -> bytes:
        return classify(jpeg, query="" if deadline_s is None else f"?timeout_ms={1000 * deadline_s:g}")

    def read(self, body: bytes) -> Answer:
        return answer_in(body[body.index(b'"results":[') + 11 : body.rindex(b"]")].decode())

    def log(self) -> str:
        return self._server.log()

    def cpu_s(self) -> float:
        return process_cpu_seconds(self._pid)

    def memory_mb(self) -> float:
        return proportional_mb(self._pid)

    def batches(self) -> NDArray[np.int64]:
        snapshot = self._server.snapshot()
        names = ("dvt_batches_total", "dvt_batch_images_total")
        rows = [[snapshot.total(name, stage=str(stage)) for name in names] for stage in range(1, self._stages + 1)]
        return np.array(rows, np.int64)

    def terminate(self) -> None:
        self._server.signal(15)

    def wait(self) -> tuple[float, int]:
        began = time.monotonic()
        self._server.wait()
        return time.monotonic() - began, 0

    def close(self) -> None:
        self._server.__exit__()
