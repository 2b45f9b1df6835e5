"""The HTTP contract as OpenAPI sees it: models of bodies and answers, parameters, errors. Documentation only.

Requests are not parsed with these models and answers are not built from them (that would cost more than the rest of
the route); tests hold the real answers against them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import orjson
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.responses import PlainTextResponse

from server import errors
from server.budget.fleet import EXPIRES_S, LONGEST_S
from server.bundle.frontier import Criterion
from server.frontend import images
from server.frontend.edge import PROBLEM, Endpoint

TITLE = "DVT Serve"
CONTRACT = "1.0"  # of the document: additions raise the second number, anything else the first
DESCRIPTION = """\
Classifies images with a Dynamic Vision Transformer: a cascade of stages, where an image leaves at the first exit whose
confidence reaches that exit's threshold. `PUT /budget` moves the thresholds, and so the cost, while the server runs.

Errors are `application/problem+json` (RFC 9457); `code` names the cause. Every answer carries `X-Request-ID`: the one
that was sent (letters, digits, `.`, `_`, `-`; at most 64), or a new one.
"""
TAGS = [
    {"name": "classify", "description": "Images in, labels out."},
    {"name": "budget", "description": "Where on the accuracy/cost curve the server runs."},
    {"name": "server", "description": "What is served, and how it is."},
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Prediction(_Model):
    label: str
    class_id: int
    probability: float = Field(ge=0, le=1)


class Timing(_Model):
    decode: float = Field(description="Decoding of all images of the request, the wait for a thread included.")
    queue: float = Field(description="Waiting for the engine, all stages.")
    compute: float = Field(description="Wall time of the batches that the image took part in.")
    total: float = Field(description="From the last byte of the body to the answer.")


class Result(_Model):
    predictions: list[Prediction] = Field(description="The `top_k` most probable classes, the most probable first.")
    exit: int = Field(ge=1, description="The exit at which the image left; counts from 1.")
    confidence: float = Field(ge=0, le=1, description="At that exit, by the model's `criterion`.")
    degraded: bool = Field(description="A deadline, not a threshold, ended the cascade.")
    gmacs: float = Field(description="Cumulative cost at that exit, billions of multiply-accumulates.")
    timing_ms: Timing


class Classification(_Model):
    model: str
    version: str
    budget_version: int = Field(description="The version of the budget whose thresholds judged all images.")
    results: list[Result] = Field(description="One per image, in order.")


class Images(_Model):
    images: list[str] = Field(
        min_length=1,
        description="Image files in base64: padded or not, in lines or not, of either alphabet, also as `data:` URLs.",
    )


class Predicted(_Model):
    """Null throughout: thresholds that an operator gave, on a frontier that was imported without records."""

    accuracy: float | None
    gmacs: float | None
    exit_fractions: list[float] | None


class Latency(_Model):
    p50: float | None
    p99: float | None


class Observed(_Model):
    images: int = Field(description="How many images this speaks of: the last ones under this budget.")
    gmacs: float | None
    exit_fractions: list[float] | None
    latency_ms: Latency


class Interval(_Model):
    """Null before the first audit."""

    mean: float | None
    low: float | None
    high: float | None


class Audited(_Model):
    """What audits say of some answers."""

    chosen: int = Field(description="Requests that were chosen, with one image of each.")
    images: int = Field(description="That were audited.")
    represented: int = Field(description="Of `chosen`: the requests that these stand for. The others wait, or failed.")
    audited_ratio: float | None = Field(description="`images` of `chosen`; null before the first.")
    agreement: Interval = Field(description="Share to which the last exit gives the class that was answered.")
    accuracy_gap: Interval = Field(
        description="How much less probable the last exit finds the class that was answered than its own: the accuracy "
        "that leaving early costs, where the last exit is calibrated."
    )


class Audit(Audited):
    """What the last exit says of the answers under this budget: a share of the requests is completed behind them."""

    pending: int = Field(description="Images of chosen requests, under whatever budget, that wait to be audited.")
    confidence: float = Field(description="Of each interval, at all times at once.")
    since_start: Audited = Field(description="The same over all budgets since the process started.")


class Drift(_Model):
    """The last images against those of the calibration."""

    images: int = Field(description="How many images this looks back upon.")
    psi: float | None = Field(
        description="Of confidence at exit 1, over deciles; above 0.2 it alarms where chance does not explain it. "
        "Null: too few."
    )
    z: list[float] | None = Field(
        description="Per exit, of the share that leaves there, in standard errors of images that may come in runs; "
        "beyond 5 it alarms. Null: too few yet, or nothing is known of the thresholds in force."
    )
    alarm: bool
    reasons: list[Literal["psi", "exit_fractions"]]


class Refused(_Model):
    reason: Literal["nonsense", "other_model", "unfit"]
    detail: str


class Fleet(_Model):
    """The budget that all replicas share, as this one knows it."""

    store: Literal["file", "memory", "configmap"]
    generation: int = Field(description="The version of what the store holds.")
    applied: int = Field(
        description="The version of the fleet's budget that is in force here, or will be once this replica's own ends."
    )
    source: Literal["store", "last_known", "seed", "default", "replica"] = Field(
        description="Where the budget in force comes from; `last_known`: what was in force before a restart, as the "
        "store has not been heard of yet; `replica`: it is this replica's own."
    )
    set_at: str | None = Field(description="When the fleet's budget was asked for.")
    expires_in_s: float | None = Field(description="Of this replica's own budget.")
    synced_s_ago: float | None = Field(
        description="Since the store was last heard of; null where it never was, and where it is this server's alone."
    )
    error: str | None = Field(description="Why the store cannot be followed.")
    refused: Refused | None = Field(description="Why what the store holds is not in force.")


class Feasible(_Model):
    gmacs: list[float] = Field(min_length=2, max_length=2)
    accuracy: list[float] = Field(min_length=2, max_length=2)
    latency_ms: list[float | None] | None = Field(
        min_length=2,
        max_length=2,
        description="At the present arrival rate and the target's quantile (by default 0.99). The second is null where "
        "the dearest operating point cannot keep up; the whole is where the cheapest cannot, and without a profile.",
    )


class GmacsTarget(_Model):
    gmacs: float = Field(gt=0, description="Mean cost per image, billions of multiply-accumulates.")


class AccuracyTarget(_Model):
    accuracy: float = Field(description="Accuracy on the calibration images, 0 to 1.")


class LatencyTarget(_Model):
    latency_ms: float = Field(gt=0, description="From the last byte of a request's body to its answer.")
    quantile: float = Field(0.99, ge=0.5, le=0.999, description="The share of answers that are to be that fast.")


_Never = Annotated[Literal[2], WithJsonSchema({"type": "number", "enum": [2]})]  # to JSON Schema 2.0 is no integer


class ThresholdsTarget(_Model):
    thresholds: list[Annotated[float, Field(ge=0, le=1)] | _Never] = Field(
        description="One per exit but the last, or one per exit with 0 as the last. 2: nobody leaves there.",
    )


Target = GmacsTarget | AccuracyTarget | LatencyTarget | ThresholdsTarget


class _Held(_Model):
    hold: Literal["cost", "quality"] = Field(
        "cost", description="`cost`: thresholds follow the traffic so that the cost stays. `quality`: they stay."
    )


class GmacsBudget(_Held, GmacsTarget):
    mix: bool = Field(
        False,
        description="Meet the cost exactly, by two sets of thresholds; which one judges a request follows from "
        "its `X-Request-ID`, by a key that only the process knows.",
    )


class AccuracyBudget(_Held, AccuracyTarget):
    pass


class LatencyBudget(_Held, LatencyTarget):
    pass


class ThresholdsBudget(_Held, ThresholdsTarget):
    pass


# What PUT takes is exactly one of them: none has a member that is another's target.
BUDGETS = (GmacsBudget, AccuracyBudget, LatencyBudget, ThresholdsBudget)


class Mix(_Model):
    thresholds: list[float] = Field(description="The dearer ones.")
    share: float = Field(ge=0, le=1, description="Of all requests: those that are judged by them, and by no others.")


class Budget(_Model):
    version: int = Field(
        description="The same on every replica that shares the store; below 0: this replica's own budget."
    )
    target: Target
    hold: Literal["cost", "quality"]
    clamped: bool = Field(description="The target lies beyond the frontier; its end is in force.")
    thresholds: list[float] = Field(description="In force, one per exit; the last is 0. 2: nobody leaves there.")
    mix: Mix | None = Field(description="Null unless the budget was set with `mix`; then `thresholds` are the cheaper.")
    predicted: Predicted = Field(description="What calibration says of the thresholds in force.")
    observed: Observed
    feasible: Feasible
    row: int | None = Field(description="Of `GET /frontier`, from 0: in force, or the next cheaper one.")
    pressure: float = Field(
        ge=0, le=1, description="Share of the target's cost that is given up because the server is overloaded."
    )
    audit: Audit
    drift: Drift
    fleet: Fleet


class Traffic(_Model):
    """Estimates: calibration records, weighted so that their confidences at exit 1 are distributed as the traffic's."""

    images: int = Field(description="How many images this looks back upon.")
    thresholds: list[float] = Field(
        description="That the budget would come to on this traffic: with `hold` `cost` the dearest that cost no more "
        "on it than is to be held, or the end of the frontier; else those that it begins with."
    )
    mix: Mix | None
    row: int = Field(description="Of `GET /frontier`, from 0: of these thresholds, or the next cheaper one.")
    target: Predicted = Field(description="Had these thresholds been in force.")
    present: Predicted = Field(description="By the thresholds in force.")


