"""The driver: moments are kept whatever the server does, every request has one outcome, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from server.bench.ceiling import ceiling
from server.bench.orders import Body, Client, Log, Manners, Order, Outcome
from server.bench.senders import DriverFailed, Senders, orders_of, soon
from tests.server.bench.conftest import HANG_UP, Standing, answer, result

BODY = Body(b"x" * 2000, "image/jpeg", (None,))


def order(server: Standing, times: Any, kind: int = Client.PLAIN, **more: Any) -> Order:
    times = np.asarray(times, dtype=np.float64)
    count = max(len(times), more.get("clients", 0))
    manners = Manners(**more.pop("manners", {}))
    return Order(
        f"{server.url}/classify", soon(), times, np.zeros(count, int), np.full(count, int(kind)), manners, **more
    )


def carry_out(what: Order, processes: int = 1, body: Body = BODY) -> Log:
    with Senders(processes, [body]) as senders:
        started = replace(what, start=soon())
        return senders.carry_out(orders_of(processes, started))[0]


def counts(log: Log) -> dict[str, int]:
    return {outcome.name.lower(): n for outcome in Outcome if (n := int((log.outcome == outcome).sum()))}


def test_requests_are_sent_at_their_moments_and_all_are_answered(standing: Any) -> None:
    times = np.arange(100) / 200
    with standing() as server:
        log = carry_out(order(server, times), processes=2)
    assert np.sort(log.due).tolist() == times.tolist()
    assert counts(log) == {"answered": 100}
    assert server.asked == 100
    assert np.all(log.took >= log.late)
    assert np.all(log.late >= 0)


def _stalling(at: int, seconds: float = 1.0) -> Any:
    """Nobody is answered for so long, once request `at` has come."""
    until = [0.0]
    lock = threading.Lock()

    def say(number: int) -> Any:
        with lock:
            if number == at:
                until[0] = time.monotonic() + seconds
        time.sleep(max(0.0, until[0] - time.monotonic()))  # the server that is measured, not the test
        return answer()

    return say


def test_a_stall_is_charged_with_all_who_came_meanwhile(standing: Any) -> None:
    with standing(_stalling(50)) as server:
        log = carry_out(order(server, np.arange(200) / 100))
    waited = log.took[(log.due >= 0.5) & (log.due < 1.5)]
    assert counts(log) == {"answered": 200}
    assert np.quantile(log.took, 0.99) > 0.9
    assert 0.4 < np.median(waited) < 0.8, "half of those who came during the stall waited for more than half of it"
    assert np.median(log.late) < 0.1, "it was the server, not the driver"


def test_a_closed_loop_hides_the_same_stall(standing: Any) -> None:
    with standing(_stalling(50)) as server:
        log = carry_out(order(server, [2.0], clients=4))
    assert int((log.took > 0.5).sum()) <= 4
    assert int(log.kind.size) == server.asked


def test_fewer_clients_than_processes_are_that_many(standing: Any) -> None:
    free, together, most = threading.Lock(), [0], [0]

    def say(_: int) -> Any:
        with free:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.01)  # the server's work
        with free:
            together[0] -= 1
        return answer()

    with standing(say) as server:
        log = carry_out(order(server, [0.3], clients=1), processes=3)
    assert most == [1]
    assert len(log) == server.asked > 1


def test_every_request_has_the_outcome_that_the_server_gave_it(standing: Any) -> None:
    said = [
        answer(),
        answer(result(2)),
        (503, "overloaded"),
        (504, "deadline_exceeded"),
        (500, "engine_failed"),
        (400, "bad_image"),
        b"no JSON",
        b"[]",
        answer(result(), result()),
        {"results": [3]},
        answer(result(10**9)),
        HANG_UP,
    ]
    with standing(lambda number: said[number % len(said)]) as server:
        log = carry_out(order(server, np.arange(120) / 200), processes=2)
    assert counts(log) == {"answered": 20, "refused": 10, "expired": 10, "failed": 80}
    assert len(log) == log.planned == server.asked == server.said.total() == 120
    assert len(log.images) == 20
    assert sorted(log.errors) == [
        "bad_image", "deadline_exceeded", "engine_failed", "not an answer of /classify", "overloaded",
        "the connection was closed before the answer",
    ]  # fmt: skip
    assert np.isfinite(log.took).sum() == 110, "only those whose connection broke have no time"


def test_who_gets_no_answer_gives_up(standing: Any) -> None:
    done = threading.Event()
    with standing(lambda _: done.wait(20) and answer()) as server:
        log = carry_out(order(server, np.zeros(5), manners={"give_up_s": 0.2}))
        done.set()
    assert counts(log) == {"unanswered": 5}
    assert log.errors == ("no answer",)


def test_odd_clients_are_told_apart(standing: Any) -> None:
    done = threading.Event()
    with standing(lambda _: done.wait(20) and answer()) as server:
        left = carry_out(order(server, np.zeros(3), Client.LEAVING))
        done.set()
    assert counts(left) == {"left": 3}
    with standing(lambda _: (400, "bad_image")) as server:
        assert counts(carry_out(order(server, np.zeros(3), Client.SPOILT))) == {"rejected": 3}
        assert counts(carry_out(order(server, np.zeros(3)))) == {"failed": 3}
    with standing() as server:
        slow = carry_out(order(server, np.zeros(3), Client.SLOW, manners={"dawdle_s": 0.3}))
    assert counts(slow) == {"answered": 3}
    assert set(server.bodies) == {BODY.content}
    assert slow.took.min() >= 0.3


def test_a_server_that_goes_away_is_counted(standing: Any) -> None:
    def say(number: int) -> Any:
        if number == 30:
            server.socket.close()
        return answer() if number < 30 else HANG_UP

    with standing(say) as server:
        log = carry_out(order(server, np.arange(100) / 200))
    assert counts(log)["answered"] == 30
    assert counts(log)["failed"] == 70
    assert "connection refused" in log.errors


def test_ctrl_c_ends_the_load_and_keeps_what_was_measured(standing: Any) -> None:
    with standing() as server, Senders(2, [BODY]) as senders:

        def tick() -> None:
            if server.asked >= 20 and not stopped:
                stopped.append(server.asked)
                raise KeyboardInterrupt

        stopped: list[int] = []
        load = order(server, np.arange(6000) / 100)
        log, interrupted = senders.carry_out(orders_of(2, load), tick)
        assert interrupted
        assert counts(log) == {"answered": server.asked}
        assert 20 <= len(log) < log.planned == 6000
        again, interrupted = senders.carry_out(orders_of(2, order(server, np.arange(10) / 100)))
        assert (counts(again), interrupted) == ({"answered": 10}, False), "and another load goes on as usual"


def test_a_sender_that_is_killed_is_told_in_one_line(standing: Any) -> None:
    with standing() as server, Senders(1, [BODY]) as senders:
        (process,) = senders._processes
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(DriverFailed, match=r"has ended \(status -9\)"):
            senders.carry_out([order(server, [0.0])])


def test_the_ceiling_is_what_the_driver_can_send() -> None:
    body = b'{"results": [{"exit": 1, "predictions": [{"label": "x"}]}]}'
    with Senders(1, [BODY]) as senders:
        top = ceiling(senders, body, 1, seconds=0.3)
    assert top.per_s > 0
    assert top.cpu_us > 0


def test_ctrl_c_at_the_command_line_tells_what_was_measured(standing: Any) -> None:
    enough = threading.Event()

    def say(number: int) -> Any:
        if number == 30:
            enough.set()
        return answer()

    with standing(say) as server:
        command = [sys.executable, "-m", "server", "bench", "--url", server.url, "--seconds", "600", "--warm-up", "0"]
        bench = subprocess.Popen(
            [*command, "--distinct", "4"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert enough.wait(60)
        os.killpg(bench.pid, signal.SIGINT)  # as a terminal does: all of its processes hear it
        out, err = bench.communicate(timeout=60)
    assert bench.returncode == 130
    assert "answered in time  100.00 %" in out
    assert "Traceback" not in err
