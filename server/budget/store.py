"""Where the budget outlives the process: the operator's target, never what a controller made of it.

What is stored has a version, and is replaced by compare-and-set: whoever writes says what he saw, and is refused where
that is no longer what is there. A store may be shared by many replicas (`configmap`), or be this server's alone, as
those here are.

A folder of state has one owner: two servers would both hand out the next version. It is locked for as long as budgets
may be stored, by a lock that the kernel gives back however the process ends.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from server.documents import SOUND_INTEGER, cause, parse_json, read_file
from server.errors import StoreUnavailable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator last asked for, as in PUT /budget; target and hold are checked by whoever takes it up. Who
    asked, and when, is for people: it makes no other policy."""

    version: int
    target: Mapping[str, Any]
    hold: str
    mix: bool = False
    by: str = field(default="", compare=False)
    at: str = field(default="", compare=False)  # RFC 3339


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a policy is not taken up: it is none, it is another model's, or this bundle cannot serve it."""

    reason: str  # of metrics.REFUSALS
    detail: str


@dataclass(frozen=True, slots=True)
class Held:
    """What a store was seen to hold, at one moment."""

    policy: Policy | None = None  # None: nothing yet, or nothing of use
    version: int = 0  # the last that was given, also where the policy is of no use
    mark: Any = None  # what compare_and_set compares; only the store looks inside
    order: int = 0  # of two sights the later one has the larger; 0 where that cannot be told
    refused: Refusal | None = None
    stamped: bool = True  # False: somebody wrote it by hand, so it has no version of its own yet


_MOST = 64 * 1024  # bytes of a policy; PUT takes 16 KiB


class StateInUse(Exception):
    """Another server owns the state. The message is one line."""


class StoreMoved(Exception):
    """The store no longer holds what was seen: somebody else was first."""


class PolicyStore(Protocol):
    """`recall` is called before there is a loop, and blocks for a moment; `sync` is called in a thread and may block,
    one at a time. The others are called on the event loop, and none waits for ever."""

    name: ClassVar[str]
    shared: ClassVar[bool]
    """Whether others write to it, too: then it is watched."""

    def recall(self) -> Policy | None:
        """What this machine knows of the policy without asking anybody; of a store that is not shared, the policy last
        stored. None where there is none yet. Raises StoreUnavailable where it cannot be read, with the version=... that
        it seems to have had, or 0."""
        ...

    async def load(self) -> Held:
        """What is there now. Raises StoreUnavailable."""
        ...

    async def compare_and_set(self, policy: Policy, seen: Held) -> Held:
        """Replace what was `seen`; gives what is there then. It outlives this process when it returns. Raises
        StoreMoved where something else is there by now, StoreUnavailable where it could not be stored."""
        ...

    def watch(self) -> AsyncGenerator[Held | None]:
        """What is there from the last `load` or `watch` on, at every change; None is only a sign of life, and the first
        thing that comes. Ends by itself after a while; then it may be called again. Raises StoreUnavailable: then
        `load` is next."""
        ...

    def sync(self, policy: Policy) -> None:
        """Make a policy that is in force outlive a power failure, or what else `recall` is to know. May take long.
        Raises StoreUnavailable; what is stored stays so."""
        ...

    def close(self) -> None:
        """Of a store that is this server's alone: nothing is stored any more, another server may own it. May be called
        twice."""
        ...

    async def disconnect(self) -> None:
        """The end. May be called twice."""
        ...


class _Alone:
    """What is this server's alone: only `save` and `recall` differ."""

    shared: ClassVar[bool] = False

    def __init__(self) -> None:
        self._version = 0  # of what is stored

    def recall(self) -> Policy | None:
        raise NotImplementedError

    def save(self, policy: Policy) -> None:
        """Raises StoreUnavailable where it could not be stored: the one before then still stands."""
        raise NotImplementedError

    def sync(self, policy: Policy) -> None:
        pass

    def close(self) -> None:
        pass

    async def load(self) -> Held:
        policy = self.recall()
        return Held(policy, self._version, self._version, self._version)

    async def compare_and_set(self, policy: Policy, seen: Held) -> Held:
        if seen.mark != self._version:
            raise StoreMoved
        self.save(policy)
        return Held(policy, policy.version, policy.version, policy.version)

    async def watch(self) -> AsyncGenerator[Held | None]:
        return
        yield  # nobody else writes

    async def disconnect(self) -> None:
        pass


class MemoryStore(_Alone):
    """Forgets with the process."""

    name: ClassVar[str] = "memory"

    def __init__(self) -> None:
        super().__init__()
        self._policy: Policy | None = None

    def recall(self) -> Policy | None:
        return self._policy

    def save(self, policy: Policy) -> None:
        self._policy, self._version = policy, policy.version


