"""A client of a running server, for `dvt classify` and `dvt budget`."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"


class ClientError(Exception):
    """What went wrong, in one line: the server cannot be reached, or it said no."""


class Client:
    """Keeps one connection to one server. Use it as a context manager."""

    def __init__(self, url: str, timeout_s: float = 60.0, transport: httpx.BaseTransport | None = None) -> None:
        self._url = url
        token = os.environ.get("DVT_CONTROL_TOKEN")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        try:
            # trust_env=False: a proxy of the environment has no business between this client and its server.
            self._http = httpx.Client(
                base_url=url, timeout=timeout_s, headers=headers, transport=transport, trust_env=False
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ClientError(f"{url} is not a URL: {error}") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def classify(self, image: Path, top_k: int | None = None) -> dict[str, Any]:
        """The answer for one image file. The server looks at the bytes, so no media type is stated."""
        try:
            data = image.read_bytes()
        except OSError as error:
            raise ClientError(f"{image}: {error.strerror}") from None
        params = {} if top_k is None else {"top_k": top_k}
        headers = {"content-type": "application/octet-stream"}
        try:
            return self._request("POST", "/classify", params=params, content=data, headers=headers)
        except ClientError as error:
            raise ClientError(f"{image}: {error}") from None

    def budget(self) -> dict[str, Any]:
        return self._request("GET", "/budget")

    def set_budget(self, target: dict[str, Any]) -> dict[str, Any]:
        """`target` is the body of PUT /budget."""
        return self._request("PUT", "/budget", json=target)

    def preview_budget(self, target: dict[str, Any]) -> dict[str, Any]:
        """What that body would have done to the traffic of late; nothing changes."""
        return self._request("POST", "/budget/preview", json=target)

    def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx.ConnectError as error:
            raise ClientError(f"no server answers at {self._url} ({error}); start one with: dvt serve") from None
        except httpx.TimeoutException:
            raise ClientError(f"the server at {self._url} did not answer in time") from None
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise ClientError(f"the connection to {self._url} failed: {error}") from None
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        if isinstance(body, dict) and "code" in body:
            feasible = f"; feasible: {body['feasible']}" if "feasible" in body else ""
            raise ClientError(f"{body.get('detail')} ({body['code']}{feasible})")
        raise ClientError(f"{self._url}{path} answered {response.status_code}, which is not an answer of this server")
