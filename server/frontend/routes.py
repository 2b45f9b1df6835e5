"""What each path does: parse, ask the part that owns the answer, shape the answer. No route has a `try` for errors.

The answers of the hot path are plain dicts for orjson; the models in `schemas` describe them, and a test holds the two
together.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from server import metrics
from server.budget.controller import TARGETS, BudgetState
from server.budget.fleet import EXPIRES_S, LONGEST_S
from server.bundle.manifest import Manifest
from server.cascade.scheduler import HIGH, LOW, NORMAL, Priority
from server.core import Answer, ImageResult, Pixels
from server.errors import InvalidRequest, NotReady
from server.frontend.bodies import BodyLimits, read_images, read_json
from server.frontend.edge import Endpoint, WhileConnected
from server.frontend.front import Front
from server.frontend.origin import check_origin

if TYPE_CHECKING:
    from server.service import Service

_BUDGET_LIMITS = BodyLimits(max_bytes=16 * 1024, max_images=0)
_AT_ONCE = 1000  # predictions that are told between two turns of the event loop: about a millisecond
PRIORITIES: dict[str, Priority] = {"high": HIGH, "normal": NORMAL, "low": LOW}
_NAMES = {priority: name for name, priority in PRIORITIES.items()}


def _front(request: Request) -> Front:
    front: Front = request.scope["app"].state.service
    return front


def _service(request: Request) -> Service:
    service: Service = request.scope["app"].state.service
    return service


def json_response(body: object, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


class Document(Response):
    """JSON as it is, with no look at what else a response can be."""

    def __init__(self, body: bytes) -> None:
        self.status_code, self.background, self.body = 200, None, body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]


# --- POST /classify -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """The query of POST /classify."""

    top_k: int
    timeout_s: float
    max_exit: int | None = None
    min_confidence: float | None = None
    priority: Priority = NORMAL

    @property
    def steered(self) -> bool:
        """Whether the request itself moved the exits, so that its cost says nothing of the live thresholds."""
        return self.max_exit is not None or self.min_confidence is not None


def parse_ask(query: bytes, *, top_k: int, timeout_ms: float, max_timeout_ms: float, exits: int) -> Ask:
    """Raises InvalidRequest that names the parameter."""
    if not query:
        return Ask(top_k, timeout_ms / 1000)
    given = _parameters(query, ("top_k", "timeout_ms", "max_exit", "min_confidence", "priority"))
    if "top_k" in given:
        top_k = _whole("top_k", given["top_k"], 1, None)
    if "timeout_ms" in given:
        timeout_ms = _number("timeout_ms", given["timeout_ms"])
        if not 0 < timeout_ms <= max_timeout_ms:
            raise InvalidRequest(f"timeout_ms must be above 0 and at most {max_timeout_ms:g}", field="timeout_ms")
    max_exit = _whole("max_exit", given["max_exit"], 1, exits) if "max_exit" in given else None
    min_confidence = None
    if "min_confidence" in given:
        min_confidence = _number("min_confidence", given["min_confidence"])
        if not 0 <= min_confidence <= 1:
            raise InvalidRequest("min_confidence must lie between 0 and 1", field="min_confidence")
    priority = NORMAL
    if "priority" in given:
        if given["priority"] not in PRIORITIES:
            raise InvalidRequest(f"priority is one of {', '.join(PRIORITIES)}", field="priority")
        priority = PRIORITIES[given["priority"]]
    return Ask(top_k, timeout_ms / 1000, max_exit, min_confidence, priority)


def _parameters(query: bytes, known: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in known:
            there = f"{', '.join(known[:-1])} and {known[-1]}"
            raise InvalidRequest(f"There is no query parameter {name[:40]!r}; there are {there}", field=name[:40])
        if name in given:
            raise InvalidRequest(f"{name} is given twice", field=name)
        given[name] = value
    return given


def _whole(name: str, text: str, low: int, high: int | None) -> int:
    number = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1
    if number < low or (high is not None and number > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequest(f"{name} must be a whole number, {span}", field=name)
    return number


def _number(name: str, text: str) -> float:
    """Not with `float` alone: it takes other scripts, blanks, signs, `1_000`, `1e2` and `inf`."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text):
        raise InvalidRequest(f"{name} must be a decimal number, as 250 or 0.25", field=name)
    return float(text)