class FileStore(_Alone):
    """Two JSON files. `save` writes `<name>.new`, which any later process reads; `sync` then replaces `<name>` and
    waits for the disk, which can take longer than an operator's answer should.

    `<name>.new` is written over in place, in one write: a process that is killed leaves one policy or the other. To
    replace it would take milliseconds on some file systems, which then allocate at once. A power failure can leave it
    empty or broken: then `<name>` counts, the last policy that was synced.
    """

    name: ClassVar[str] = "file"

    def __init__(self, path: Path | str, wait_s: float = 0.0) -> None:
        """Waits at most so long for another server that is about to stop, and blocks; then raises StateInUse. A folder
        that cannot be made or written to is no reason not to start: nothing can be stored, and whoever tries is told.
        """
        super().__init__()
        self.path = Path(path)
        self._new = self.path.with_name(f"{self.path.name}.new")
        self._given_up = False
        self._lock = _lock(self.path.with_name(f"{self.path.name}.lock"), wait_s)

    def recall(self) -> Policy | None:
        policies, errors = [], []
        for path in (self.path, self._new):
            try:
                policies.append(read_policy(path))
            except FileNotFoundError:
                pass
            except StoreUnavailable as error:
                errors.append(error)
        if not policies and errors:
            raise StoreUnavailable(errors[0].detail, version=max(error.extra["version"] for error in errors))
        for unread in errors:
            log.warning("not used: %s", unread.detail)
        newest = max(policies, key=lambda policy: policy.version, default=None)
        self._version = 0 if newest is None else newest.version
        return newest

    def save(self, policy: Policy) -> None:
        if self._given_up:  # whoever owns it now has the version that this one would have
            raise StoreUnavailable("the budget could not be stored: its folder was given up to the next server")
        _overwrite(self._new, _text(policy))
        self._version = policy.version

    def sync(self, policy: Policy) -> None:
        write_policy(self.path, policy)

    def close(self) -> None:
        self._given_up = True
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(path: Path, wait_s: float) -> int | None:
    """The descriptor that holds the lock; None where there is none to be had. Raises StateInUse."""
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        log.warning("budgets cannot be stored: %s: %s", path.parent, cause(error))
        return None
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            taken = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            if taken and time.monotonic() < until:
                time.sleep(0.05)  # flock waits for ever or not at all
                continue
            os.close(descriptor)
            if taken:
                raise StateInUse(f"{path.parent} belongs to another server that runs") from None
            log.warning("%s cannot be locked, and must have one server only: %s", path.parent, cause(error))
            return None


def write_policy(path: Path, policy: Policy) -> None:
    """A reader finds the old policy or the new one, also after a power failure. Raises StoreUnavailable."""
    _replace(path, _text(policy))
    try:  # the rename has taken effect; that it is on the disk, too, is not worth an error
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        log.warning("%s: the folder could not be synced: %s", path.parent, error)


def _text(policy: Policy) -> str:
    return json.dumps(asdict(policy), sort_keys=True, allow_nan=False)


def parse_budget(content: bytes | str) -> tuple[dict[str, Any], Any, Any]:
    """Target, hold and mix of the body of a PUT, as somebody wrote it into a file. Raises ValueError, in one line."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(content) > _MOST:
        raise ValueError(f"is larger than {_MOST} bytes")
    document = parse_json(content)
    if not isinstance(document, dict):
        raise ValueError('is no object such as {"gmacs": 0.03}')
    target = {name: value for name, value in document.items() if name not in ("hold", "mix")}
    return target, document.get("hold", "cost"), document.get("mix", False)


def read_seed(path: Path) -> Policy | None:
    """The budget that stands until one is set; None, and a line in the log, where the file holds none."""
    try:
        target, hold, mix = parse_budget(read_file(path, _MOST))
    except (OSError, ValueError) as error:
        log.warning("the seed of the budget is not used: %s: %s", path, cause(error))
        return None
    return Policy(1, target, hold, mix)


def read_policy(path: Path) -> Policy:
    """Raises FileNotFoundError and StoreUnavailable, with the version that can be made out."""
    content = b""
    try:
        content = read_file(path, _MOST)
        document = parse_json(content.partition(b"\n")[0])  # what follows the first line is an older one's
        version, target, hold = document["version"], document["target"], document["hold"]
        mix = document.get("mix", False)  # files of earlier releases have none,
        by, at = str(document.get("by", ""))[:200], str(document.get("at", ""))[:40]  # nor these
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise StoreUnavailable(f"{path}: {cause(error)}", version=_version_in(content)) from None
    except (KeyError, TypeError, AttributeError):
        raise StoreUnavailable(f"{path}: does not hold a budget", version=_version_in(content)) from None
    sound = isinstance(target, dict) and isinstance(hold, str) and isinstance(mix, bool)
    if type(version) is not int or not 1 <= version < SOUND_INTEGER or not sound:
        raise StoreUnavailable(f"{path}: does not hold a budget", version=_version_in(content))
    return Policy(version, target, hold, mix, by, at)


def _version_in(content: bytes) -> int:
    """Of a policy that is damaged, so that its number is not given to another; 0 where it cannot be told."""
    found = re.search(rb'"version"\s*:\s*([0-9]{1,15})(?![0-9.eE])', content)
    return int(found[1]) if found else 0


def _overwrite(path: Path, text: str) -> None:
    """The file begins with the text, what was longer before stays behind it. Raises StoreUnavailable.

    What was written in part is cut off, so that no later process takes it for a budget: `<name>` counts then.
    """
    line = f"{text}\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unavailable(error) from error
    if written < len(line):
        raise StoreUnavailable("the budget could not be stored: only a part of it was written")


def _replace(path: Path, text: str) -> None:
    """A reader finds the old text or the new one, also after a power failure. Raises StoreUnavailable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(f"{text}\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise _unavailable(error) from error


def _unavailable(error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"the budget could not be stored: {error.strerror or error}")
