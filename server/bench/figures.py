"""From a log to figures: one document, whose members keep their names and meanings within a schema.

Counts are of requests unless they are said to be of images. Latencies are those of answers (200), from the scheduled
moment; what was not answered has none, and is counted beside them: a server that refuses whom it cannot serve in time
has a fine p99. `in_time` and `correct_in_time` are shares of all that was sent, and the figures to lead with.
"""

from __future__ import annotations

import errno
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from server.bench.orders import IMAGE, Body, Client, Floats, Log, Outcome

SCHEMA = "dvt-bench/1"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
SLICES = 40  # of the time, at most, in `over_time`; of fewer where few were sent
POINTS = 200  # of a curve
MOST_ERRORS = 20  # by name
MOST_LATE_MS, MOST_LATE_SHARE = 2.0, 0.1  # p99 of the driver's own delay, and as a share of the latencies' p99
MOST_OF_CEILING = 0.7

# What no server can help: the driver's machine has no more descriptors, or no more ports.
_OF_THE_DRIVER = {os.strerror(number).lower() for number in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)}
_COLUMN = {name: number for number, name in enumerate(IMAGE)}
_KINDS = {Client.LEAVING: "leaving", Client.SLOW: "slow", Client.SPOILT: "spoilt"}


def figures(
    log: Log,
    bodies: Sequence[Body],
    *,
    warm_up: float,
    seconds: float,
    timeout_ms: float | None = None,
    closed: bool = False,
) -> dict[str, Any]:
    """Of what was due from `warm_up` on, for `seconds`. `timeout_ms`: later answers are late."""
    counted = log.due >= warm_up
    plain = counted & (log.kind == Client.PLAIN)
    answered = plain & (log.outcome == Outcome.ANSWERED)
    in_time = answered & (log.took <= (math.inf if timeout_ms is None else timeout_ms / 1000))
    of = log.images[:, _COLUMN["request"]].astype(np.int64)
    rows = log.images[answered[of]]
    requests = outcomes(log, plain)
    sent = requests["sent"]
    sizes = np.array([(len(body.labels), sum(label is not None for label in body.labels)) for body in bodies])
    images_sent, labelled = sizes[log.body[plain]].sum(axis=0).tolist() if sent else (0, 0)
    return {
        "requests": {
            "planned": log.planned,
            "unsent": log.planned - len(log),
            "warm_up": int((~counted).sum()),
            **requests,
            "in_time": int(in_time.sum()),
            "late": int((answered & ~in_time).sum()),
        },
        "odd_clients": {
            name: outcomes(log, counted & (log.kind == kind))
            for kind, name in _KINDS.items()
            if (log.kind == kind).any()
        },
        "errors": _errors(log, plain),
        "shares": {
            name: _share(requests[name], sent) for name in ("answered", "refused", "expired", "failed", "unanswered")
        }
        | {"in_time": _share(int(in_time.sum()), sent)},
        "images": _images(log.images[plain[of]], in_time, images_sent, labelled),
        "latency_ms": {
            "all": _quantiles(1000 * log.took[answered]),
            "by_exit": {str(exit_): _quantiles(1000 * log.took[_requests(rows, exit_)]) for exit_ in _exits(rows)},
        },
        "server_ms": {
            str(exit_): {
                part: _quantiles(rows[rows[:, _COLUMN["exit"]] == exit_, _COLUMN[part]])
                for part in ("queue", "compute", "total")
            }
            for exit_ in _exits(rows)
        },
        "rates": _rates(counted, answered, in_time, len(rows), seconds),
        "driver": {
            "late_ms": None if closed else _quantiles(1000 * log.late[counted]),
            "cpu_us_per_request": 1e6 * log.cpu_s / max(1, len(log)),
        },
        "curves": _curves(log, answered, rows),
        "over_time": _over_time(log, plain, answered, in_time, warm_up, seconds),
    }


def doubts(document: dict[str, Any]) -> list[str]:
    """Why the results are not to be trusted; nothing where the driver kept up."""
    found = []
    late, p99 = document["driver"]["late_ms"], document["latency_ms"]["all"]
    if late is not None and late["count"]:
        limit = max(MOST_LATE_MS, MOST_LATE_SHARE * p99["p99"]) if p99["count"] else MOST_LATE_MS
        if late["p99"] > limit:
            found.append(
                f"the driver was late by p99 {late['p99']:.1f} ms (limit {limit:.1f}): results are not to be trusted"
            )
    ceiling, offered = document["driver"].get("ceiling_per_s"), document["rates"]["offered_per_s"]
    if ceiling is not None and offered > MOST_OF_CEILING * ceiling:
        found.append(
            f"the load, {offered:.0f} requests/s, is {offered / ceiling:.0%} of what the driver can send at all, "
            f"{ceiling:.0f}: use more --processes"
        )
    for error in sorted(_OF_THE_DRIVER & document["errors"].keys()):
        found.append(f"{document['errors'][error]} requests failed for the driver's own sake: {error}")
    return found


