"""What is measured of one contender that runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.clients import Line, Load
from benchmarks.harness import quantile_ms
from benchmarks.open_loop import Shot
from benchmarks.peers import load
from benchmarks.peers.peer import Running

WARM_S, SETTLED_S, SETTLE_GIVE_UP_S = 2, 0.3, 15.0
LEAVERS_S, FEWEST_LEAVERS, MOST_LEAVERS = 0.5, 20, 250  # so much work, in images
NEIGHBOURS = 15
BAD = b"\xff\xd8\xff\xe0 no picture follows"
ASKING, SERVING_ON_S, HANGING_S = 8, 3.0, 5.0
CHECKING = 16
NO_LIMIT = 10**9


@dataclass(frozen=True)
class Photos:
    jpegs: Sequence[bytes]
    labels: Sequence[int]  # what is right to answer
    answers: Sequence[tuple[int, int]]  # class and exit, by the engine itself with this mode's thresholds


@dataclass(frozen=True)
class Plan:
    clients: int
    closed_s: float
    open_s: float
    loads: tuple[float, ...]  # of the contender's own capacity
    deadline_s: float


def closed_loop(running: Running, photos: Photos, plan: Plan, check: bool) -> dict[str, Any]:
    """As much as it can do, for clients that wait for their answers."""
    bodies = [running.body(jpeg) for jpeg in photos.jpegs]
    found: dict[str, Any] = {"start_s": running.start_s}

    def load_it(seconds: float) -> load.Closed:
        return load.closed(running.port, running.path, running.headers, bodies, plan.clients, seconds)

    if check:  # before any load: a budget gives way to one for a while
        found["wrong"] = wrong_answers(running, photos)
        found["bad"] = bad_image(running, photos)
    load_it(WARM_S)  # before anything counts
    cpu, batches = running.cpu_s(), running.batches()
    told = load_it(plan.closed_s)
    return found | {
        "images_per_s": told.answered / told.seconds,
        "failed": told.failed,
        "cpu_ms": 1000 * (running.cpu_s() - cpu) / max(1, told.answered),
        "closed_p50_ms": told.p50_ms,
        "closed_p99_ms": told.p99_ms,
        "fill": fill(running.batches() - batches),
        "memory_mb": running.memory_mb(),
    }


def behaviour(running: Running, photos: Photos, plan: Plan, capacity: float, seed: int) -> dict[str, Any]:
    """Clients that come regardless, in parts of its capacity (images/s); then what is unpleasant, and the stop."""
    load.open_loop(running.port, [running.request(jpeg) for jpeg in photos.jpegs], capacity / 2, 1, seed)  # warm
    settle(running)
    return {
        "levels": [open_level(running, photos, plan, level, max(1.0, capacity), seed) for level in plan.loads],
        "left": hang_ups(running, photos, capacity),
        "stop": stop_under_load(running, photos),
    }


def wrong_answers(running: Running, photos: Photos) -> int:
    """Answers that are not the engine's own: another class, or another exit. Asked many at once, so in batches."""
    requests = [running.request(jpeg) for jpeg in photos.jpegs]
    with Load(running.port, requests, min(CHECKING, len(requests)), len(requests)) as asking:
        asking.join()
    wrong = 0
    for asked in asking.asked:
        said = running.read(asked.reply.body) if asked.reply and asked.ok else None
        wrong += said is None or (said.class_id, said.exit) != photos.answers[asked.request]
    return wrong


def fill(batches: NDArray[np.int64]) -> list[float]:
    """Mean images in a batch, by stage."""
    return [float(images / count) if count else 0.0 for count, images in batches]


def settle(running: Running) -> None:
    """Until nothing runs any more: what is still in its queues must not meet what is measured next."""
    before, since, until = running.batches(), time.monotonic(), time.monotonic() + SETTLE_GIVE_UP_S
    while time.monotonic() < min(since + SETTLED_S, until):
        time.sleep(0.05)
        now = running.batches()
        if (now != before).any():
            before, since = now, time.monotonic()