async def classify(request: Request) -> Response:
    front = _front(request)
    settings, clock = front.settings, front.clock
    front.check_door()
    ask = parse_ask(
        request.scope["query_string"],
        top_k=settings.top_k,
        timeout_ms=settings.timeout_ms,
        max_timeout_ms=settings.max_timeout_ms,
        exits=front.exits,
    )
    hurried = ask.timeout_s < min(metrics.PROMISED_S, settings.timeout_ms / 1000)
    request.scope["state"]["asked"] = (_NAMES[ask.priority], "true" if hurried else "false")
    request_id = request.scope["state"]["request_id"]
    with front.intake.enter() as visit:
        encoded = await read_images(dict(request.scope["headers"]), request.receive, front.body_limits, visit.hold)
        visit.begin()
        front.note_arrival(len(encoded), ask.timeout_s, ask.priority)
        front.check_queue(ask.priority)
        arrived, waited_s = clock(), _waited_s(request)
        deadline = arrived + front.answer_time.within(ask.timeout_s, waited_s)
        with WhileConnected(request.scope["state"]):
            pixels = await front.decoder.decode(encoded, deadline, ask.priority)
            decoded = clock()
            answer = await front.submit(
                pixels,
                arrived=arrived,
                deadline=deadline,
                max_exit=ask.max_exit,
                min_confidence=ask.min_confidence,
                priority=ask.priority,
                place=front.places.of(request_id),
            )
        answered = clock()
        decode_s, total_s = decoded - arrived, answered - arrived
        body = await shape_answer(front.manifest, front.stage_gmacs, answer, ask.top_k, decode_s, total_s)
    # When the answer is on its way, not before.
    asyncio.get_running_loop().call_soon(_record, front, pixels, answer, decode_s, total_s, waited_s, answered, ask)
    return Document(orjson.dumps(body))


def _waited_s(request: Request) -> float:
    """How long all of it has been there for us to read. Servers other than ours do not tell."""
    waited_s: Callable[[], float] | None = request.scope["state"].get("waited_s")
    return 0.0 if waited_s is None else waited_s()


def _record(
    front: Front,
    pixels: Sequence[Pixels],
    answer: Answer,
    decode_s: float,
    total_s: float,
    waited_s: float,
    answered: float,
    ask: Ask,
) -> None:
    front.answer_time.observe(answer.decided, answered)
    front.counts.decoded(decode_s)
    front.counts.answered(_NAMES[ask.priority], waited_s + total_s)
    front.note_answer(pixels, answer, total_s, steered=ask.steered, low=ask.priority == LOW)


async def shape_answer(
    manifest: Manifest, gmacs: Sequence[float], answer: Answer, top_k: int, decode_s: float, total_s: float
) -> dict[str, Any]:
    """Image by image, with turns of the event loop in between where there is much to tell: all of a thousand classes of
    64 images take it a tenth of a second."""
    top_k = min(top_k, len(manifest.labels))
    results, told = [], 0
    for result in answer.results:
        if told >= _AT_ONCE:
            await asyncio.sleep(0)
            told = 0
        shaped = shape_result(result, manifest.labels, top_k, gmacs, decode_s, total_s)
        results.append(orjson.Fragment(orjson.dumps(shaped)))
        told += top_k
    return {
        "model": manifest.name,
        "version": manifest.version,
        "budget_version": answer.point.version,
        "results": results,
    }


