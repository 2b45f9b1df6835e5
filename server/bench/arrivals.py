"""When requests come: generators of arrival times, and an importer for public traces.

Every generator takes a mean rate (arrivals a second), a length in seconds and a seed, and gives the arrival times that
fall into [0, seconds), rising, (N,) float64. The schedule is fixed in advance and does not wait for answers: open loop.
All raise ValueError for a rate or a length that is not above 0.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.documents import shown

Times = NDArray[np.float64]  # (N,) seconds, rising
_MOST = 10**8  # arrivals of a trace


def poisson(rate: float, seconds: float, seed: int) -> Times:
    return renewal(rate, seconds, seed, cv=1.0)


def renewal(rate: float, seconds: float, seed: int, *, cv: float) -> Times:
    """Independent gaps, Gamma distributed; `cv`: their standard deviation over their mean. 1 is Poisson, 8 very bursty.

    Raises ValueError for a `cv` that is not above 0.
    """
    _check(rate, seconds)
    if not cv > 0:
        raise ValueError(f"cv must be above 0, not {cv}")
    rng = np.random.default_rng(seed)
    shape = cv**-2
    return _within(seconds, rate, lambda count: rng.gamma(shape, 1 / (rate * shape), count))


def mmpp(rate: float, seconds: float, seed: int, *, burst: float = 3.0, share: float = 0.2, dwell_s: float) -> Times:
    """A Markov-modulated Poisson process of two states (Fischer and Meier-Hellstern, 1993).

    In the burst state arrivals come `burst` times as often as in the calm one; `share` of the time is burst, and a
    burst lasts `dwell_s` in the mean. The mean rate is `rate`. Raises ValueError for shares outside (0, 1), and for a
    burst or a dwell time that is not above 0.
    """
    _check(rate, seconds)
    if not (0 < share < 1 and burst > 0 and dwell_s > 0):
        raise ValueError(f"an MMPP needs 0 < share < 1, burst and dwell_s above 0, not {share}, {burst}, {dwell_s}")
    rng = np.random.default_rng(seed)
    calm = rate / (1 - share + share * burst)
    dwell = {True: dwell_s, False: dwell_s * (1 - share) / share}
    state = bool(rng.random() < share)
    parts, start = [], 0.0
    while start < seconds:
        end = min(seconds, start + rng.exponential(dwell[state]))
        count = rng.poisson((calm * burst if state else calm) * (end - start))
        parts.append(np.sort(rng.uniform(start, end, count)))
        start, state = end, not state
    return np.concatenate(parts)


def step(rate: float, seconds: float, seed: int, *, factor: float, start_s: float, end_s: float = math.inf) -> Times:
    """Poisson, `factor` times as many between `start_s` and `end_s`. `rate` is the rate outside of it.

    Raises ValueError for a factor below 0, or a step that ends before it starts.
    """
    _check(rate, seconds)
    if factor < 0 or not 0 <= start_s <= end_s:
        raise ValueError(f"a step needs factor >= 0 and 0 <= start_s <= end_s, not {factor}, {start_s}, {end_s}")
    rng = np.random.default_rng(seed)
    peak = max(rate, rate * factor)
    times = _within(seconds, peak, lambda count: rng.exponential(1 / peak, count))
    wanted = np.where((times >= start_s) & (times < end_s), rate * factor, rate)
    return times[rng.random(len(times)) * peak < wanted]  # thinning (Lewis and Shedler, 1979)


def steps(rates: Sequence[float], seconds: float, seed: int) -> Times:
    """Poisson, at each of these rates for an equal part of the time. A rate may be 0, where another is not."""
    _check(max(rates), seconds)
    if min(rates) < 0:
        raise ValueError(f"a rate cannot be below 0: {min(rates):g}")
    rng = np.random.default_rng(seed)
    part = seconds / len(rates)
    return np.concatenate(
        [np.sort(rng.uniform(n * part, (n + 1) * part, rng.poisson(rate * part))) for n, rate in enumerate(rates)]
    )


def evenly(rate: float, seconds: float, seed: int) -> Times:
    """One every 1 / rate seconds. No chance plays a part, nor the seed."""
    del seed
    _check(rate, seconds)
    return np.arange(math.ceil(rate * seconds)) / rate


def read_trace(
    path: Path,
    *,
    time: str,
    count: str | None = None,
    interval_s: float | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> Times:
    """Arrival times from a CSV with a header, such as the public traces of Azure Functions or of Twitter, or from JSON
    lines (`.jsonl`), one object each.

    `time` names the column of the time: seconds, or an ISO 8601 date and time. A file of bare numbers, one a line,
    needs no name. Alone, every line is one arrival. With
    `count`, a column of numbers of arrivals, every line stands for an interval of `interval_s` seconds from that time
    on (by default the smallest step between two lines), over which its arrivals are spread evenly at random. Lines may
    come in any order. The first arrival or interval begins at 0. `rate` rescales time so that this becomes the mean
    number of arrivals a second.

    Raises ValueError, naming the file and the line, for a column that is not there or a cell that is no number.
    """
    starts, counts = _columns(path, time, count)
    if not len(starts):
        raise ValueError(f"{path.name}: no line below the header")
    starts = starts - starts.min()
    if count is None:
        times, length = np.sort(starts), float(starts.max())
    else:
        steps = np.diff(np.unique(starts))
        if interval_s is None and not len(steps):
            raise ValueError(f"{path.name}: one interval only, so its length must be given")
        width = float(steps.min()) if interval_s is None else interval_s
        if not width > 0:
            raise ValueError(f"interval_s must be above 0, not {width}")
        if counts.sum() > _MOST:
            raise ValueError(f"{path.name}: more than {_MOST} arrivals")
        within = np.random.default_rng(seed).random(int(counts.sum()))
        times = np.sort(np.repeat(starts, counts) + within * width)
        length = float(starts.max()) + width
    if not len(times):
        raise ValueError(f"{path.name}: no arrivals")
    if rate is None:
        return times
    if not rate > 0:
        raise ValueError(f"the rate must be above 0, not {rate}")
    if not length > 0:
        raise ValueError(f"{path.name}: all arrivals at one moment have no rate")
    return times * (len(times) / length / rate)


def _check(rate: float, seconds: float) -> None:
    if not (0 < rate < math.inf and 0 < seconds < math.inf):
        raise ValueError(f"rate and seconds must be above 0 and finite, not {rate} and {seconds}")


def _within(seconds: float, rate: float, gaps: Callable[[int], Times]) -> Times:
    """The sums of gaps that stay below `seconds`; `gaps(count)` draws as many more."""
    times = np.cumsum(gaps(int(rate * seconds) + 16))
    while times[-1] < seconds:
        times = np.concatenate([times, times[-1] + np.cumsum(gaps(len(times)))])
    return times[times < seconds]


def _columns(path: Path, time: str, count: str | None) -> tuple[Times, NDArray[np.int64]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            bare = _is_number(file.readline())
            file.seek(0)
            if bare:
                return _read(
                    path, ((n, {time: line}) for n, line in enumerate(file, start=1) if line.strip()), time, None
                )
            if path.suffix.lower() == ".jsonl":
                return _read(path, ((n, _object(line)) for n, line in enumerate(file, start=1)), time, count)
            lines = csv.DictReader(file)
            for column in filter(None, (time, count)):
                if column not in (lines.fieldnames or ()):
                    known = ", ".join(lines.fieldnames or ["none"])
                    raise ValueError(f"{path.name}: no column {column!r} among {known[:200]}")
            return _read(path, enumerate(lines, start=2), time, count)
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}: not text in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path.name}: not readable as CSV ({error})") from None


def _read(
    path: Path, lines: Iterable[tuple[int, Mapping[str, Any]]], time: str, count: str | None
) -> tuple[Times, NDArray[np.int64]]:
    starts, counts = [], []
    for number, line in lines:
        try:
            starts.append(_seconds(line[time]))
            counts.append(1 if count is None else _whole(line[count]))
        except (LookupError, TypeError, ValueError, OverflowError):  # TypeError: a line with too few cells
            cells = ", ".join(shown(line.get(column)) for column in (time, count) if column)
            raise ValueError(f"{path.name}, line {number}: no time or number of arrivals: {cells}") from None
    return np.array(starts, dtype=np.float64), np.array(counts, dtype=np.int64)


def _object(line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _seconds(cell: Any) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = datetime.fromisoformat(cell.strip()).timestamp()
    if not math.isfinite(value):
        raise ValueError(cell)
    return value


def _whole(cell: Any) -> int:
    value = float(cell)
    if not value.is_integer() or not 0 <= value <= _MOST:
        raise ValueError(cell)
    return int(value)
