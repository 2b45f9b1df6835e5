"""A request's place, by which a mixed operating point judges it: a keyed hash of its id, as a number in [0, 1).

The same for every retry under the same id, as long as the process lives. The key is made with the server and known to
nobody: from an id alone no client can tell on which side it will fall, nor send ids that all fall on the dearer one.
"""

from __future__ import annotations

import hashlib
import secrets


class Places:
    """Owns the key; processes of one server share it."""

    def __init__(self, key: bytes | None = None) -> None:
        """`key`: by default one that nobody knows."""
        self.key = secrets.token_bytes(16) if key is None else key

    def of(self, request_id: str) -> float:
        digest = hashlib.blake2b(request_id.encode(), digest_size=6, key=self.key).digest()
        return int.from_bytes(digest) / 2**48
