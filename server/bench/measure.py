"""The measurement from end to end: ask the server what it is, find the driver's ceiling, send, make figures."""

from __future__ import annotations

import asyncio
import datetime
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import orjson

from server import release
from server.bench import arrivals
from server.bench.arrivals import Times
from server.bench.ceiling import ceiling
from server.bench.figures import SCHEMA, doubts, figures
from server.bench.orders import Client as Kind
from server.bench.orders import Manners, Order, Outcome
from server.bench.senders import DriverFailed, Senders, orders_of, soon
from server.bench.workload import Workload, workload
from server.client import Client, ClientError, NotOurs, Refused

CAPACITY_CLIENTS, CAPACITY_S, CAPACITY_SETTLE_S = 32, 2.0, 1.0
DEFAULT_RATE, DEFAULT_SECONDS = 50.0, 10.0
MOST_REQUESTS = 10**7
_BUSY = (503, 504)  # which a load may find out

Progress = Callable[[float, float], object]  # seconds of the load so far, and of all of it


class NoLoad(ValueError):
    """What was asked for is no load. In one line."""


@dataclass(frozen=True)
class Load:
    """What is to be measured. `rates` are requests a second, or multiples of the capacity where `relative`."""

    images: Path | None = None
    distinct: int = 50
    together: int = 1
    rates: tuple[float, ...] = ()
    relative: bool = False
    arrivals: str = "poisson"  # or gamma, mmpp, even; ignored where there are several rates
    cv: float = 4.0
    burst: float = 3.0
    trace: Path | None = None
    trace_time: str = "timestamp"
    trace_count: str | None = None
    clients: int | None = None
    seconds: float | None = None
    requests: int | None = None
    warm_up: float = 1.0
    timeout_ms: float | None = None
    top_k: int = 1
    max_exit: int | None = None
    min_confidence: float | None = None
    priority: str | None = None
    leaving: float = 0.0
    slow: float = 0.0
    spoilt: float = 0.0
    give_up: float = 30.0
    processes: int = 1
    seed: int = 0

    @property
    def query(self) -> str:
        """The server is told the deadline that it is judged by."""
        names = ("top_k", "timeout_ms", "max_exit", "min_confidence", "priority")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return urlencode({n: format(v, ".12g") if isinstance(v, float) else v for n, v in given.items()})

    @property
    def shown(self) -> dict[str, Any]:
        """As it can be read elsewhere: of paths only the last part."""
        return {name: value.name if isinstance(value, Path) else value for name, value in asdict(self).items()}


def measure(url: str, load: Load, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """The document of `figures`, with all that is to be known of the load, the driver and the server.

    Raises NoLoad, ClientError for a server that is none, WorkloadError, and DriverFailed.
    """
    # What is no load is told before anything runs.
    _times(replace(load, rates=(), relative=False) if load.relative else load, 1.0)
    about = asyncio.run(_about(url))
    work = workload(load.images, images=load.distinct, together=load.together, labels=_labels(about), seed=load.seed)
    answer = asyncio.run(_first_answer(url, load, work))
    path = f"{url}/classify?{load.query}"
    with Senders(load.processes, work.bodies) as senders:
        top = ceiling(senders, answer, len(work.bodies))
        capacity = _capacity(senders, path, load, work) if load.relative else None
        times, seconds = _times(load, capacity or 1.0)
        which, kinds = _chosen(load, work, max(len(times), 4096 if load.clients else 0))
        order = Order(path, soon(len(times)), times, which, kinds, Manners(give_up_s=load.give_up), load.clients or 0)
        began = time.monotonic()
        until = float(times[-1])
        log, interrupted = senders.carry_out(
            orders_of(senders.count, order), lambda: progress(min(until, time.monotonic() - began), until)
        )
    seconds = min(seconds, max(log.seconds - load.warm_up, 1e-3)) if interrupted else seconds
    after = asyncio.run(_about(url, lost=True))
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "release": release(),
        "machine": f"{platform.system()} {platform.machine()}",
        "url": url,
        "load": load.shown | {"capacity_per_s": capacity, "images_from": work.source, "distinct": work.images},
        "interrupted": interrupted,
        "server": {"before": about, "after": after},
    }
    document |= figures(
        log,
        work.bodies,
        warm_up=load.warm_up,
        seconds=seconds,
        timeout_ms=load.timeout_ms,
        closed=load.clients is not None,
    )
    document["driver"] |= {
        "processes": load.processes, "ceiling_per_s": top.per_s, "ceiling_cpu_us_per_request": top.cpu_us
    }  # fmt: skip
    document["doubts"] = doubts(document)
    return document


# --- the server -------------------------------------------------------------------------------------------------------


async def _about(url: str, lost: bool = False) -> dict[str, Any] | None:
    """Model and budget, each None where the server does not tell; None at all where it is lost, and may be."""
    found: dict[str, Any] = {"model": None, "budget": None}
    async with Client(url) as client:
        for name in found:
            try:
                found[name] = await client.get(f"/{name}")
            except ClientError as error:
                if isinstance(error, Refused | NotOurs):
                    continue
                if lost:
                    return None
                raise
    return found


def _labels(about: dict[str, Any] | None) -> list[str]:
    labels = ((about or {}).get("model") or {}).get("labels")
    return [label for label in labels if isinstance(label, str)] if isinstance(labels, list) else []