def open_level(
    running: Running, photos: Photos, plan: Plan, level: float, capacity: float, seed: int
) -> dict[str, Any]:
    requests = [running.request(jpeg, plan.deadline_s) for jpeg in photos.jpegs]
    before = running.batches()
    shots = load.open_loop(running.port, requests, level * capacity, plan.open_s, seed)
    settle(running)
    answered = [shot for shot in shots if shot.status == 200]
    in_time = [shot for shot in answered if shot.seconds <= plan.deadline_s]
    said = {id(shot): running.read(shot.body) for shot in answered}
    right = [shot for shot in in_time if said[id(shot)].class_id == photos.labels[shot.request]]
    by_exit: dict[int, list[float]] = {}
    for shot in answered:
        by_exit.setdefault(said[id(shot)].exit, []).append(shot.seconds)
    return {
        "load": level,
        "rate": len(shots) / plan.open_s,
        "arrivals": len(shots),
        "answered": len(answered),
        "in_time": len(in_time) / max(1, len(shots)),
        "correct_in_time": len(right) / max(1, len(shots)),
        "p50_ms": quantile_ms([shot.seconds for shot in answered], 0.5),
        "p99_ms": quantile_ms([shot.seconds for shot in answered], 0.99),
        "p50_ms_by_exit": {exit_: quantile_ms(seconds, 0.5) for exit_, seconds in sorted(by_exit.items())},
        "behind_p99_ms": quantile_ms([shot.behind for shot in shots], 0.99),
        "statuses": statuses(shots),
        "fill": fill(running.batches() - before),
    }


def statuses(shots: Sequence[Shot]) -> dict[str, int]:
    values, counts = np.unique([shot.status for shot in shots], return_counts=True)
    return {str(value): int(count) for value, count in zip(values, counts, strict=True)}


def hang_ups(running: Running, photos: Photos, capacity: float) -> dict[str, Any]:
    """Half a second's work, asked for all at once by clients that leave at once: how many images each stage ran."""
    settle(running)
    before = running.batches()
    count = int(min(max(LEAVERS_S * capacity, FEWEST_LEAVERS), MOST_LEAVERS))
    lines = [Line(running.port) for _ in range(count)]
    for line in lines:
        line.connect()
    jpegs = [photos.jpegs[number % len(photos.jpegs)] for number in range(count)]
    for line, jpeg in zip(lines, jpegs, strict=True):
        line.send(running.request(jpeg))
    for line in lines:
        line.close()
    settle(running)
    images = (running.batches() - before)[:, 1]
    return {"left": count, "images_run": images.tolist()}


def bad_image(running: Running, photos: Photos) -> dict[str, Any]:
    """Good requests and a bad one at once, three times: who fails."""
    spoilt, statuses = 0, []
    for _ in range(3):
        replies: list[int] = [0] * (NEIGHBOURS + 1)

        def ask(number: int, jpeg: bytes, replies: list[int] = replies) -> None:
            line = Line(running.port, timeout_s=10)
            with suppress(OSError):
                replies[number] = line.ask(running.request(jpeg)).status
            line.close()

        jpegs = [*photos.jpegs[:NEIGHBOURS], BAD]
        threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(jpegs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spoilt += sum(status != 200 for status in replies[: len(jpegs) - 1])
        statuses.append(replies[len(jpegs) - 1])
    return {"spoilt": spoilt, "beside": 3 * min(NEIGHBOURS, len(photos.jpegs)), "status": statuses[-1]}


def stop_under_load(running: Running, photos: Photos) -> dict[str, Any]:
    """SIGTERM while clients ask: who had asked and got no answer, what is left behind."""
    requests = [running.request(jpeg) for jpeg in photos.jpegs]
    ended: list[tuple[float, int]] = []

    def stop() -> None:
        running.terminate()
        ended.append(running.wait())

    with Load(running.port, requests, ASKING, NO_LIMIT) as asking:
        asking.wait_for(5 * ASKING)
        stopping = threading.Thread(target=stop)
        stopping.start()
        stopping.join(SERVING_ON_S)  # who still serves by then may do so
        hanging = threading.Timer(HANGING_S, running.close)  # who neither answers nor ends is ended
        hanging.start()
    hanging.cancel()
    stopping.join()
    seconds, left = ended[0]
    lost = [asked for asked in asking.asked if asked.reply is None and "Refused" not in asked.error]
    return {
        "answered": sum(asked.ok for asked in asking.asked),
        "refused": sum(asked.reply is not None and not asked.ok for asked in asking.asked),
        "lost": len(lost),
        "seconds": seconds,
        "processes_left": left,
    }
