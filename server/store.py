"""Where the budget outlives the process: the operator's target, never what a controller made of it."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from server.errors import StoreUnavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator last asked for. `target` and `hold` are as in PUT /budget and are checked by whoever loads."""

    version: int
    target: Mapping[str, Any]
    hold: str


class PolicyStore(Protocol):
    """Blocking; called from one thread at a time."""

    def load(self) -> Policy | None:
        """The policy last saved, None where there is none yet. Raises StoreUnavailable where it cannot be read."""
        ...

    def save(self, policy: Policy) -> None:
        """Durable when it returns. Raises StoreUnavailable where it could not be: the one before then still stands."""
        ...


class MemoryStore:
    """Forgets with the process."""

    def __init__(self) -> None:
        self._policy: Policy | None = None

    def load(self) -> Policy | None:
        return self._policy

    def save(self, policy: Policy) -> None:
        self._policy = policy


class FileStore:
    """One JSON file, replaced in one step: a reader, or a start after a crash, finds the old policy or the new one."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def load(self) -> Policy | None:
        try:
            document = json.loads(self.path.read_bytes())
            version, target, hold = document["version"], document["target"], document["hold"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreUnavailable(f"{self.path}: cannot be read ({type(error).__name__}: {error})") from None
        if type(version) is not int or version < 1 or not isinstance(target, dict) or not isinstance(hold, str):
            raise StoreUnavailable(f"{self.path}: does not hold a budget")
        return Policy(version, target, hold)

    def save(self, policy: Policy) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            try:
                with open(descriptor, "w", encoding="utf-8") as stream:
                    json.dump(asdict(policy), stream, sort_keys=True, allow_nan=False)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, self.path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise StoreUnavailable(f"the budget could not be stored: {error.strerror or error}") from error
        self._sync_folder()

    def _sync_folder(self) -> None:
        """Make the rename itself durable. It has taken effect and cannot be taken back, so a failure is only noted."""
        try:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            log.warning("%s: the folder could not be synced: %s", self.path.parent, error)
