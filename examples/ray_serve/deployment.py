"""One Ray Serve deployment around this project's server: each replica is the whole application, without its listener.

Ray's proxy takes the requests, its autoscaler the replicas, `user_config` the budget. The batches are formed by this
project's scheduler, inside a replica: a composition of one deployment a stage would fill them badly, and carry
megabytes of state between processes.

    serve run examples/ray_serve/config.yaml
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from server.app import create_app
from server.bundle.manifest import EMBEDDED, Bundle
from server.engines import load_engine
from server.service import Service
from server.settings import read_settings

log = logging.getLogger("ray.serve")  # which Ray writes to the replica's file
_HOP = ("host", "connection", "content-length", "transfer-encoding")  # of Ray's connection, not of the request


@serve.deployment(
    # As many as the queue may hold: Ray's default of 5 would leave every batch nearly empty.
    max_ongoing_requests=256,
    # Beyond that Ray refuses with 503, as our own door would.
    max_queued_requests=512,
    ray_actor_options={"num_cpus": 1},
    graceful_shutdown_timeout_s=20,
)
class Cascade:
    """A replica. Its cores are those that Ray gave it, its GPU likewise."""

    async def __init__(self, bundle: str | None = None, engine: str = "auto") -> None:
        cores = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        # The budget lives in user_config, and nowhere else.
        settings = read_settings({"state_dir": None, "executors": cores, "decode_threads": cores})
        loaded = Bundle.load(EMBEDDED if bundle is None else Path(bundle))
        app = create_app(settings, loaded, load_engine(loaded, engine=engine, executors=cores))
        self._service: Service = app.state.service
        self._open = AsyncExitStack()
        await self._open.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app)
        self._app = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None)
        self._open.push_async_callback(self._app.aclose)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """`{"budget": {"gmacs": 0.04}}`, as PUT /budget takes it. In force from the next batch on; nothing is loaded
        anew, no request fails. One that cannot be leaves the budget as it is and is logged: were it raised, Ray would
        take the replica for broken, and put others in its place that break likewise."""
        answer = await self._app.put("/budget", json=user_config.get("budget"))
        if answer.is_error:
            log.error("the budget stays as it is: %s: %s", user_config, answer.json()["detail"])

    async def classify(self, image: bytes, **query: Any) -> dict[str, Any]:
        """For handles: `handle.classify.remote(data, top_k=1)`. The answer of POST /classify, also where it is a
        problem document."""
        headers = {"content-type": "application/octet-stream"}  # the bytes say what they are
        return (await self._app.post("/classify", content=image, params=query, headers=headers)).json()

    async def budget(self) -> dict[str, Any]:
        return (await self._app.get("/budget")).json()

    async def __call__(self, request: Request) -> Response:
        """For HTTP: every path of docs/api.md but PUT /budget, which would be heard by one replica of many."""
        if request.method not in ("GET", "HEAD") and request.url.path == "/budget":
            return Response("the budget is set by user_config\n", 405, {"allow": "GET, HEAD"})
        answer = await self._app.request(
            request.method,
            httpx.URL(path=request.url.path, query=request.scope["query_string"]),
            content=await request.body(),
            headers=[(name, value) for name, value in request.headers.items() if name not in _HOP],
        )
        # Ray passes its request id on and sends it back by itself.
        headers = {name: value for name, value in answer.headers.items() if name not in (*_HOP, "x-request-id")}
        return Response(answer.content, answer.status_code, headers)

    async def check_health(self) -> None:
        """A wedged engine fails this, a full queue does not; Ray then puts another replica in its place."""
        (await self._app.get("/livez")).raise_for_status()

    async def __del__(self) -> None:
        """Ray has let the last request finish, and calls this once."""
        await self._service.drain(5.0)
        await self._open.aclose()


def build(arguments: dict[str, str]) -> serve.Application:
    """For configuration files and `serve run`: `bundle` and `engine`."""
    return Cascade.bind(**arguments)
