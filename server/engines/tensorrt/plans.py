"""Where plans lie: one folder for a bundle, a GPU and a version of TensorRT.

    stageN.plan     what the builder made
    stageN.json     what it was made from and for, and its hash: its `Record`, and that of the plan before
    timing.cache    how long kernels took, so that a second build takes less
    lock            held by whoever builds

A plan is code that runs with the rights of the server. So nothing is read but what lies in a folder that nobody else
can write to, belongs to this user or to root, is a regular file and no link, has the hash that its record names, and
was made for exactly this: its record's *origin* must equal what is wanted now. (What a plan was built *with*, batch
sizes and effort, is the builder's choice; whoever loads takes what is there.) Folder and files are opened once and
judged by their descriptors, so nobody can exchange them in between.

A file appears whole or not at all: written beside, synced, renamed. Plan and record are two files. The record is
renamed first, and has that of the plan before as well: whichever plan lies there, at any moment and after a crash, its
record lies beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.documents import cause, parse_json, shown
from server.errors import BundleError

FORMAT_VERSION: Final = 1
_MAX_RECORD, _MAX_PLAN, _MAX_TIMINGS = 64 * 2**10, 16 * 2**30, 256 * 2**20  # bytes
_TIMINGS, _LOCK = "timing.cache", "lock"


class Unfit(Exception):
    """A plan that cannot be used. The message is one line: the file, and why."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Origin(_Frozen):
    """What a plan must have been built from and for, where it is to run."""

    stage: int
    graph: str  # sha256 of the ONNX file
    precision: str
    outputs: tuple[str, ...]
    runtime: str  # tensorrt or tensorrt_rtx
    version: str
    platform: str
    gpu: str
    capability: str


class Choices(_Frozen):
    """What a plan is built with."""

    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    optimization_level: int
    workspace_bytes: int | None
    flags: tuple[str, ...]


class Record(_Frozen):
    """One plan."""

    key: str
    origin: Origin
    choices: Choices
    sha256: str
    size: int  # of the plan, in bytes
    seconds: float  # that it took to build


class Records(_Frozen):
    """stageN.json: of the plan that lies there, and of the one before."""

    format_version: Literal[1]
    plans: Annotated[tuple[Record, ...], Field(min_length=1, max_length=2)]


