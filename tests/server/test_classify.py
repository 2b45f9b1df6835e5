"""`dvt classify` of many images: what some of them, or the server, may do to the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import struct
import sys
import termios
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from server.client import Client, ClientError

MODEL = {"labels": ["cat", "träd", "\x1b[31mred"], "stages": [{"gmacs": 0.01}, {"gmacs": 0.03}]}
ANSWER = {
    "results": [
        {
            "predictions": [{"label": "träd", "class_id": 1, "probability": 0.9}],
            "exit": 1,
            "confidence": 0.9,
            "degraded": False,
            "gmacs": 0.01,
            "timing_ms": {"decode": 1.0, "queue": 1.0, "compute": 1.0, "total": 3.0},
        }
    ]
}


def http(status: int, body: Any, headers: Mapping[str, str] | None = None) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{name}: {value}" for name, value in {"content-length": len(content), **(headers or {})}.items()]
    return f"HTTP/1.1 {status} so\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def problem(status: int, code: str, headers: Mapping[str, str] | None = None) -> bytes:
    return http(status, {"status": status, "code": code, "detail": f"it is {code}"}, headers)


Says = Callable[[bytes], Awaitable[bytes | None]]


class Scripted:
    """A server that says of an image what a test wants said: an answer, or None, which hangs up. `asked`: the bodies
    that it was sent, `at_once`: the most that it held at the same time."""

    def __init__(self, says: Says) -> None:
        self._says = says
        self.alive = True
        self.asked: list[bytes] = []
        self.held = self.at_once = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = next((int(line[15:]) for line in head.splitlines() if line.startswith("content-length:")), 0)
                answer = await self._answer(head.split()[1], await reader.readexactly(length))
                if answer is None:
                    return
                writer.write(answer)
                await writer.drain()

    async def _answer(self, path: str, body: bytes) -> bytes | None:
        if path == "/model":
            return http(200, MODEL)
        if path == "/livez":
            return http(200, {"status": "alive"}) if self.alive else None
        self.asked.append(body)
        self.held += 1
        self.at_once = max(self.at_once, self.held)
        try:
            return await self._says(body)
        finally:
            self.held -= 1


@contextlib.asynccontextmanager
async def scripted(says: Says) -> AsyncIterator[tuple[str, Scripted, asyncio.Server]]:
    script = Scripted(says)
    server = await asyncio.start_server(script.connection, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", script, server


async def fine(_: bytes) -> bytes:
    return http(200, ANSWER)


def dvt_arguments(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server", *arguments]


Ask = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def ask(dvt: Callable[..., tuple[int, str, str]]) -> Ask:
    """`await ask("classify", ...)`: exit status, stdout, stderr of a command that asks a server in this process."""

    async def run(*arguments: str) -> tuple[int, str, str]:
        return await asyncio.to_thread(dvt, *arguments)

    return run


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., list[str]]:
    """`images("a", "b")`: files of these names that hold them."""

    def write(*names: str) -> list[str]:
        paths = [tmp_path / name for name in names]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(os.fsencode(path.name))
        return list(map(str, paths))

    return write


Images = Callable[..., list[str]]


async def test_what_cannot_be_classified_does_not_keep_the_others_from_it(
    ask: Ask, images: Images, tmp_path: Path
) -> None:
    refusals = {b"bad": (400, "bad_image"), b"big": (413, "body_too_large"), b"odd": (415, "unsupported_media_type")}

    async def says(body: bytes) -> bytes:
        return problem(*refusals[body]) if body in refusals else http(200, ANSWER)

    given = images("a", "bad", "big", "b", "odd", "c")
    given.insert(1, str(tmp_path / "missing"))
    async with scripted(says) as (url, _, _):
        status, out, err = await ask("classify", *given, "--url", url)
        assert status == 1
        assert [line.split()[0] for line in out.splitlines()[:4]] == ["image", "a", "b", "c"]
        assert out.splitlines()[5].startswith("7 images: 3 answered, 3 at exit 1, mean 0.01 GMAC; 4 failed (")
        assert err.splitlines() == [
            f"Error: {tmp_path}/missing: no such file or directory",
            f"Error: {tmp_path}/bad: it is bad_image (bad_image)",
            f"Error: {tmp_path}/big: it is body_too_large (body_too_large)",
            f"Error: {tmp_path}/odd: it is unsupported_media_type (unsupported_media_type)",
        ]

        status, out, json_err = await ask("classify", *given, "--url", url, "--json")
        assert (status, json_err) == (1, err)
        assert [json.loads(line)["image"][-1] for line in out.splitlines()] == ["a", "b", "c"]


async def test_a_busy_server_is_asked_again(ask: Ask, images: Images) -> None:
    refused = 0

    async def says(body: bytes) -> bytes:
        nonlocal refused
        if body == b"b" and refused < 3:
            refused += 1
            return problem(503, "overloaded", {"retry-after": "0"})
        return http(200, ANSWER)

    async with scripted(says) as (url, script, _):
        status, out, err = await ask("classify", *images("a", "b", "c"), "--url", url)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["a", "b", "c"]
    assert script.asked.count(b"b") == 4


@pytest.mark.parametrize("retry_after", ["0", "3600"])
async def test_but_not_for_ever_and_not_after_an_hour(ask: Ask, images: Images, retry_after: str) -> None:
    async def says(body: bytes) -> bytes:
        if body == b"b":
            return problem(503, "overloaded", {"retry-after": retry_after})
        return http(200, ANSWER)

    async with scripted(says) as (url, script, _):
        status, out, err = await ask("classify", *images("a", "b", "c"), "--url", url)
    assert (status, err.count("\n")) == (1, 1)
    assert "it is overloaded (overloaded)" in err
    assert "3 images: 2 answered" in out
    assert script.asked.count(b"b") == (8 if retry_after == "0" else 1)


async def test_a_lost_connection_is_made_anew(ask: Ask, images: Images) -> None:
    lost = False

    async def says(body: bytes) -> bytes | None:
        nonlocal lost
        if body == b"b" and not lost:
            lost = True
            return None
        return http(200, ANSWER)

    async with scripted(says) as (url, _, _):
        status, out, err = await ask("classify", *images("a", "b", "c"), "--url", url)
    assert (status, err) == (0, "")
    assert "3 images: 3 answered" in out


async def test_an_image_that_always_loses_it_fails_alone(ask: Ask, images: Images) -> None:
    async def says(body: bytes) -> bytes | None:
        return None if body == b"b" else http(200, ANSWER)

    async with scripted(says) as (url, _, _):
        status, out, err = await ask("classify", *images("a", "b", "c"), "--url", url)
    assert (status, err.count("\n")) == (1, 1)
    assert f"b: the connection to {url} was lost" in err
    assert "1 failed (1 connection lost)" in out


async def test_a_server_that_goes_away_ends_it_at_once(ask: Ask, images: Images) -> None:
    many = images(*(f"{number:02}" for number in range(40)))

    async def says(body: bytes) -> bytes | None:
        if body == b"03":
            server.close()
        return None if body >= b"03" else http(200, ANSWER)

    async with scripted(says) as (url, script, server):
        status, out, err = await ask("classify", *many, "--url", url, "--concurrency", "1")
        assert (status, err) == (
            1,
            f"Error: no server answers at {url} (connection refused); start one: dvt serve, after 3 of 40 images\n",
        )
        assert len(out.splitlines()) == 4
        assert len(script.asked) == 4


async def test_a_server_that_only_hangs_up_ends_it_at_once(ask: Ask, images: Images) -> None:
    async def says(_: bytes) -> None:
        return None

    async with scripted(says) as (url, script, _):
        script.alive = False
        status, out, err = await ask("classify", *images("a", "b", "c"), "--url", url)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f"the connection to {url} was lost" in err


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (problem(401, "unauthorized"), "it is unauthorized (unauthorized)"),
        (problem(422, "invalid_request"), "it is invalid_request (invalid_request)"),
        (http(404, b"<html>"), "/classify answered 404, which is not an answer of this server"),
        (http(200, {}), "/classify answered 200, which is not an answer of this server"),
        (http(200, {"results": []}), "/classify answered 200, which is not"),
        (http(200, b"[" * 100_000), "/classify answered 200, which is not"),
        (http(200, b"x" * 99, {"content-encoding": "gzip"}), "/classify gave no answer of this server"),
        (http(302, b"", {"location": "http://127.0.0.1:1/"}), "/classify answered 302, which is not"),
        (problem(422, "\x1b[31m"), r"it is \x1b[31m (\x1b[31m)"),
    ],
)
async def test_what_every_image_would_get_ends_it_at_once(ask: Ask, images: Images, answer: bytes, cause: str) -> None:
    async def says(_: bytes) -> bytes:
        return answer

    async with scripted(says) as (url, script, _):
        status, out, err = await ask("classify", *images(*"abcdefgh"), "--url", url, "--concurrency", "1")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert cause in err
    assert len(script.asked) <= 2


async def test_answers_keep_the_order_of_the_images_and_few_are_asked_for_at_once(images: Images) -> None:
    """Nothing is answered before three requests are there, and the first image only after the sixth."""
    three, sixth = asyncio.Event(), asyncio.Event()

    async def says(body: bytes) -> bytes:
        if script.held == 3:
            three.set()
        await three.wait()
        if body == b"00":
            await sixth.wait()
        elif body == b"05":
            sixth.set()
        return http(200, ANSWER)

    given = [Path(path) for path in images(*(f"{number:02}" for number in range(30)))]
    async with scripted(says) as (url, script, _), Client(url, concurrency=3) as client:
        got = [image async for image, _ in client.classify_all(given)]
    assert got == given
    assert script.at_once == 3


async def test_a_silent_server_ends_it(images: Images) -> None:
    async def says(_: bytes) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async with scripted(says) as (url, _, _), Client(url, timeout_s=0.1) as client:
        with pytest.raises(ClientError, match="did not answer in time"):
            async for _ in client.classify_all([Path(path) for path in images("a", "b")]):
                pass


@contextlib.asynccontextmanager
async def held_after_the_first(images: Images) -> AsyncIterator[asyncio.subprocess.Process]:
    """`dvt classify` of three images, of which the server answers one."""

    async def says(body: bytes) -> bytes:
        if body != b"a":
            await release.wait()
        return http(200, ANSWER)

    release = asyncio.Event()
    async with scripted(says) as (url, _, _):
        arguments = dvt_arguments("classify", *images("a", "b", "c"), "--url", url)
        process = await asyncio.create_subprocess_exec(*arguments, stdout=PIPE, stderr=PIPE)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"image  label        probability  exit    GMAC      ms\n"
        assert (await process.stdout.readline()).decode().startswith("a ")
        process.release = release  # type: ignore[attr-defined]
        yield process
        release.set()


async def test_ctrl_c_ends_it_at_once_after_the_rows_so_far(images: Images) -> None:
    async with held_after_the_first(images) as process:
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out, err) == (130, b"", b"")


async def test_a_closed_pipe_ends_it_quietly(images: Images) -> None:
    async with held_after_the_first(images) as process:
        process.stdout._transport.close()  # type: ignore[union-attr]
        process.release.set()  # type: ignore[attr-defined]
        assert process.stderr is not None
        assert await asyncio.wait_for(process.stderr.read(), 20) == b""
        assert await process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")
@pytest.mark.parametrize("arguments", [("--help",), ("classify", "--json"), ("classify",)])
async def test_a_full_disk_is_one_line(images: Images, arguments: tuple[str, ...]) -> None:
    async with scripted(fine) as (url, _, _):
        if arguments[0] == "classify":
            arguments = (*arguments, *images("a"), "--url", url)
        with open("/dev/full", "wb") as full:
            process = await asyncio.create_subprocess_exec(*dvt_arguments(*arguments), stdout=full, stderr=PIPE)
            _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"Error: the output: no space left on device\n")


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C.UTF-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"COLUMNS": "60", "NO_COLOR": "1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    ],
    ids=lambda environment: ",".join(f"{name}={value}" for name, value in environment.items()),
)
async def test_every_name_can_be_printed_everywhere(tmp_path: Path, environment: dict[str, str]) -> None:
    names = ["日本.jpg".encode(), b"caf\xe9.jpg", b"\x1b]0;title\x07\n.jpg", b"plain.jpg"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(b"image")
    given = [os.fsdecode(bytes(tmp_path) + b"/" + name) for name in names]
    given += [os.fsdecode(bytes(tmp_path) + b"/no\xff\x1bsuch")]
    async with scripted(fine) as (url, _, _):
        for options in ((), ("--json",)):
            process = await asyncio.create_subprocess_exec(
                *dvt_arguments("classify", *given, *options, "--url", url),
                stdout=PIPE,
                stderr=PIPE,
                env={**os.environ, **environment},
            )
            out, err = await process.communicate()
            assert process.returncode == 1
            assert err.count(b"\n") == 1
            assert rb"no\xff\x1bsuch: no such file" in err
            assert not {byte for byte in out + err if byte < 32} - {10}
            assert len(out.splitlines()) == (4 if options else 7)


def on_a_terminal(columns: int) -> tuple[int, int]:
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return master, slave


async def shown(master: int) -> str:
    """What the terminal was sent, all of it, once nobody has it open any more."""

    def read() -> bytes:
        parts = []
        with contextlib.suppress(OSError):  # how Linux says that this is the end
            while part := os.read(master, 65536):
                parts.append(part)
        os.close(master)
        return b"".join(parts)

    return (await asyncio.to_thread(read)).decode()


async def test_on_a_terminal_rows_fit_and_no_bar_is_shown(images: Images) -> None:
    given = images("one/" + "x" * 60 + "1.jpg", "two/" + "x" * 60 + "2.jpg", "two/bad")

    async def says(body: bytes) -> bytes:
        return problem(400, "bad_image") if body == b"bad" else http(200, ANSWER)

    async with scripted(says) as (url, _, _):
        master, slave = on_a_terminal(60)
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        process = await asyncio.create_subprocess_exec(
            *dvt_arguments("classify", *given, "--url", url), stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        out = await shown(master)
        assert await process.wait() == 1
    assert "images:" not in out.partition("3 images:")[0]
    head, first, second = out.splitlines()[:3]
    assert len(head) <= 60
    assert len(first) == len(second) == len(head)
    assert (first.split()[0][-5:], second.split()[0][-5:]) == ("1.jpg", "2.jpg")


async def test_where_rows_go_elsewhere_a_bar_is_shown_and_errors_stand_on_lines_of_their_own(images: Images) -> None:
    async def says(body: bytes) -> bytes:
        return problem(400, "bad_image") if body == b"bad" else http(200, ANSWER)

    async with scripted(says) as (url, _, _):
        master, slave = on_a_terminal(100)
        process = await asyncio.create_subprocess_exec(
            *dvt_arguments("classify", *images("a", "bad", "c"), "--url", url), stdout=PIPE, stderr=slave
        )
        os.close(slave)
        out, err = await asyncio.gather(process.communicate(), shown(master))
    assert out[0].decode().splitlines()[0].startswith("image")
    assert "0/3" in err
    assert "3/3" in err
    assert any(
        line.startswith("Error: ") and line.endswith("bad: it is bad_image (bad_image)")
        for line in err.replace("\r", "\n").splitlines()
    )


async def test_a_token_that_cannot_be_sent_is_not_shown(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("sec\nret", "secr\u00e9t"):
        monkeypatch.setenv("DVT_CONTROL_TOKEN", token)
        status, out, err = await ask("budget")
        assert (status, out) == (1, "")
        assert "DVT_CONTROL_TOKEN" in err
        assert "sec" not in err


async def test_a_budget_of_another_server_is_one_line(ask: Ask) -> None:
    async with scripted(fine) as (url, _, _):
        status, out, err = await ask("budget", "--url", url)
    assert (status, out) == (1, "")
    assert err == f"Error: {url}/budget answered 200, which is not an answer of this server\n"
