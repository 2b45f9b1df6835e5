"""The outermost layer of the application: request ids, errors as problem documents, the record of every request.

Pure ASGI, as it runs for every request, and the only layer: nothing of Starlette's lies between it and the routes. Two
promises are kept here, whatever happens further in:

- every answer carries `X-Request-ID`;
- every error is an `application/problem+json` document (RFC 9457), never a stack trace.

What a connection promises stands in `connection`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
import secrets
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import Draining, InternalError, Overloaded, ServeError
from server.frontend.origin import AllowedHosts, foreign_host
from server.metrics import RequestCounts

log = logging.getLogger(__name__)

PROBLEM = "application/problem+json"
HUNG_UP = 499  # nginx's number for a client that left; only ever seen in metrics

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}\Z")
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}
_HTTP_DETAILS = {
    404: "There is nothing at this path; GET /docs lists what there is",
    405: "This path does not take this method",
}


class ClientLeft(Exception):
    """The client hung up: nothing is to be answered."""


class Edge:
    """While `closing()` says that connections should wind down, answers carry `Connection: close`."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: RequestCounts,
        clock: Callable[[], float],
        closing: Callable[[], bool],
        hosts: AllowedHosts,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock
        self._closing = closing
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = self._clock()
        request_id, host = _read_headers(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def send_(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id.encode())]
                if self._closing():
                    headers.append((b"connection", b"close"))
                message = {"type": "http.response.start", "status": status, "headers": headers}
            await send(message)

        try:
            if host not in self._hosts:
                raise foreign_host(host)
            await self._app(scope, receive, send_)
        except ClientLeft:
            status = HUNG_UP
        except (ServeError, HTTPException) as error:  # HTTPException: Starlette's, 404 and 405
            if status:  # half an answer is out: only a broken connection tells the client so
                raise
            await problem(error, state)(scope, receive, send_)
        except asyncio.CancelledError:
            # Cancelled from outside. When the server ends that is the drain timeout, and still answered.
            if status or not self._closing():
                raise
            await problem(Draining("The server stopped before an answer"), state)(scope, receive, send_)
        except Exception:
            log.exception("request %s failed", request_id)
            if status:
                raise
            await problem(InternalError("The server failed; see its log under this request id"), state)(
                scope, receive, send_
            )
        finally:
            route = scope.get("route")
            name = getattr(route, "path", "other") if route is not None else "other"
            seconds = self._clock() - started
            self._metrics.request_finished(name, status or HUNG_UP, seconds, *state.get("asked", ()))
            if (code := state.get("code")) is not None:
                self._metrics.request_refused(code)


def problem(error: ServeError | HTTPException, state: dict[str, Any]) -> Response:
    """The problem document of an error."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        status, title, extra = error.status_code, HTTPStatus(error.status_code).phrase, {}
        code = _HTTP_CODES.get(status, "http_error")
        detail = error.detail if error.detail != title else _HTTP_DETAILS.get(status, title)
        headers.update(error.headers or {})
    else:
        status, code, title, detail, extra = error.status, error.code, error.title, error.detail, error.extra
        if isinstance(error, Overloaded | Draining):
            headers["retry-after"] = str(max(1, math.ceil(extra.get("retry_after_s", 1))))
        if status == 401:
            headers["www-authenticate"] = "Bearer"
    state["code"] = code
    body = {
        "type": f"urn:dvt-serve:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": state["request_id"],
        **extra,
    }
    return Response(orjson.dumps(body, default=_plain), status, headers, media_type=PROBLEM)


def _plain(value: object) -> object:
    """orjson takes no Mapping but dict, and no Sequence but list and tuple."""
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(type(value).__name__)


_PROCESS = secrets.token_hex(10)
_count = itertools.count(1)


def new_request_id() -> str:
    """Random for the process, counted within it: to ask the kernel for randomness every time costs far more."""
    return f"{_PROCESS}{next(_count):012x}"


def _read_headers(scope: Scope) -> tuple[str, str]:
    """The request id, taken or made, and the Host."""
    request_id, host = None, ""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if _REQUEST_ID.match(value):
                request_id = value.decode("ascii")
        elif name == b"host":
            host = value.decode("latin-1")
    return request_id or new_request_id(), host


class WhileConnected:
    """`with WhileConnected(state): ...` ends the block with ClientLeft, at once, when the client hangs up.

    The body must have been read. The connection tells by cancelling the task of the request: no second one watches.
    Servers other than ours do not tell.
    """

    __slots__ = ("_at_hang_up", "_left", "_task")

    def __init__(self, state: dict[str, Any]) -> None:
        """`state`: of the request's scope."""
        self._at_hang_up: Callable[[Callable[[], object] | None], None] = state.get("hang_up", lambda _: None)
        self._left = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._at_hang_up(self._leave)

    def _leave(self) -> None:
        self._left = True
        self._task.cancel()

    def __exit__(self, *_: object) -> None:
        self._at_hang_up(None)
        if self._left:
            self._task.uncancel()
            raise ClientLeft from None


Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


def thin(endpoint: Endpoint) -> ASGIApp:
    """The ASGI application of a route function, without what Starlette does around one: `Edge` does it for all."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return app