def shape_result(
    result: ImageResult, labels: Sequence[str], top_k: int, gmacs: Sequence[float], decode_s: float, total_s: float
) -> dict[str, Any]:
    return {
        "predictions": predictions(result, labels, top_k),
        "exit": result.exit,
        "confidence": round(result.confidence, 6),
        "degraded": result.degraded,
        "gmacs": gmacs[result.exit - 1],
        "timing_ms": {
            "decode": round(decode_s * 1000, 3),
            "queue": round(result.queue_s * 1000, 3),
            "compute": round(result.compute_s * 1000, 3),
            "total": round(total_s * 1000, 3),
        },
    }


def predictions(result: ImageResult, labels: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """The `top_k` most probable classes, equal ones by class id."""
    probabilities = result.probabilities
    order = (-probabilities).argsort(kind="stable")[:top_k].tolist()
    return [
        {"label": labels[id_], "class_id": id_, "probability": round(float(probabilities[id_]), 6)} for id_ in order
    ]


# --- the budget ---------------------------------------------------------------------------------------------------


async def get_budget(request: Request) -> Response:
    service = _service(request)
    return _budget_response(service, service.budget.state())


async def put_budget(request: Request) -> Response:
    service = _service(request)
    headers = dict(request.scope["headers"])
    check_origin(headers)
    service.control_token.check(headers)
    service.check_door()
    expires_s = parse_scope(request.scope["query_string"])
    target, hold, mix = await _read_target(request)
    service.check_door()  # a body takes its time
    if_match = _if_match(request.headers.getlist("if-match"))
    request_id = request.scope["state"]["request_id"]
    if expires_s is not None:
        state = service.fleet.put_here(target, hold, if_match, mix=mix, expires_s=expires_s)
    else:
        by = f"{request.client.host if request.client else 'somebody'}, request {request_id}"
        at = datetime.now(UTC).isoformat(timespec="seconds")
        state = await service.budget.put(target, hold, if_match, mix=mix, by=by, at=at)
    service.note_budget(state, request.client, request_id, expires_s)
    return _budget_response(service, state)


def parse_scope(query: bytes) -> float | None:
    """For how many seconds PUT /budget is to be this replica's alone; None: it is the fleet's, for good. Raises
    InvalidRequest that names the parameter."""
    given = _parameters(query, ("scope", "expires_s"))
    scope = given.get("scope", "fleet")
    if scope not in ("fleet", "replica"):
        raise InvalidRequest("scope is one of fleet, replica", field="scope")
    if scope == "fleet":
        if "expires_s" in given:
            raise InvalidRequest("expires_s goes with scope=replica", field="expires_s")
        return None
    expires_s = _number("expires_s", given.get("expires_s", f"{EXPIRES_S}"))
    if not 0 < expires_s <= LONGEST_S:
        raise InvalidRequest(f"expires_s must be above 0 and at most {LONGEST_S:g}", field="expires_s")
    return expires_s


async def preview_budget(request: Request) -> Response:
    """No token, also where PUT asks for one: it changes nothing, and tells no more than GET /budget and /frontier."""
    service = _service(request)
    target, hold, mix = await _read_target(request)
    solution = service.budget.solve(target, hold, mix)
    found = service.previewer.preview(solution, service.budget.point, service.drift.confidences())
    return json_response(found, {"cache-control": "no-store"})


async def _read_target(request: Request) -> tuple[dict[str, Any], str, bool]:
    document = await read_json(dict(request.scope["headers"]), request.receive, _BUDGET_LIMITS)
    if not isinstance(document, dict):
        raise InvalidRequest('The body must be an object such as {"gmacs": 0.03}')
    return _target(document)


def _target(document: dict[str, Any]) -> tuple[dict[str, Any], str, bool]:
    """Target, hold and mix, as they were sent."""
    for name in document:
        if name not in (*TARGETS, "quantile", "hold", "mix"):
            raise InvalidRequest(f"There is no {name[:40]!r} in a budget", field=name[:40])
    target = {name: document[name] for name in (*TARGETS, "quantile") if name in document}
    return target, document.get("hold", "cost"), document.get("mix", False)


_LISTED_TAG = re.compile(r'[ \t]*+(?:(W/)?"([\x21\x23-\x7e\x80-\xff]*+)")?[ \t]*+(?:,|\Z)')  # or nothing between commas
_VERSION = re.compile(r"0|-?[1-9][0-9]{0,15}")


def _if_match(lines: Sequence[str]) -> frozenset[int] | Literal["*"] | None:
    """RFC 9110, 13.1.1: `*`, or a list of entity tags, on any number of lines. Ours is the version in quotes; a weak
    tag never matches. The versions that are named; raises InvalidRequest for what is no such list: it may be meant to
    match."""
    if not lines:
        return None
    header = ",".join(lines)
    if header.strip(" \t") == "*":
        return "*"
    at, named = 0, set()
    while at < len(header):
        found = _LISTED_TAG.match(header, at)
        if found is None:
            raise InvalidRequest('If-Match must be * or a list of tags such as "7"', field="If-Match")
        at = found.end()
        if found[1] is None and found[2] is not None and _VERSION.fullmatch(found[2]):
            named.add(int(found[2]))
    return frozenset(named)


def _budget_response(service: Service, state: BudgetState) -> Response:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}  # orjson knows dataclasses
    body = {**fields, "audit": service.audit.state(), "drift": service.drift.state(), "fleet": service.fleet.state()}
    return json_response(body, {"etag": f'"{state.version}"', "cache-control": "no-store"})