class Preview(_Model):
    target: Target
    hold: Literal["cost", "quality"]
    clamped: bool = Field(description="The target lies beyond the frontier; its end would be in force.")
    thresholds: list[float] = Field(description="That the budget would begin with.")
    mix: Mix | None
    predicted: Predicted = Field(description="What calibration says of these thresholds.")
    traffic: Traffic | None = Field(description="Null before the first image, and without calibration records.")


class FrontierRow(_Model):
    thresholds: list[float]
    accuracy: float
    accuracy_lower: float | None = Field(description="One-sided 95 % lower bound; null where images are not known.")
    gmacs: float
    exit_fractions: list[float]
    ms: float | None = Field(
        description="Mean engine time per image, in batches as large as pays; null without a latency profile."
    )


class Certificate(_Model):
    max_accuracy_loss: float = Field(description="Against the last exit.")
    confidence: float
    samples: int = Field(description="Images that it was tested on, others than the thresholds were chosen on.")
    gmacs: float = Field(description="Rows from this cost on are certified.")


class Frontier(_Model):
    criterion: Criterion = Field(description="What the thresholds are compared with.")
    source: Literal["calibration", "imported"] = Field(
        description="Solved here, on images, or brought along by a published checkpoint."
    )
    samples: int = Field(description="Images calibrated on; 0 where it was imported.")
    stage_gmacs: list[float] = Field(description="Cumulative cost per exit.")
    rows: list[FrontierRow] = Field(description="From the cheapest to the most accurate.")
    certificate: Certificate | None = Field(description="Null where calibration was asked for none.")