def key_of(origin: Origin, choices: Choices) -> str:
    parts = {"format": FORMAT_VERSION, "origin": origin.model_dump(), "choices": choices.model_dump()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def folder_name(gpu: str, runtime: str, version: str) -> str:
    """`nvidia-h100-80gb-hbm3-11.4.0.106`; what is built for a capability, by RTX, is called `sm89-rtx-1.7.1.116`."""
    slug = "-".join(re.findall("[a-z0-9]+", gpu.lower()))[:100] or "gpu"
    return f"{slug}-{'rtx-' if runtime == 'tensorrt_rtx' else ''}{version}"


class PlanFolder:
    """An open folder of plans that was found to be in order. Closed by `close` or as a context manager.

    Raises BundleError where there is none to be had, or others can write to it.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir(mode=0o755, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            linked = path.is_symlink()  # what is opened as a folder and is a link counts as none
            raise BundleError(f"{path}: {'is a symbolic link' if linked else cause(error)}") from None
        if why := _distrusted(os.fstat(self._fd)):
            os.close(self._fd)
            raise BundleError(f"{path}: {why}; plans are code, and only ours may lie there")

    def __enter__(self) -> PlanFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def read(self, origin: Origin, choices: Choices | None = None) -> tuple[Record, bytes]:
        """The plan of a stage with its record, for exactly this origin; where `choices` are given, built with those.
        Raises Unfit."""
        record, plan = self._find(origin.stage)
        where = self.path / f"stage{origin.stage}.json"
        if why := _difference(record.origin, origin) or (choices and _difference(record.choices, choices)):
            raise Unfit(f"{where}: {why}")
        if record.key != key_of(record.origin, record.choices):
            raise Unfit(f"{where}: its key does not follow from what it says")
        return record, plan

    def publish(self, origin: Origin, choices: Choices, plan: bytes, seconds: float) -> Record:
        """Put a plan and its record there; whoever calls holds the lock. Raises BundleError."""
        record = Record(
            key=key_of(origin, choices),
            origin=origin,
            choices=choices,
            sha256=hashlib.sha256(plan).hexdigest(),
            size=len(plan),
            seconds=round(seconds, 3),
        )
        before: tuple[Record, ...] = ()
        with suppress(Unfit):
            before = (self._find(origin.stage)[0],)
        records = Records(format_version=FORMAT_VERSION, plans=(record, *before))
        self._write(
            {
                f"stage{origin.stage}.json": f"{records.model_dump_json(indent=2)}\n".encode(),
                f"stage{origin.stage}.plan": plan,
            }
        )
        return record

    def timings(self) -> bytes:
        """The timing cache; b"" where there is none that can be used."""
        with suppress(Unfit):
            head, _, content = self._read(_TIMINGS, _MAX_TIMINGS).partition(b"\n")
            if head.decode(errors="replace") == hashlib.sha256(content).hexdigest():
                return content
        return b""

    def publish_timings(self, content: bytes) -> None:
        """Raises BundleError."""
        self._write({_TIMINGS: b"%s\n%s" % (hashlib.sha256(content).hexdigest().encode(), content)})

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Alone among those that build here, other processes included; `waiting` is called where another one does, for
        whom this waits. The kernel gives the lock back however a process ends. What it left half-written is removed."""
        import fcntl  # Linux, as all of this; elsewhere the module can still be looked at

        try:
            # Nobody else may open it: who could, could hold the lock for ever.
            descriptor = os.open(
                _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=self._fd
            )
        except OSError as error:
            raise BundleError(f"{self.path / _LOCK}: {_cause(error)}") from None
        try:
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waiting()
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                raise BundleError(f"{self.path / _LOCK}: cannot be locked: {_cause(error)}") from None
            self._sweep()
            yield
        finally:
            os.close(descriptor)

    def _find(self, stage: int) -> tuple[Record, bytes]:
        """The plan that lies there, and of its records the one that has its hash."""
        records = self._records(stage)
        while True:
            plan = self._read(f"stage{stage}.plan", _MAX_PLAN)
            digest = hashlib.sha256(plan).hexdigest()
            for record in records:
                if (record.sha256, record.size) == (digest, len(plan)):
                    return record, plan
            if (again := self._records(stage)) == records:
                break
            records = again  # others came while the plan was read
        where, said = self.path / f"stage{stage}.plan", records[0]
        if len(plan) != said.size:
            raise Unfit(f"{where}: has {len(plan)} bytes, its record says {said.size}")
        raise Unfit(f"{where}: sha256 is {digest[:12]}…, its record says {shown(said.sha256[:12])}…")

    def _records(self, stage: int) -> tuple[Record, ...]:
        name = f"stage{stage}.json"
        where = self.path / name
        content = self._read(name, _MAX_RECORD)
        try:
            document = parse_json(content)
        except ValueError as error:
            raise Unfit(f"{where}: {error}") from None
        found = document.get("format_version") if isinstance(document, dict) else None
        if found != FORMAT_VERSION:
            raise Unfit(f"{where}: format version {shown(found)}, this release reads {FORMAT_VERSION}")
        try:
            return Records.model_validate_json(content).plans
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise Unfit(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def _read(self, name: str, most: int) -> bytes:
        where = self.path / name
        try:
            # A FIFO would block, and a link would lead elsewhere.
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                info = os.fstat(descriptor)
                if not stat.S_ISREG(info.st_mode):
                    raise Unfit(f"{where}: is not a regular file")
                if why := _distrusted(info):
                    raise Unfit(f"{where}: {why}")
                if info.st_size > most:
                    raise Unfit(f"{where}: is larger than {most} bytes")
                with open(descriptor, "rb", closefd=False) as stream:
                    return stream.read(info.st_size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Unfit(f"{where}: {_cause(error)}") from None

    def _write(self, files: Mapping[str, bytes]) -> None:
        """Put them there. The renames come last, one right after the other: what fails before leaves all as it was."""
        written: dict[str, str] = {}
        try:
            for name, content in files.items():
                where = f"{self.path / name}: it has {len(content)} bytes"
                temporary = f".{name}.{secrets.token_hex(8)}.new"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(temporary, flags, 0o600, dir_fd=self._fd), "wb") as stream:
                    written[temporary] = name
                    stream.write(content)
                    stream.flush()
                    os.fchmod(stream.fileno(), 0o644)  # read by whoever serves
                    os.fsync(stream.fileno())
            for temporary, name in written.items():
                os.replace(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            os.fsync(self._fd)
        except OSError as error:
            raise BundleError(f"{where}: {_cause(error)}") from None
        finally:
            for temporary in written:
                with suppress(OSError):  # those that were renamed are not there any more
                    os.unlink(temporary, dir_fd=self._fd)

    def _sweep(self) -> None:
        for name in os.listdir(self._fd):
            if name.startswith(".") and name.endswith(".new"):
                with suppress(OSError):
                    os.unlink(name, dir_fd=self._fd)


def _distrusted(info: os.stat_result) -> str | None:
    """Why a file or folder may hold what others put there."""
    if info.st_uid not in (0, os.geteuid()):
        return f"belongs to user {info.st_uid}, neither to this one ({os.geteuid()}) nor to root"
    if info.st_mode & 0o022:
        return f"can be written to by others (mode {stat.S_IMODE(info.st_mode):04o})"
    return None


def _difference(found: BaseModel, wanted: BaseModel) -> str | None:
    for field in type(wanted).model_fields:
        there, here = getattr(found, field), getattr(wanted, field)
        if there != here:
            return f"was built for {field.replace('_', ' ')} {shown(there)}, and {shown(here)} is wanted"
    return None


def _cause(error: OSError) -> str:
    known = {errno.ELOOP: "is a symbolic link", errno.ENOENT: "is missing"}
    return known.get(error.errno or 0) or cause(error)