# --- the rest -----------------------------------------------------------------------------------------------------


async def get_frontier(request: Request) -> Response:
    return Response(_service(request).frontier_document, media_type="application/json")


async def get_model(request: Request) -> Response:
    return Response(_service(request).model_document, media_type="application/json")


async def livez(request: Request) -> Response:
    service = _service(request)
    await service.refresh()
    if (ailment := service.ailment) is not None:
        raise NotReady(ailment)
    return json_response({"status": "alive"})


async def readyz(request: Request) -> Response:
    service = _service(request)
    await service.refresh()
    if not service.ready:
        raise NotReady(service.ailment or f"The server is {service.phase.value}")
    return json_response({"status": "ready"})


async def get_metrics(request: Request) -> Response:
    service = _service(request)
    await service.refresh()
    return Response(service.metrics.render(), headers={"content-type": metrics.CONTENT_TYPE})


def other_methods(allowed: Sequence[str]) -> Endpoint:
    """The endpoint of a path for the methods that no route of it takes."""
    allow = ", ".join(allowed)

    async def answer(request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": allow})
        raise HTTPException(405, headers={"allow": allow})

    return answer


async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
    """What no path is for. `OPTIONS *` asks whether there is an HTTP server (RFC 9110, 9.3.7)."""
    if scope["path"] != "*":
        raise HTTPException(404)
    await Response(status_code=204)(scope, receive, send)


async def docs(_: Request) -> Response:
    return HTMLResponse(await asyncio.to_thread(_docs))


async def openapi(_: Request) -> Response:
    return Document(await asyncio.to_thread(_openapi))


ROUTES: list[tuple[str, str, Endpoint]] = [  # path, method, endpoint; the busiest first
    ("/classify", "POST", classify),
    ("/budget", "GET", get_budget),
    ("/budget", "PUT", put_budget),
    ("/budget/preview", "POST", preview_budget),
    ("/livez", "GET", livez),
    ("/readyz", "GET", readyz),
    ("/metrics", "GET", get_metrics),
    ("/frontier", "GET", get_frontier),
    ("/model", "GET", get_model),
    ("/docs", "GET", docs),
    ("/openapi.json", "GET", openapi),
]


# FastAPI, which writes both, would cost each start a tenth of a second, and each server 10 MB.


@functools.cache
def _docs() -> bytes:
    from server.frontend import schemas

    return schemas.page("/openapi.json", "/docs/assets")


@functools.cache
def _openapi() -> bytes:
    from server.frontend import schemas

    return schemas.document(ROUTES)