class Stage(_Model):
    stage: int
    grid: list[int] = Field(description="Token grid, rows and columns.")
    gmacs: float = Field(description="Cumulative.")


class Engine(_Model):
    name: str = Field(description="As `DVT_ENGINE` asks for it.")
    runtime: str = Field(description="The library that runs the stages, with its version.")
    device: str = Field(description="Name of the CPU or GPU.")
    executors: int
    max_batch_sizes: list[int]


class Preprocessing(_Model):
    size: list[int] = Field(description="Height and width of the model's input.")
    resize: int = Field(description="Length of the short side after resizing.")
    crop: list[int] = Field(description="Height and width of the centre crop.")
    interpolation: str


class Model(_Model):
    name: str
    version: str
    labels: list[str]
    stages: list[Stage]
    precision: str
    criterion: Criterion = Field(
        description="What `confidence` is: the largest probability, 1 - H(p) / log K with H the entropy of all K, or "
        "the largest probability less the second."
    )
    engine: Engine
    preprocessing: Preprocessing


class Status(_Model):
    status: str


class Problem(BaseModel):
    """RFC 9457. Further members belong to single codes: `index`, `reason`, `field`, `feasible`, `retry_after_s`..."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str


def _errors(*kinds: type[errors.ServeError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that raises these, and what any route may answer."""
    by_status: dict[int, list[type[errors.ServeError]]] = {}
    everything: tuple[type[errors.ServeError], ...] = (*kinds, errors.InternalError)
    for kind in everything:
        by_status.setdefault(kind.status, []).append(kind)
    return {status: {"model": Problem, "description": _sentences(by_status[status])} for status in sorted(by_status)}


def _sentences(kinds: Iterable[type[errors.ServeError]]) -> str:
    return " ".join(f"`{kind.code}`: {kind.title[0].lower()}{kind.title[1:]}." for kind in kinds)


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


_REQUEST_ID = {
    "name": "X-Request-ID",
    "in": "header",
    "required": False,
    "description": "Taken over into the answer where it matches `^[A-Za-z0-9._-]{1,64}$`; any other is replaced.",
    "schema": {"type": "string"},  # no pattern: a request is not refused for its id
}
_RED_DOT = (  # a PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
)
_IMAGE_FILE = {"schema": {"type": "string", "format": "binary"}}
_IMAGE_FILES = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}

