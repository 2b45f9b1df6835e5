"""`dvt serve` as a process: whatever becomes of its descriptors, and whenever a signal comes."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import httpx
import pytest

from server import process as standing
from server.bundle.manifest import Bundle

SERVE = textwrap.dedent(
    """
    import sys, logging, os
    from server import process
    process.open_standard_descriptors()
    process.raise_descriptor_limit()
    process.log_to_stderr("debug")
    from server.app import create_app
    from server.bundle.manifest import Bundle
    from server.engines.fake import FakeEngine
    from server.frontend import address, listener
    from server.settings import read_settings

    settings = read_settings({"port": int(sys.argv[2]), "state_dir": None, "profile_seconds": 0})
    bound = address.bind(settings)
    app = create_app(settings, Bundle.load(sys.argv[1]), FakeEngine(num_classes=10))
    process.say("x" * 100_000)  # more than a pipe holds
    for _ in range(2 * process.MAX_RECORDS):
        logging.getLogger("server").warning("a line that is long enough to fill any pipe soon")
    well = listener.run(app, settings, bound, lambda: process.say("listening"))
    process.leave(0 if well else 1)
    """
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def probe(port: int, process: subprocess.Popen[Any]) -> int:
    """The answer of /readyz, as soon as somebody listens."""
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code
        except httpx.TransportError:
            continue
    raise AssertionError(f"nobody listens; exit status {process.poll()}")


@pytest.fixture
def start(bundle: Bundle) -> Iterator[Callable[..., tuple[int, subprocess.Popen[bytes]]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(**options: Any) -> tuple[int, subprocess.Popen[bytes]]:
        port = free_port()
        started.append(subprocess.Popen([sys.executable, "-c", SERVE, str(bundle.path), str(port)], **options))
        return port, started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


Start = Callable[..., tuple[int, subprocess.Popen[bytes]]]


def end(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=30)


def test_it_serves_on_a_full_disk(start: Start) -> None:
    with open("/dev/full", "wb") as full:
        port, process = start(stdout=full, stderr=full)
        assert probe(port, process) == 200
        assert end(process) == 0


def test_it_serves_where_nobody_reads_what_it_says(start: Start) -> None:
    port, process = start(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert probe(port, process) == 200
    assert end(process) == 0


def test_it_serves_where_the_reader_has_left(start: Start) -> None:
    port, process = start(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    assert probe(port, process) == 200
    assert end(process) == 0


def test_it_serves_with_closed_descriptors_and_sends_no_client_what_it_says(start: Start) -> None:
    port, process = start(preexec_fn=lambda: [os.close(descriptor) for descriptor in (0, 1, 2)])
    assert probe(port, process) == 200
    assert {os.readlink(f"/proc/{process.pid}/fd/{descriptor}") for descriptor in (0, 1, 2)} == {"/dev/null"}
    assert end(process) == 0


def test_records_that_nobody_takes_are_dropped_and_counted(start: Start) -> None:
    port, process = start(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert probe(port, process) == 200  # by now the pipe and the queue are full
    stderr: BinaryIO = process.stderr  # type: ignore[assignment]
    for _ in range(1000):
        stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert b"log records were dropped: nobody took them" in stderr.read()
    assert process.wait(timeout=30) == 0


def test_the_limit_of_descriptors_is_raised(start: Start) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    port, process = start(
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
    )
    assert probe(port, process) == 200
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_ctrl_c_during_the_imports_is_one_line() -> None:
    # Before `typer` can be imported, somebody thinks better of it.
    script = textwrap.dedent(
        """
        import importlib.abc, sys

        class Meanwhile(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "typer":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Meanwhile())
        from server.__main__ import main
        main()
        """
    )
    done = subprocess.run([sys.executable, "-c", script, "serve"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted\n")


NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def test_the_first_process_of_a_container_hears_sigterm_from_its_first_moment_on() -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespaces here")
    # While `typer` is being imported, it is told to stop. What PID 1 has no handler for, the kernel does not deliver.
    script = textwrap.dedent(
        """
        import importlib.abc, os, signal, sys

        class Meanwhile(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "typer":
                    os.kill(os.getpid(), signal.SIGTERM)

        assert os.getpid() == 1
        sys.meta_path.insert(0, Meanwhile())
        import server.__main__
        print("it was not heard")
        """
    )
    done = subprocess.run([*NAMESPACE, sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


LOGGED = textwrap.dedent(
    """
    import asyncio, errno, logging, sys, warnings
    from server import process
    process.log_to_stderr(sys.argv[1])
    logging.getLogger("server.cascade").info("ours")
    for library in ("uvicorn.error", "asyncio", "python_multipart.multipart", "PIL.Image"):
        logging.getLogger(library).warning("of a client, by %s", library)
    logging.getLogger("PIL.TiffImagePlugin").error("of a client's image")
    logging.getLogger("uvicorn.error").error("Cancel %s running task(s), timeout graceful shutdown exceeded", 3)
    warnings.warn("of a client's image, as a warning")

    async def main():
        import uvloop
        from server.frontend.listener import loop_failed
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(loop_failed)
        broken = {"message": "Fatal read error", "exception": TimeoutError(errno.ETIMEDOUT, "of a client"),
                  "transport": None}
        loop.call_exception_handler(broken)

        async def cancelled():
            try:
                raise asyncio.CancelledError
            except asyncio.CancelledError as error:
                logging.getLogger("uvicorn.error").error("Exception in ASGI application, of a client", exc_info=error)
        await cancelled()
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    import uvloop
    uvloop.run(main())
    logging.getLogger("uvicorn.error").error("a bug, by uvicorn", exc_info=ValueError("inside"))
    process.leave(0)
    """
)


@pytest.mark.parametrize(("level", "told"), [("info", 0), ("warning", 0), ("error", 0), ("debug", 8)])
def test_what_a_client_can_cause_is_logged_at_debug_only_and_a_bug_always(level: str, told: int) -> None:
    done = subprocess.run([sys.executable, "-c", LOGGED, level], capture_output=True, text=True, check=True)
    assert done.stderr.count("of a client") >= told
    if not told:
        assert "of a client" not in done.stderr
        assert "Cancel" not in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "ValueError: inside" in done.stderr
    assert ("INFO server.cascade: ours" in done.stderr) == (level in ("info", "debug"))


def test_what_is_there_at_the_start_is_looked_at_no_more() -> None:
    try:
        standing.settle()
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 10_000
    finally:
        gc.unfreeze()
