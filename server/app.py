"""The application: every path, on a service.

What the paths do stands in `frontend.routes`, what serves them in `service`. Only the command line, tests and
benchmarks import this module.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from server.bundle.manifest import Bundle
from server.core import Engine
from server.frontend import routes, schemas
from server.frontend.edge import Edge, Endpoint, thin
from server.frontend.origin import hosts_for
from server.service import Service
from server.settings import Settings, SettingsError


class ThinRoute(APIRoute):
    """Documented by FastAPI, run without it: every route reads its own request, so there are no parameters to solve."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = thin(self.endpoint)


def create_app(
    settings: Settings, bundle: Bundle, engine: Engine, clock: Callable[[], float] = time.monotonic
) -> FastAPI:
    """The application. Its lifespan starts and stops the parts; `app.state.service` has them.

    Blocks for a moment (reads the stored budget). Raises SettingsError.
    """
    try:
        hosts = hosts_for(settings.host, settings.allowed_hosts)
    except ValueError as error:
        raise SettingsError(f"bad setting DVT_ALLOWED_HOSTS: {error}") from None
    service = Service(settings, bundle, engine, clock)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await service.start()
            yield
        finally:
            await service.stop()

    app = schemas.App(
        title="DVT Serve",
        version=schemas.CONTRACT,
        description=schemas.DESCRIPTION,
        openapi_tags=schemas.TAGS,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        lifespan=lifespan,
    )
    app.state.service = service
    app.router.route_class = ThinRoute
    methods: dict[str, list[str]] = {}
    for path, method, endpoint, documentation in _table():
        app.add_api_route(path, endpoint, methods=[method], **documentation)
        methods.setdefault(path, []).extend((method, "HEAD") if method == "GET" else (method,))
        if method == "GET":  # the connection leaves the body out
            app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    for path, allowed in methods.items():
        others = Route(path, routes.other_methods([*allowed, "OPTIONS"]), name=f"{path} otherwise")
        others.methods = None  # whatever came past the routes above
        app.router.routes.append(others)
    app.router.default = routes.elsewhere
    app.mount("/docs/assets", StaticFiles(directory=_swagger_ui()))
    app.outermost = Edge(
        _past_the_router(app), metrics=service.metrics, clock=clock, closing=lambda: service.closing, hosts=hosts
    )
    return app


def _past_the_router(app: FastAPI) -> ASGIApp:
    """The routes; the busiest without what it takes to find it among them."""
    busiest = app.router.routes[0]
    assert isinstance(busiest, ThinRoute)
    path = busiest.path

    def find(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and scope["path"] == path and scope["method"] == "POST":
            scope["route"] = busiest
            return busiest.app(scope, receive, send)
        return app.router(scope, receive, send)

    return find


def _table() -> list[tuple[str, str, Endpoint, dict[str, Any]]]:
    """Every route; the busiest first."""
    return [
        ("/classify", "POST", routes.classify, schemas.CLASSIFY),
        ("/budget", "GET", routes.get_budget, schemas.GET_BUDGET),
        ("/budget", "PUT", routes.put_budget, schemas.PUT_BUDGET),
        ("/budget/preview", "POST", routes.preview_budget, schemas.PREVIEW_BUDGET),
        ("/livez", "GET", routes.livez, schemas.LIVEZ),
        ("/readyz", "GET", routes.readyz, schemas.READYZ),
        ("/metrics", "GET", routes.get_metrics, schemas.METRICS),
        ("/frontier", "GET", routes.get_frontier, schemas.FRONTIER),
        ("/model", "GET", routes.get_model, schemas.MODEL),
        ("/docs", "GET", routes.docs, {"include_in_schema": False}),
        ("/openapi.json", "GET", routes.openapi, {"include_in_schema": False}),
    ]


def _swagger_ui() -> Path:
    from swagger_ui_bundle import swagger_ui_path  # type: ignore[import-untyped]

    return Path(swagger_ui_path)
