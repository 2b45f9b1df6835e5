"""Where the budget outlives the process: the operator's target, never what a controller made of it.

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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from server.documents import SOUND_INTEGER, cause, parse_json, read_file
from server.errors import StoreUnavailable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator last asked for, as in PUT /budget; target and hold are checked by whoever loads."""

    version: int
    target: Mapping[str, Any]
    hold: str
    mix: bool = False


_MOST = 64 * 1024  # bytes of a policy; PUT takes 16 KiB


class StateInUse(Exception):
    """Another server owns the state. The message is one line."""


class PolicyStore(Protocol):
    """`load` and `save` are called on the event loop and must be quick; `sync` is called in a thread and may block, one
    at a time."""

    def load(self) -> Policy | None:
        """The policy last saved, None where there is none yet. Raises StoreUnavailable where it cannot be read, with
        the version=... that it seems to have had, or 0."""
        ...

    def save(self, policy: Policy) -> None:
        """Outlives this process when it returns. Raises StoreUnavailable where it could not be stored: the one before
        then still stands."""
        ...

    def sync(self) -> None:
        """Make what was saved last outlive a power failure. May take long. Raises StoreUnavailable; it stays saved."""
        ...

    def close(self) -> None:
        """Nothing is saved any more: another server may own the state. May be called twice."""
        ...


class MemoryStore:
    """Forgets with the process."""

    def __init__(self) -> None:
        self._policy: Policy | None = None

    def load(self) -> Policy | None:
        return self._policy

    def save(self, policy: Policy) -> None:
        self._policy = policy

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class FileStore:
    """Two JSON files. `save` writes `<name>.new`, which any later process reads; `sync` then replaces `<name>` and
    waits for the disk, which can take longer than an operator's answer should.

    `<name>.new` is written over in place, in one write: a process that is killed leaves one policy or the other. To
    replace it would take milliseconds on some file systems, which then allocate at once. A power failure can leave it
    empty or broken: then `<name>` counts, the last policy that was synced.
    """

    def __init__(self, path: Path | str, wait_s: float = 0.0) -> None:
        """Waits at most so long for another server that is about to stop, and blocks; then raises StateInUse. A folder
        that cannot be made or written to is no reason not to start: nothing can be stored, and whoever tries is told.
        """
        self.path = Path(path)
        self._new = self.path.with_name(f"{self.path.name}.new")
        self._saved = ""
        self._given_up = False
        self._lock = _lock(self.path.with_name(f"{self.path.name}.lock"), wait_s)

    def load(self) -> Policy | None:
        policies, errors = [], []
        for path in (self.path, self._new):
            try:
                policies.append(_read(path))
            except FileNotFoundError:
                pass
            except StoreUnavailable as error:
                errors.append(error)
        if not policies and errors:
            raise StoreUnavailable(errors[0].detail, version=max(error.extra["version"] for error in errors))
        for unread in errors:
            log.warning("not used: %s", unread.detail)
        return max(policies, key=lambda policy: policy.version, default=None)

    def save(self, policy: Policy) -> None:
        if self._given_up:  # whoever owns it now has the version that this one would have
            raise StoreUnavailable("the budget could not be stored: its folder was given up to the next server")
        text = json.dumps(asdict(policy), sort_keys=True, allow_nan=False)
        _overwrite(self._new, text)
        self._saved = text

    def sync(self) -> None:
        _replace(self.path, self._saved)
        try:  # the rename has taken effect; that it is on the disk, too, is not worth an error
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            log.warning("%s: the folder could not be synced: %s", self.path.parent, error)

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


def _read(path: Path) -> Policy:
    """Raises FileNotFoundError and StoreUnavailable, with the version that can be made out."""
    content = b""
    try:
        content = read_file(path, _MOST)
        document = parse_json(content.partition(b"\n")[0])  # what follows the first line is an older one's
        version, target, hold = document["version"], document["target"], document["hold"]
        mix = document.get("mix", False)  # files of earlier releases have none
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise StoreUnavailable(f"{path}: {cause(error)}", version=_version_in(content)) from None
    except (KeyError, TypeError, AttributeError):
        raise StoreUnavailable(f"{path}: does not hold a budget", version=_version_in(content)) from None
    sound = isinstance(target, dict) and isinstance(hold, str) and isinstance(mix, bool)
    if type(version) is not int or not 1 <= version < SOUND_INTEGER or not sound:
        raise StoreUnavailable(f"{path}: does not hold a budget", version=_version_in(content))
    return Policy(version, target, hold, mix)


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
