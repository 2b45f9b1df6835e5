"""What one sender is told to do, and the log that it hands back: plain data, between processes.

Times are seconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Client(IntEnum):
    """How a client behaves."""

    PLAIN = 0
    LEAVING = 1  # hangs up before long
    SLOW = 2  # sends its body in pieces
    SPOILT = 3  # one of its images is broken


class Outcome(IntEnum):
    """What became of a request that was sent. Each has exactly one: what is sent is the sum of these."""

    ANSWERED = 0
    REFUSED = 1  # 503
    EXPIRED = 2  # 504
    REJECTED = 3  # 400, and its image was broken
    FAILED = 4  # any other answer, or a connection that broke
    LEFT = 5  # the client hung up, as it was told to
    UNANSWERED = 6  # nothing came, and the client gave up


@dataclass(frozen=True, slots=True)
class Body:
    """A request body. `labels`: of its images, in order; None where nobody knows."""

    content: bytes
    content_type: str
    labels: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Manners:
    """Of the clients that are not plain ones."""

    patience_s: float = 0.05  # a leaving client hangs up so long after its moment
    dawdle_s: float = 1.0  # a slow one takes so long over its body
    give_up_s: float = 30.0  # and everybody else waits so long for an answer


@dataclass(frozen=True, slots=True)
class Order:
    """A load. Open loop: body `which[n]` at `start + times[n]`, by a client of kind `kinds[n]`.

    Closed loop where `clients` is above 0: so many, each asking again once it is answered, until `times[-1]`.
    """

    url: str  # of the path, query included
    start: float
    times: Floats  # (N,) rising
    which: Ints  # (N,)
    kinds: Ints  # (N,)
    manners: Manners = Manners()
    clients: int = 0


# Columns of Log.images: one row an image that was answered.
IMAGE = ("request", "exit", "degraded", "right", "gmacs", "queue", "compute", "total")


@dataclass(frozen=True, slots=True)
class Log:
    """What happened to N requests, in the order of their moments; and what sending them took."""

    due: Floats  # (N,) seconds after the start
    late: Floats  # (N,) seconds after `due` at which it was sent: that was the driver
    took: Floats  # (N,) seconds from `due` to the last byte of the answer; nan where there was none
    outcome: Ints  # (N,) Outcome
    kind: Ints  # (N,) Client
    body: Ints  # (N,) which
    error: Ints  # (N,) index into `errors`, -1 where there is none
    errors: tuple[str, ...]
    images: Floats  # (M, len(IMAGE)); `request` is an index into the above, `right` is -1 where nobody knows
    planned: int
    seconds: float  # from the start to the last answer
    cpu_s: float

    def __len__(self) -> int:
        return len(self.due)


def merge(logs: Sequence[Log]) -> Log:
    """One log of several senders."""
    errors = tuple(sorted({error for log in logs for error in log.errors}))
    codes, images, begun = [], [], 0
    for log in logs:
        into = np.array([*(errors.index(error) for error in log.errors), -1])  # the last: for index -1
        codes.append(into[log.error])
        images.append(log.images.copy())
        images[-1][:, 0] += begun
        begun += len(log)
    return Log(
        due=np.concatenate([log.due for log in logs]),
        late=np.concatenate([log.late for log in logs]),
        took=np.concatenate([log.took for log in logs]),
        outcome=np.concatenate([log.outcome for log in logs]),
        kind=np.concatenate([log.kind for log in logs]),
        body=np.concatenate([log.body for log in logs]),
        error=np.concatenate(codes),
        errors=errors,
        images=np.concatenate(images),
        planned=sum(log.planned for log in logs),
        seconds=max(log.seconds for log in logs),
        cpu_s=sum(log.cpu_s for log in logs),
    )
