"""A request's place, by which it is chosen for this or that: a hash of its id, as a number in [0, 1).

The same on every replica and for every retry under the same id. Choices for different purposes are independent.
"""

from __future__ import annotations

import hashlib


def place_of(request_id: str, purpose: str) -> float:
    """`purpose`: at most 16 letters."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=6, salt=purpose.encode()).digest()
    return int.from_bytes(digest) / 2**48
