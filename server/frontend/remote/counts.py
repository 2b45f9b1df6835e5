"""What a front end counts, in memory that it shares with the engine's process.

So it costs no message, is there the moment Prometheus asks, and outlives a front end that is killed. The engine's
process takes differences, and only such as a count can have.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from http import HTTPStatus
from itertools import product

from server.errors import BY_CODE
from server.metrics import CLASSIFY, DECODE, PRIORITIES, SECONDS, Counted

HUNG_UP = 499
ROUTES = (CLASSIFY, "other")  # other paths are counted where they are answered; "other": a foreign host
_STATUSES = (*(int(status) for status in HTTPStatus if status >= 200), HUNG_UP)
_CODES = (*BY_CODE, "connection_given_up")
_BUCKETS = len(SECONDS) + 1
_MOST = 2.0**53

_UNKNOWN = ("", "")  # priority and hurry, of what is no request to /classify with a query that could be read
_KEYS = (
    *((route, status, *_UNKNOWN) for route in ROUTES for status in _STATUSES),
    *((CLASSIFY, status, *asked) for status in _STATUSES for asked in product(PRIORITIES, ("false", "true"))),
)
_REQUESTS = {key: at for at, key in enumerate(_KEYS)}
_REFUSED = {code: at for at, code in enumerate(_CODES, start=len(_REQUESTS))}
# Of each: the buckets, then the sum.
_SPREADS = {
    name: len(_REQUESTS) + len(_REFUSED) + number * (_BUCKETS + 1)
    for number, name in enumerate((*ROUTES, DECODE, *PRIORITIES))
}
CELLS = len(_REQUESTS) + len(_REFUSED) + len(_SPREADS) * (_BUCKETS + 1)


class SharedCounts:
    """The front end's side: `metrics.RequestCounts`, into cells."""

    def __init__(self, cells: memoryview[float]) -> None:
        self._cells = cells

    def request_finished(self, route: str, status: int, seconds: float, priority: str = "", hurried: str = "") -> None:
        self._cells[_REQUESTS[route, status, priority, hurried]] += 1
        self._add(_SPREADS[route], seconds)

    def request_refused(self, code: str) -> None:
        self._cells[_REFUSED[code]] += 1

    def answered(self, priority: str, seconds: float) -> None:
        self._add(_SPREADS[priority], seconds)

    def decoded(self, seconds: float) -> None:
        self._add(_SPREADS[DECODE], seconds)

    def _add(self, at: int, seconds: float) -> None:
        self._cells[at + bisect_left(SECONDS, seconds)] += 1
        self._cells[at + _BUCKETS] += seconds


class CountsRead:
    """The engine's side: what has been counted since the last look."""

    def __init__(self, cells: memoryview[float]) -> None:
        self._cells = cells
        self._seen = [0.0] * CELLS

    def take(self) -> Counted:
        new = [0.0] * CELLS
        for at, value in enumerate(self._cells.tolist()):
            if value > self._seen[at] and math.isfinite(value) and value < _MOST:
                new[at], self._seen[at] = value - self._seen[at], value
        whole = [int(value) for value in new]
        return Counted(
            requests={key: whole[at] for key, at in _REQUESTS.items() if whole[at]},
            refused={code: whole[at] for code, at in _REFUSED.items() if whole[at]},
            seconds={
                name: (whole[at : at + _BUCKETS], new[at + _BUCKETS])
                for name, at in _SPREADS.items()
                if any(whole[at : at + _BUCKETS])
            },
        )