CLASSIFY: dict[str, Any] = {
    "tags": ["classify"],
    "summary": "Classify one image or several",
    "description": "The whole request succeeds or fails; an error that is about one image has its `index`.",
    "response_model": Classification,
    "responses": _errors(
        errors.BadImage,
        errors.RequestTimeout,
        errors.BodyTooLarge,
        errors.ImageTooLarge,
        errors.TooManyImages,
        errors.UnsupportedMediaType,
        errors.InvalidRequest,
        errors.EngineFailed,
        errors.Overloaded,
        errors.Draining,
        errors.DeadlineExceeded,
    ),
    "openapi_extra": {
        "parameters": [
            _query("top_k", "Predictions per image; more than there are classes gives all.", type="integer", minimum=1),
            _query(
                "timeout_ms",
                "Answer by then; at most the server's `DVT_MAX_TIMEOUT_MS`.",
                type="number",
                minimum=0,
                exclusiveMinimum=True,
            ),
            _query("max_exit", "Never go deeper than this exit.", type="integer", minimum=1),
            _query(
                "min_confidence",
                "Used in place of the live thresholds; on the scale of the model's `criterion`.",
                type="number",
                minimum=0,
                maximum=1,
            ),
            _query(
                "priority",
                "Who waits less: high before normal before low. Low is refused once the queue is half full; where it "
                "is full, a higher priority takes the place of the lowest and last that have not begun.",
                type="string",
                enum=["high", "normal", "low"],
                default="normal",
            ),
            _REQUEST_ID,
        ],
        "requestBody": {
            "required": True,
            "description": "A raw image, a form with one or more files, or JSON with base64.",
            "content": {
                **dict.fromkeys(images.MEDIA_TYPES, _IMAGE_FILE),
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "description": "Every part that is a file is an image, whatever its name.",
                        "minProperties": 1,
                        "properties": {"image": _IMAGE_FILES},
                        "additionalProperties": _IMAGE_FILES,
                    }
                },
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/Images"},
                    "example": {"images": [_RED_DOT]},
                },
            },
        },
    },
}

_ETAG = {"ETag": {"description": "The version, in quotes.", "schema": {"type": "string", "example": '"7"'}}}

GET_BUDGET: dict[str, Any] = {
    "tags": ["budget"],
    "summary": "The budget in force",
    "response_model": Budget,
    "responses": {200: {"headers": _ETAG}, **_errors()},
    "openapi_extra": {"parameters": [_REQUEST_ID]},
}

_BUDGET_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"oneOf": [{"$ref": f"#/components/schemas/{budget.__name__}"} for budget in BUDGETS]},
            "examples": {
                "gmacs": {"value": {"gmacs": 0.03}},
                "mixed": {"value": {"gmacs": 0.03, "mix": True}},
                "accuracy": {"value": {"accuracy": 0.74, "hold": "quality"}},
                "latency": {"value": {"latency_ms": 25, "quantile": 0.99}},
                "thresholds": {"value": {"thresholds": [0.9, 0.7]}},
            },
        }
    },
}

PUT_BUDGET: dict[str, Any] = {
    "tags": ["budget"],
    "summary": "Set the budget",
    "description": "Takes effect by the next batch, at once for all, and survives a restart. A latency is "
    "solved anew as traffic changes.",
    "response_model": Budget,
    "responses": {
        200: {"headers": _ETAG},
        **_errors(
            errors.Unauthorized,
            errors.Forbidden,
            errors.RequestTimeout,
            errors.StoreConflict,
            errors.VersionMismatch,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.InvalidRequest,
            errors.BudgetInfeasible,
            errors.StoreUnavailable,
        ),
    },
    "openapi_extra": {
        "parameters": [
            _query(
                "scope",
                "`fleet`: all replicas that share the store, for good. `replica`: the one that answers, for a while.",
                type="string",
                enum=["fleet", "replica"],
                default="fleet",
            ),
            _query(
                "expires_s",
                "For how long, with `scope=replica`; then the fleet's budget is in force again.",
                type="number",
                minimum=0,
                exclusiveMinimum=True,
                maximum=LONGEST_S,
                default=EXPIRES_S,
            ),
            {
                "name": "If-Match",
                "in": "header",
                "required": False,
                "description": "Change the budget only if this is still its ETag.",
                "schema": {"type": "string", "example": '"7"'},
            },
            _REQUEST_ID,
        ],
        "requestBody": _BUDGET_BODY,
    },
}

PREVIEW_BUDGET: dict[str, Any] = {
    "tags": ["budget"],
    "summary": "What a budget would have done to the traffic of late",
    "description": "Takes what `PUT /budget` takes, and changes nothing.",
    "response_model": Preview,
    "responses": _errors(
        errors.RequestTimeout,
        errors.BodyTooLarge,
        errors.UnsupportedMediaType,
        errors.InvalidRequest,
        errors.BudgetInfeasible,
    ),
    "openapi_extra": {"parameters": [_REQUEST_ID], "requestBody": _BUDGET_BODY},
}

