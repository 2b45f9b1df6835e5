"""The whole server as users start it, with front ends: signals, deaths, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

WITHIN_S = 60.0
PHOTO = (Path(__file__).parents[4] / "docs" / "example.jpg").read_bytes()
JPEG = {"content-type": "image/jpeg"}


class Served:
    """`dvt serve` with the embedded model."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        settings = {"DVT_STATE_DIR": "", "DVT_PROFILE_SECONDS": "0", "DVT_TIMEOUT_MS": "30000", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
            start_new_session=True,
        )
        self.url = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.match(r"Listening on (\S+)", line):
                self.url = found[1]
                break

    def front_ends(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(child) for children in found for child in children.read_text().split()]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WITHIN_S)

    def ended(self) -> tuple[int, str]:
        _, log = self.process.communicate(timeout=WITHIN_S)
        return self.process.returncode, log


@pytest.fixture
def started() -> Iterator[Callable[..., Served]]:
    servers: list[Served] = []

    def start(*arguments: str, **environment: str) -> Served:
        servers.append(Served(*arguments, **environment))
        return servers[-1]

    yield start
    for server in servers:
        for pid in (*server.front_ends(), server.process.pid) if server.process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        server.process.communicate()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def until(holds: Callable[[], bool]) -> None:
    late = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < late
        time.sleep(0.01)


class Load:
    """Clients that each send one photo after the other, until the server ends its connections."""

    def __init__(self, server: Served, clients: int) -> None:
        self.statuses: list[int] = []
        self.broken: list[str] = []
        self.addresses: set[object] = set()  # that it spoke from
        self._server = server
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with self._server.client() as http:
            while True:
                try:
                    with http.stream("POST", "/classify", content=PHOTO, headers=JPEG) as answer:
                        self.addresses.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
                        answer.read()
                except httpx.ConnectError:
                    return  # nobody listens any more
                except httpx.TransportError as error:
                    self.broken.append(repr(error))
                    return
                self.statuses.append(answer.status_code)
                if answer.status_code == 503:
                    return

    @property
    def cut_off(self) -> bool:
        """Of one client: its connection has ended, within a request or between two."""
        return bool(self.broken) or len(self.addresses) > 1

    def join(self) -> None:
        for thread in self._threads:
            thread.join(WITHIN_S)
            assert not thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_fails_no_request_and_leaves_nothing_behind(
    started: Callable[..., Served], number: signal.Signals
) -> None:
    server = started("--frontends", "2")
    front_ends = server.front_ends()
    assert len(front_ends) == 2
    load = Load(server, 6)
    until(lambda: len(load.statuses) > 30)
    os.killpg(server.process.pid, number)  # as a terminal, and a service manager, sends it: to all of them
    status, log = server.ended()
    load.join()
    assert (status, load.broken) == (0, [])
    assert set(load.statuses) <= {200, 503}
    assert log.count("stopping") == 1
    assert not re.search("ERROR|CRITICAL|Traceback", log), log
    until(lambda: all(gone(pid) for pid in front_ends))


def test_when_the_engines_process_is_killed_its_front_ends_end_and_the_address_is_free(
    started: Callable[..., Served],
) -> None:
    server = started("--frontends", "2")
    front_ends = server.front_ends()
    load = Load(server, 4)
    until(lambda: len(load.statuses) > 10)
    server.process.kill()
    load.join()
    assert set(load.statuses) <= {200, 500, 503}
    until(lambda: all(gone(pid) for pid in front_ends))
    port = server.url.rpartition(":")[2]
    server.process.communicate()
    again = started("--port", port, "--frontends", "1")
    assert again.url == server.url
    with again.client() as http:
        assert http.post("/classify", content=PHOTO, headers=JPEG).status_code == 200


def test_a_front_end_whose_loop_hangs_does_not_outlive_the_engines_process(started: Callable[..., Served]) -> None:
    server = started("--frontends", "1")
    (pid,) = server.front_ends()
    os.kill(pid, signal.SIGSTOP)
    server.process.kill()
    os.kill(pid, signal.SIGCONT)
    until(lambda: gone(pid))


def test_a_front_end_that_is_killed_under_load_breaks_its_own_connections_alone(
    started: Callable[..., Served],
) -> None:
    server = started("--frontends", "2")
    victim, other = server.front_ends()
    loads: list[Load] = []
    while not (connections(victim, server.url) and connections(other, server.url)):  # both take some, in the end
        loads.append(Load(server, 1))
        until(lambda: len(loads[-1].statuses) > 1)
    mine = connections(victim, server.url)
    os.kill(victim, signal.SIGKILL)
    until(lambda: sum(load.cut_off for load in loads) == mine)
    seen = [len(load.statuses) for load in loads]
    until(lambda: all(load.broken or len(load.statuses) > at for load, at in zip(loads, seen, strict=True)))
    until(lambda: len(server.front_ends()) == 2)
    with server.client() as http:

        def restarts() -> float:
            (line,) = re.findall(r"^dvt_frontend_restarts_total (\S+)$", http.get("/metrics").text, re.M)
            return float(line)

        until(lambda: restarts() == 1)
        assert http.get("/readyz").status_code == 200
    assert sum(load.cut_off for load in loads) == mine
    broken = [load.broken for load in loads]
    server.process.send_signal(signal.SIGTERM)
    status, _ = server.ended()
    assert status == 0
    for load in loads:
        load.join()
        assert set(load.statuses) <= {200, 503}
    assert [load.broken for load in loads] == broken


def connections(pid: int, url: str) -> int:
    """Of clients, that this process holds."""
    port = httpx.URL(url).port
    held = {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]
    return sum(f"socket:[{inode}]" in held for inode in established)
