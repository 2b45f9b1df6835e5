"""The application: every path, on a service.

What the paths do stands in `frontend.routes`, what serves them in `service`. Only the command line, tests and
benchmarks import this module.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from server.bundle.manifest import Bundle
from server.core import Engine
from server.frontend import routes
from server.frontend.edge import Edge, Endpoint, thin
from server.frontend.origin import hosts_for
from server.service import Service
from server.settings import Settings, SettingsError


class App(Starlette):
    """Lets nothing of Starlette's stand between a request and `outermost`."""

    outermost: ASGIApp

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # type: ignore[override]
        scope["app"] = self
        return self.outermost(scope, receive, send)


class _Route(Route):
    def __init__(self, path: str, method: str, endpoint: Endpoint) -> None:
        super().__init__(path, endpoint, methods=[method])  # with GET goes HEAD: the connection leaves the body out
        self.app = thin(endpoint)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self}  # for `Edge`, which counts by path


def create_app(settings: Settings, bundle: Bundle, engine: Engine, clock: Callable[[], float] = time.monotonic) -> App:
    """The application. Its lifespan starts and stops the parts; `app.state.service` has them.

    Blocks for a moment (reads the stored budget). Raises SettingsError.
    """
    try:
        hosts = hosts_for(settings.host, settings.allowed_hosts)
    except ValueError as error:
        raise SettingsError(f"bad setting DVT_ALLOWED_HOSTS: {error}") from None
    service = Service(settings, bundle, engine, clock)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            await service.start()
            yield
        finally:
            await service.stop()

    ours = [_Route(*route) for route in routes.ROUTES]
    taken: dict[str, list[str]] = {}
    for route in ours:
        taken.setdefault(route.path, []).extend(sorted(route.methods or ()))
    others = [
        Route(path, routes.other_methods([*methods, "OPTIONS"]), name=f"{path} otherwise")
        for path, methods in taken.items()
    ]
    for other in others:
        other.methods = None  # whatever came past the routes above
    swagger_ui = Mount("/docs/assets", StaticFiles(directory=_swagger_ui()))
    app = App(routes=[*ours, *others, swagger_ui], lifespan=lifespan)
    app.router.redirect_slashes = False
    app.router.default = routes.elsewhere
    app.state.service = service
    app.outermost = Edge(
        _past_the_router(app), metrics=service.metrics, clock=clock, closing=lambda: service.closing, hosts=hosts
    )
    return app


def _past_the_router(app: App) -> ASGIApp:
    """The routes; the busiest without what it takes to find it among them."""
    busiest = app.router.routes[0]
    assert isinstance(busiest, _Route)
    path = busiest.path

    def find(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and scope["path"] == path and scope["method"] == "POST":
            scope["route"] = busiest
            return busiest.app(scope, receive, send)
        return app.router(scope, receive, send)

    return find


def _swagger_ui() -> Path:
    from swagger_ui_bundle import swagger_ui_path  # type: ignore[import-untyped]

    return Path(swagger_ui_path)