FRONTIER: dict[str, Any] = {
    "tags": ["budget"],
    "summary": "All operating points that a budget can choose from",
    "response_model": Frontier,
    "responses": _errors(),
}
MODEL: dict[str, Any] = {
    "tags": ["server"],
    "summary": "What is served",
    "response_model": Model,
    "responses": _errors(),
}
LIVEZ: dict[str, Any] = {
    "tags": ["server"],
    "summary": "Whether the process should live on",
    "response_model": Status,
    "responses": _errors(errors.NotReady),
}
READYZ: dict[str, Any] = {
    "tags": ["server"],
    "summary": "Whether to send requests here: warmed up and not draining",
    "response_model": Status,
    "responses": _errors(errors.NotReady),
}
METRICS: dict[str, Any] = {
    "tags": ["server"],
    "summary": "Metrics for Prometheus",
    "response_class": PlainTextResponse,
    "responses": {
        200: {"description": "Text exposition format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **_errors(),
    },
}


DOCUMENTED = {  # by endpoint
    "classify": CLASSIFY,
    "get_budget": GET_BUDGET,
    "put_budget": PUT_BUDGET,
    "preview_budget": PREVIEW_BUDGET,
    "livez": LIVEZ,
    "readyz": READYZ,
    "get_metrics": METRICS,
    "get_frontier": FRONTIER,
    "get_model": MODEL,
}


def document(routes: Iterable[tuple[str, str, Endpoint]]) -> bytes:
    """OpenAPI 3.0, the newest that the packaged Swagger UI renders, as JSON. `routes`: path, method, endpoint."""
    app = FastAPI(generate_unique_id_function=lambda route: route.name)
    for path, method, endpoint in routes:
        if (documentation := DOCUMENTED.get(endpoint.__name__)) is not None:
            app.add_api_route(path, endpoint, methods=[method], **documentation)
    found = get_openapi(
        title=TITLE,
        version=CONTRACT,
        openapi_version="3.0.3",
        description=DESCRIPTION,
        routes=[route for route in app.routes if isinstance(route, APIRoute)],
        tags=TAGS,
    )
    components = found["components"]["schemas"]
    for body in (Images, *BUDGETS):  # only referred to by hand, so FastAPI does not collect them
        components[body.__name__] = body.model_json_schema()
    for operations in found["paths"].values():
        for operation in operations.values():
            _label_problems(operation["responses"])
    return orjson.dumps(_as_3_0(found))


def page(document_url: str, assets_url: str) -> bytes:
    """The document as a page that one can try it on, in HTML."""
    answer = get_swagger_ui_html(
        openapi_url=document_url,
        title=TITLE,
        swagger_js_url=f"{assets_url}/swagger-ui-bundle.js",
        swagger_css_url=f"{assets_url}/swagger-ui.css",
        swagger_favicon_url=f"{assets_url}/favicon-32x32.png",
    )
    return bytes(answer.body)


def _label_problems(responses: dict[str, Any]) -> None:
    for status, response in responses.items():
        response.setdefault("headers", {})["X-Request-ID"] = {"schema": {"type": "string"}}
        if not status.startswith("2"):
            response["content"] = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}


def _as_3_0(node: Any) -> Any:
    """Pydantic's JSON Schema in the words of OpenAPI 3.0; titles only repeat the names of fields.

    Unions here are of schemas that exclude one another: `oneOf`, which readers of the document show as a choice.
    """
    if isinstance(node, list):
        return [_as_3_0(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _as_3_0(value) for key, value in node.items() if not (key == "title" and _is_schema(node))}
    if isinstance(bound := node.get("exclusiveMinimum"), int | float) and not isinstance(bound, bool):
        node |= {"minimum": bound, "exclusiveMinimum": True}
    if "anyOf" not in node:
        return node
    options = node.pop("anyOf")
    if {"type": "null"} not in options:
        return {**node, "oneOf": options}
    (schema,) = (option for option in options if option != {"type": "null"})
    # Beside a reference nothing counts.
    return {**node, **({"allOf": [schema]} if "$ref" in schema else schema), "nullable": True}


def _is_schema(node: dict[str, Any]) -> bool:
    """Not `info`, and not the properties of a schema, of which one may be called title."""
    return isinstance(node.get("title"), str) and bool({"type", "anyOf", "$ref", "items"} & node.keys())
