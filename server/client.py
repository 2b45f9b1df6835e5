"""A client of a running server, for `dvt classify` and `dvt budget`.

Errors are of two kinds. A ClientError ends a run: nobody answers, or every other request would get the same answer.
An ImageError is one image's: the next may do.

ClientError
├── Refused     the server said no, in a problem document
│   └── ImageError   to this image; or the file cannot be read
├── NotOurs     somebody answers, but not as this server does
└── Broken      the connection ended before the answer
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, Field, ValidationError

DEFAULT_URL = "http://127.0.0.1:8000"

# What a server says of one image, or of one batch. Another refusal is one of the question, whatever the image.
_OF_ONE_IMAGE = frozenset({400, 408, 413, 415, 500, 503, 504})
_BUSY = 503
_TRIES = 8  # of an image, where the server is busy
_LONGEST_WAIT_S = 60.0  # who is told to come back later than that is told so
_AHEAD = 4  # images that may be begun before the first of them is answered, as a multiple of `concurrency`


class ClientError(Exception):
    """What went wrong, in one line."""


class Refused(ClientError):
    """`code` names the cause; `feasible` is there where a budget is out of reach."""

    def __init__(
        self, detail: str, *, code: str, status: int = 0, retry_after_s: float = 0.0, feasible: Any = None
    ) -> None:
        super().__init__(detail)
        self.code, self.status, self.retry_after_s, self.feasible = code, status, retry_after_s, feasible


class ImageError(Refused):
    """Of a file that cannot be read, `code` is the reason in words."""


class NotOurs(ClientError):
    """Another server, or one in between."""


class Broken(ClientError):
    """Before an answer: perhaps the server went away, perhaps it only closed an idle connection."""


class _Prediction(BaseModel):
    label: str
    probability: float


class _Timing(BaseModel):
    total: float


class Result(BaseModel):
    """What is shown of an answer. A newer server may say more."""

    predictions: list[_Prediction] = Field(min_length=1)
    exit: int
    degraded: bool
    gmacs: float
    timing_ms: _Timing


class _Answer(BaseModel):
    results: list[Result] = Field(min_length=1, max_length=1)


class _Stage(BaseModel):
    gmacs: float = Field(ge=0, allow_inf_nan=False)


class Model(BaseModel):
    labels: list[str]
    stages: list[_Stage]


class Client:
    """Asks one server. Use it as an async context manager. `concurrency`: requests at once, each on its connection."""

    def __init__(self, url: str, *, timeout_s: float = 60.0, concurrency: int = 1) -> None:
        import httpx  # not with the module: the commands import it, and a server starts without

        self._url = url
        self._concurrency = concurrency
        token = os.environ.get("DVT_CONTROL_TOKEN", "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ClientError("DVT_CONTROL_TOKEN has characters that no token has")
        try:
            # trust_env=False: a proxy of the environment has no business between this client and its server.
            self._http = httpx.AsyncClient(
                base_url=url,
                timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0), pool=None),
                limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
                headers={"authorization": f"Bearer {token}"} if token else {},
                trust_env=False,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ClientError(f"{url} is not a URL: {error}") from None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def classify(self, image: Path, top_k: int | None = None) -> dict[str, Any]:
        """The answer for one image file. The server looks at the bytes, so no media type is stated.

        A server that is busy is asked again, when it says so. Raises ImageError, or ClientError.
        """
        data = _read(image)
        params = {} if top_k is None else {"top_k": top_k}
        headers = {"content-type": "application/octet-stream"}
        broken = False
        for tries_left in reversed(range(_TRIES)):
            try:
                return await self._request("POST", "/classify", params=params, content=data, headers=headers)
            except Refused as error:
                if error.status not in _OF_ONE_IMAGE:
                    raise
                if error.status != _BUSY or not tries_left or error.retry_after_s > _LONGEST_WAIT_S:
                    raise ImageError(str(error), code=error.code) from None
                await asyncio.sleep(error.retry_after_s)
            except Broken as error:
                if broken or not tries_left:
                    await self._request("GET", "/livez")  # raises where it is not about this image
                    raise ImageError(str(error), code="connection lost") from None
                broken = True
        raise AssertionError("the last try returns or raises")

    async def classify_all(
        self, images: Sequence[Path], top_k: int | None = None
    ) -> AsyncGenerator[tuple[Path, dict[str, Any] | ImageError], None]:
        """Every image with its answer, or with what went wrong with it, in the order given. Raises ClientError."""
        busy = asyncio.Semaphore(self._concurrency)

        async def ask(image: Path) -> tuple[Path, dict[str, Any] | ImageError]:
            async with busy:
                try:
                    return image, await self.classify(image, top_k)
                except ImageError as error:
                    return image, error

        begun: deque[asyncio.Task[tuple[Path, dict[str, Any] | ImageError]]] = deque()
        try:
            for image in images:
                begun.append(asyncio.create_task(ask(image)))
                if len(begun) == _AHEAD * self._concurrency:
                    yield await begun.popleft()
            while begun:
                yield await begun.popleft()
        finally:
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)

    async def model(self) -> Model:
        try:
            return Model.model_validate(await self._request("GET", "/model"))
        except ValidationError:
            raise self.not_ours("/model") from None

    def result(self, answer: dict[str, Any]) -> Result:
        """What an answer of `classify` says. Raises ClientError where it says something else."""
        try:
            return _Answer.model_validate(answer).results[0]
        except ValidationError:
            raise self.not_ours("/classify") from None

    async def get(self, path: str) -> dict[str, Any]:
        return await self._request("GET", path)

    async def post(self, path: str, content: bytes, content_type: str) -> dict[str, Any]:
        return await self._request("POST", path, content=content, headers={"content-type": content_type})

    async def budget(self) -> dict[str, Any]:
        return await self.get("/budget")

    async def set_budget(self, target: dict[str, Any], params: dict[str, Any] | None = None) -> dict[str, Any]:
        """`target` is the body of PUT /budget, `params` its query."""
        return await self._request("PUT", "/budget", json=target, params=params or {})

    async def preview_budget(self, target: dict[str, Any]) -> dict[str, Any]:
        """What that body would have done to the traffic of late; nothing changes."""
        return await self._request("POST", "/budget/preview", json=target)

    def not_ours(self, path: str, status: int = 200) -> NotOurs:
        return NotOurs(f"{self._url}{path} answered {status}, which is not an answer of this server")

    async def _request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        import httpx

        try:
            response = await self._http.request(method, path, **options)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ClientError(f"no server answers at {self._url} ({_cause(error)}); start one: dvt serve") from None
        except httpx.TimeoutException:
            raise ClientError(f"the server at {self._url} did not answer in time") from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ClientError(f"{self._url} is not a URL: {error}") from None
        except (httpx.NetworkError, httpx.ProtocolError) as error:
            raise Broken(f"the connection to {self._url} was lost: {_cause(error)}") from None
        except httpx.RequestError as error:
            raise ClientError(f"{self._url}{path} gave no answer of this server: {_cause(error)}") from None
        try:
            body = response.json()
        except (ValueError, RecursionError):
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        if not response.is_success and isinstance(body, dict) and isinstance(body.get("code"), str):
            raise Refused(
                f"{body.get('detail')} ({body['code']})",
                code=body["code"],
                status=response.status_code,
                retry_after_s=_seconds(response.headers.get("retry-after", "")),
                feasible=body.get("feasible"),
            )
        raise self.not_ours(path, response.status_code)


def _read(image: Path) -> bytes:
    try:
        mode = image.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"is a folder; name the images in it: {image / '*'}", code="folder")
        if not stat.S_ISREG(mode):
            raise ImageError("is not a file", code="not a file")
        return image.read_bytes()
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise ImageError(reason, code=reason) from None


def _seconds(retry_after: str) -> float:
    """Whole seconds, as our servers say it; one, where somebody in between says it with a date."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 1.0


def _cause(error: BaseException) -> str:
    """What the system said; libraries above it say less."""
    said = str(error)
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
        if isinstance(error, socket.gaierror | ssl.SSLError):
            said = str(error.strerror).lower()
        elif isinstance(error, OSError) and error.errno:
            said = os.strerror(error.errno).lower()  # asyncio's own words are of addresses
    return said or type(error).__name__