async def _first_answer(url: str, load: Load, work: Workload) -> bytes:
    """To one request, so that a load that the server will not take is told at once. Raises ClientError."""
    body = work.bodies[0]
    async with Client(url, timeout_s=load.give_up) as client:
        try:
            answer = await client.post(f"/classify?{load.query}", body.content, body.content_type)
        except Refused as error:
            if error.status not in _BUSY:
                raise
            return orjson.dumps({"results": [{"exit": 1, "predictions": [{"label": ""}]}] * load.together})
    results = answer.get("results")
    if not isinstance(results, list) or len(results) != load.together:
        raise client.not_ours("/classify")
    return orjson.dumps(answer)


def _capacity(senders: Senders, path: str, load: Load, work: Workload) -> float:
    """Requests a second that are answered to clients who ask again at once."""
    plain = replace(load, leaving=0.0, slow=0.0, spoilt=0.0)
    which, kinds = _chosen(plain, work, 4096)
    end = np.array([CAPACITY_SETTLE_S + CAPACITY_S])
    order = Order(path, soon(), end, which, kinds, Manners(give_up_s=load.give_up), CAPACITY_CLIENTS)
    log, interrupted = senders.carry_out(orders_of(senders.count, order))
    if interrupted:
        raise KeyboardInterrupt
    done = log.due + log.took
    steady = (log.outcome == Outcome.ANSWERED) & (done >= CAPACITY_SETTLE_S) & (done < end)
    if not steady.any():
        raise DriverFailed("the server answered nothing while its capacity was measured")
    return float(steady.sum()) / CAPACITY_S


# --- the schedule -----------------------------------------------------------------------------------------------------


def _times(load: Load, unit: float) -> tuple[Times, float]:
    """All moments, those of the warm-up first, and the seconds of what is measured. Raises NoLoad."""
    rates = [rate * (unit if load.relative else 1.0) for rate in load.rates]
    try:
        if load.clients is not None:
            seconds = load.seconds or DEFAULT_SECONDS
            return np.array([load.warm_up + seconds]), seconds
        if load.trace is not None:
            times = arrivals.read_trace(
                load.trace,
                time=load.trace_time,
                count=load.trace_count,
                rate=rates[0] if rates else None,
                seed=load.seed,
            )
            seconds = load.seconds or float(times[-1]) + 1e-9
            first = len(times) / max(float(times[-1]), 1e-3)
        else:
            first = rates[0] if rates else DEFAULT_RATE
            mean = sum(rates) / len(rates) if rates else DEFAULT_RATE
            seconds = load.seconds or (DEFAULT_SECONDS if load.requests is None else load.requests / mean)
            times = _drawn(load, rates or [first], seconds)
            while load.seconds is None and load.requests is not None and len(times) < load.requests:
                seconds *= 2
                times = _drawn(load, rates or [first], seconds)
        times = times[times < seconds]
        if load.requests is not None and len(times) > load.requests:
            times = times[: load.requests]
            seconds = float(times[-1]) + 1e-9
        if len(times) > MOST_REQUESTS:
            raise NoLoad(f"{len(times)} requests are too many: at most {MOST_REQUESTS}")
        if not len(times):
            raise NoLoad("not one request would be sent: more --seconds, or a higher --rate")
        warm = _bounded(first, load.warm_up) and arrivals.poisson(max(first, 1e-9), load.warm_up, load.seed + 1)
        return np.concatenate([warm if load.warm_up else [], load.warm_up + times]), seconds
    except OSError as error:
        raise NoLoad(f"{error.filename}: {str(error.strerror).lower()}") from None
    except ValueError as error:
        raise NoLoad(str(error)) from None


def _drawn(load: Load, rates: list[float], seconds: float) -> Times:
    _bounded(max(rates), seconds)
    if len(rates) > 1:
        return arrivals.steps(rates, seconds, load.seed)
    (rate,) = rates
    match load.arrivals:
        case "gamma":
            return arrivals.renewal(rate, seconds, load.seed, cv=load.cv)
        case "mmpp":
            return arrivals.mmpp(rate, seconds, load.seed, burst=load.burst, dwell_s=min(1.0, seconds / 10))
        case "even":
            return arrivals.evenly(rate, seconds, load.seed)
        case _:
            return arrivals.poisson(rate, seconds, load.seed)


def _bounded(rate: float, seconds: float) -> bool:
    if rate * seconds > MOST_REQUESTS:
        raise NoLoad(f"{rate:g} requests a second for {seconds:g} seconds are too many: at most {MOST_REQUESTS}")
    return seconds > 0


def _chosen(load: Load, work: Workload, count: int) -> tuple[Any, Any]:
    """Which body each request has, every one as often as any other, and what kind of client sends it."""
    rng = np.random.default_rng(load.seed + 2)
    rounds = -(-count // work.sound)
    which = np.concatenate([rng.permutation(work.sound) for _ in range(rounds)])[:count]
    odd = (load.leaving, load.slow, load.spoilt)
    kinds = rng.choice(len(Kind), size=count, p=[max(0.0, 1 - sum(odd)), *odd])
    spoilt = kinds == Kind.SPOILT
    which[spoilt] = rng.integers(work.sound, len(work.bodies), int(spoilt.sum()))
    return which, kinds
