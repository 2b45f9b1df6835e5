"""Answers as lines of a file: JSON lines or CSV, one an image, written so that a run can be taken up where it ended.

Lines go to `<name>.part`, which gets the file's own name when all are there: what has that name is complete. They are
written in the order given, so whatever ends the process leaves whole lines, and perhaps a part of one, which the next
run cuts off. Every line says which bundle and which thresholds it comes from, so that answers of two are never mixed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from server.bundle.manifest import Bundle
from server.core import ImageResult
from server.documents import cause
from server.errors import ServeError
from server.frontend.routes import predictions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HELD_BYTES = 64 * 1024  # of lines that are not written yet,
_HELD_S = 1.0  # for at most so long
_LONGEST_LINE = 2**24


class OutputError(Exception):
    """A file that cannot be written, or taken up. The message, one line, names it and the cause."""


class Form(Protocol):
    """How an image's answer is written. `head` is the file's first line, where it has one; `quotes`: whether a line
    break may stand in quotes."""

    head: bytes
    quotes: bool

    def line(self, image: str, answer: ImageResult | ServeError) -> bytes: ...

    def read(self, line: bytes) -> tuple[str, bool]:
        """The image that a line is about, and whether it failed. Raises ValueError for what is no such line,
        LookupError for one of another bundle or other thresholds."""
        ...


class _Answers:
    """What the lines of a run have in common."""

    def __init__(self, bundle: Bundle, thresholds: Sequence[float], top_k: int) -> None:
        manifest = bundle.manifest
        self._labels, self._gmacs, self._top_k = manifest.labels, manifest.stage_gmacs, top_k
        self._version = manifest.version
        self._thresholds = list(thresholds)

    def _check(self, version: object, thresholds: object) -> None:
        if version != self._version:
            raise LookupError(f"of bundle version {version}, not {self._version}")
        if thresholds != self._thresholds:
            raise LookupError(f"by thresholds {thresholds}, not {self._thresholds}")


class JsonLines(_Answers):
    """`{"image": …, "predictions": […], "exit": 1, …}`, or with "error" in place of the answer."""

    head = b""
    quotes = False

    def line(self, image: str, answer: ImageResult | ServeError) -> bytes:
        body: dict[str, Any] = {"image": image}
        if isinstance(answer, ServeError):
            body["error"] = {"code": answer.code, "detail": answer.detail}
        else:
            body |= {
                "predictions": predictions(answer, self._labels, self._top_k),
                "exit": answer.exit,
                "confidence": round(answer.confidence, 6),
                "gmacs": self._gmacs[answer.exit - 1],
            }
        body |= {"version": self._version, "thresholds": self._thresholds}
        return json.dumps(body).encode() + b"\n"

    def read(self, line: bytes) -> tuple[str, bool]:
        body = json.loads(line)
        if not isinstance(body, dict) or not isinstance(body.get("image"), str) or "thresholds" not in body:
            raise ValueError("is no answer")
        self._check(body.get("version"), body["thresholds"])
        return body["image"], "error" in body


class Csv(_Answers):
    """The most probable class only. `thresholds` are numbers with blanks between them."""

    _COLUMNS = (
        "image", "label", "class_id", "probability", "exit", "confidence", "gmacs", "error", "version", "thresholds"
    )  # fmt: skip
    _ERROR = _COLUMNS.index("error")
    head = ",".join(_COLUMNS).encode() + b"\r\n"
    quotes = True

    def line(self, image: str, answer: ImageResult | ServeError) -> bytes:
        origin = (self._version, " ".join(map(repr, self._thresholds)))
        if isinstance(answer, ServeError):
            return self._row(image, "", "", "", "", "", "", f"{answer.code}: {answer.detail}", *origin)
        (best,) = predictions(answer, self._labels, 1)
        told = (answer.exit, round(answer.confidence, 6), self._gmacs[answer.exit - 1])
        return self._row(image, best["label"], best["class_id"], best["probability"], *told, "", *origin)

    @staticmethod
    def _row(*fields: object) -> bytes:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\r\n").writerow(fields)  # as RFC 4180 says; of "\n" it would not quote "\r"
        return stream.getvalue().encode("utf-8", "surrogateescape")  # names are bytes, of whatever encoding

    def read(self, line: bytes) -> tuple[str, bool]:
        text = line.decode("utf-8", "surrogateescape")
        try:
            (fields,) = csv.reader(io.StringIO(text, newline=""), strict=True)
        except csv.Error as error:
            raise ValueError(str(error)) from None
        if len(fields) != len(self._COLUMNS):
            raise ValueError("is no answer")
        self._check(fields[-2], [float(number) for number in fields[-1].split(" ")])
        return fields[0], fields[self._ERROR] != ""


class StandardOutput:
    """Lines on stdout, at once."""

    def __init__(self, form: Form) -> None:
        self.done: set[str] = set()
        self.failed = 0
        self._form = form
        self._write(form.head)

    def add(self, image: str, answer: ImageResult | ServeError) -> None:
        self._write(self._form.line(image, answer))

    def _write(self, line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

    def flush(self) -> None:
        """Nothing is held."""

    finish = close = flush


class AnswerFile:
    """Owns the file under its two names, and the lines that are not written yet. `done`: images that had a line before,
    `failed` of them a bad one."""

    def __init__(self, path: Path, form: Form, *, resume: bool = False, force: bool = False) -> None:
        """`resume` goes on where a run ended, `force` begins anew; without either there must be neither file.

        Raises OutputError.
        """
        self.path = Path(os.path.realpath(path))  # a link keeps pointing to it
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.done: set[str] = set()
        self.failed = 0  # of them
        self._form = form
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._wrote_at = time.monotonic()
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(_stat(self.path).st_mode):
                raise OutputError(f"{path}: is not a regular file; - stands for the standard output")
        there = [file for file in (self.part, self.path) if os.path.lexists(file)]
        if there and not (resume or force):
            raise OutputError(f"{there[0]}: is there already; --resume goes on with it, --force begins anew")
        begun = self.part in there
        self._has_news = begun  # what is in the part, and nowhere else
        self._descriptor = self._open()
        try:
            if resume and not begun and there:
                self._copy()
            if resume:
                self._take_up(self.part if begun else path)
            else:
                os.ftruncate(self._descriptor, 0)
            if os.lseek(self._descriptor, 0, os.SEEK_END) == 0:
                self._hold(form.head)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise

    def add(self, image: str, answer: ImageResult | ServeError) -> None:
        """Raises OutputError, and after it nothing more is written."""
        self._has_news = True
        self._hold(self._form.line(image, answer))
        if self._held_bytes >= _HELD_BYTES or time.monotonic() - self._wrote_at >= _HELD_S:
            self.flush()

    def flush(self) -> None:
        data, self._held, self._held_bytes = b"".join(self._held), [], 0
        self._wrote_at = time.monotonic()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """All are there: give the file its name. Raises OutputError."""
        self.flush()
        try:
            os.fsync(self._descriptor)
            os.replace(self.part, self.path)
            self._has_news = True
            if hasattr(os, "O_DIRECTORY"):
                folder = os.open(self.path.parent, os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """May be called twice. What is held and was not flushed is lost; a part without an answer of its own goes."""
        if self._descriptor >= 0:
            if not self._has_news:
                with suppress(OSError):
                    os.unlink(self.part)
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(self.part, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise self._failed(error) from error
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened, named = os.fstat(descriptor), os.stat(self.part)
            if not os.path.samestat(opened, named):
                raise BlockingIOError  # another run has just given it its name
            if not stat.S_ISREG(opened.st_mode):
                raise OutputError(f"{self.part}: is not a regular file")
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            raise OutputError(f"{self.part}: another run is writing it") from None
        except OSError as error:
            os.close(descriptor)
            raise self._failed(error) from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _copy(self) -> None:
        """What is complete stays so until this run is."""
        with open(self.path, "rb") as complete:
            while data := complete.read(2**20):
                while data:
                    data = data[os.write(self._descriptor, data) :]

    def _take_up(self, file: Path) -> None:
        """Read the names of all whole lines, and cut off what is none at the end: not of `file` where it is complete,
        as then it is not ours."""
        end, size = 0, os.fstat(self._descriptor).st_size
        with open(os.dup(self._descriptor), "rb") as stream:
            stream.seek(0)
            try:
                for line in _lines(stream, self._form.quotes):
                    if end or line != self._form.head:
                        image, failed = self._form.read(line)
                        self.done.add(image)
                        self.failed += failed
                    end += len(line)
            except LookupError as error:
                raise OutputError(
                    f"{file}: has answers {error.args[0]}; --force begins anew, another --output keeps them"
                ) from None
            except (ValueError, RecursionError):
                # Lost power leaves such an end. What begins with no line of ours is somebody else's.
                if end <= len(self._form.head):
                    raise OutputError(f"{file}: does not hold answers in this form") from None
        if end < size and file != self.part:
            raise OutputError(f"{file}: does not hold answers in this form")
        os.ftruncate(self._descriptor, end)

    def _hold(self, line: bytes) -> None:
        self._held.append(line)
        self._held_bytes += len(line)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self.part}: {cause(error)}")


def _lines(stream: BinaryIO, quotes: bool) -> Iterator[bytes]:
    """Whole lines; with `quotes` one has as many lines of text as it takes to close them. What is cut short at the end
    is left out, as is all from what is longer than any line."""
    line = b""
    while (text := stream.readline(_LONGEST_LINE)).endswith(b"\n"):
        line += text
        if len(line) > _LONGEST_LINE:
            return
        if not quotes or line.count(b'"') % 2 == 0:
            yield line
            line = b""


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: {cause(error)}") from None