def outcomes(log: Log, chosen: Any) -> dict[str, int]:
    counts = np.bincount(log.outcome[chosen], minlength=len(Outcome)).tolist()
    return {"sent": int(chosen.sum()), **{outcome.name.lower(): counts[outcome] for outcome in Outcome}}


def _errors(log: Log, chosen: Any) -> dict[str, int]:
    codes = Counter(log.error[chosen & (log.error >= 0)].tolist())
    named = {log.errors[code]: count for code, count in codes.most_common(MOST_ERRORS)}
    others = codes.total() - sum(named.values())
    return named | ({"other causes": others} if others else {})


def _images(rows: Floats, in_time: Any, sent: int, labelled: int) -> dict[str, Any]:
    exit_, right = rows[:, _COLUMN["exit"]], rows[:, _COLUMN["right"]]
    timely = in_time[rows[:, _COLUMN["request"]].astype(np.int64)]
    correct, correct_in_time = int((right == 1).sum()), int(((right == 1) & timely).sum())
    return {
        "sent": sent,
        "answered": len(rows),
        "degraded": int(rows[:, _COLUMN["degraded"]].sum()),
        "gmacs": _mean(rows[:, _COLUMN["gmacs"]]),
        "by_exit": {str(number): int((exit_ == number).sum()) for number in _exits(rows)},
        "labelled": labelled,
        "correct": correct,
        "correct_in_time": correct_in_time,
        "accuracy": _share(correct, int((right >= 0).sum())),
        "correct_in_time_share": _share(correct_in_time, labelled),
    }


def _rates(counted: Any, answered: Any, in_time: Any, images: int, seconds: float) -> dict[str, float]:
    """A second of the load. Answers that came after its end are answers to it."""
    return {
        "seconds": seconds,
        "offered_per_s": float(counted.sum()) / seconds,
        "answers_per_s": float(answered.sum()) / seconds,
        "in_time_per_s": float(in_time.sum()) / seconds,
        "images_per_s": images / seconds,
    }


def _curves(log: Log, answered: Any, rows: Floats) -> dict[str, Any]:
    """Latencies in milliseconds, rising: all of them, or so many at equal steps of probability, from 0 to 1."""
    return {
        "all": _curve(log.took[answered]),
        "by_exit": {str(exit_): _curve(log.took[_requests(rows, exit_)]) for exit_ in _exits(rows)},
    }


def _curve(took: Floats) -> list[float]:
    if not len(took):
        return []
    return np.round(1000 * np.quantile(took, np.linspace(0, 1, min(POINTS, len(took)))), 4).tolist()  # type: ignore[no-any-return]


def _over_time(log: Log, plain: Any, answered: Any, in_time: Any, warm_up: float, seconds: float) -> dict[str, Any]:
    """By the moment of the request, in equal slices."""
    slices = max(1, min(SLICES, int(plain.sum()) // 25))
    edges = np.linspace(warm_up, warm_up + seconds, slices + 1)

    def per_s(chosen: Any) -> list[float]:
        return np.round(np.histogram(log.due[chosen], edges)[0] * slices / seconds, 3).tolist()  # type: ignore[no-any-return]

    at = np.clip(np.digitize(log.due, edges) - 1, 0, slices - 1)
    p99 = [
        1000 * float(np.quantile(log.took[mine], 0.99)) if (mine := answered & (at == n)).any() else None
        for n in range(slices)
    ]
    return {
        "slice_s": seconds / slices,
        "sent_per_s": per_s(plain),
        "answered_per_s": per_s(answered),
        "in_time_per_s": per_s(in_time),
        "p99_ms": p99,
    }


def _requests(rows: Floats, exit_: int) -> Any:
    """Of every image that left there, its request."""
    return rows[rows[:, _COLUMN["exit"]] == exit_, _COLUMN["request"]].astype(np.int64)


def _exits(rows: Floats) -> Sequence[int]:
    return np.unique(rows[:, _COLUMN["exit"]]).astype(int).tolist()  # type: ignore[no-any-return]


def _quantiles(values: Floats) -> dict[str, Any]:
    values = values[np.isfinite(values)]
    if not len(values):
        return {"count": 0, "mean": None, **dict.fromkeys(QUANTILES)}
    found = np.quantile(values, list(QUANTILES.values())).tolist()
    return {"count": len(values), "mean": float(values.mean()), **dict(zip(QUANTILES, found, strict=True))}


def _mean(values: Floats) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _share(count: int, of: int) -> float | None:
    return count / of if of else None
