"""The one error tree. Every class carries the HTTP status and the code of the contract; one handler maps them.

ServeError
├── BadRequest 400                    ├── InvalidRequest 422
├── BadImage 400                      ├── BudgetInfeasible 422
├── Unauthorized 401                  ├── HeaderTooLarge 431
├── Forbidden 403                     ├── InternalError 500
├── ForeignHost 403                   ├── EngineFailed 500
├── ForeignOrigin 403                 ├── Overloaded 503
├── RequestTimeout 408                ├── Draining 503
├── StoreConflict 409                 ├── StoreUnavailable 503
├── VersionMismatch 412               ├── NotReady 503
├── BodyTooLarge 413                  ├── DeadlineExceeded 504
├── ImageTooLarge 413                 └── HttpVersionNotSupported 505
├── TooManyImages 413
├── UnsupportedMediaType 415
└── ExpectationFailed 417

`BundleError` and `EngineUnavailable` stand apart: they stop the start and never reach a client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

STORE_REASONS = ("unreachable", "timeout", "denied", "missing", "expired", "other")
"""Why a store that is somewhere else does not answer, or answers otherwise: nobody is there, or nothing comes; it may
not be read or written; it is not there; what was watched is too old to go on with; anything else."""


class ServeError(Exception):
    """Something a client is told. `detail` names the cause; `extra` are further members of the problem document."""

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra


class BadRequest(ServeError):
    """What is not HTTP, or breaks its rules."""

    status, code, title = 400, "bad_request", "The request is not valid HTTP"


class BadImage(ServeError):
    """Raised with reason=...; the route adds index=... (which image of the request)."""

    status, code, title = 400, "bad_image", "The image cannot be decoded"


class Unauthorized(ServeError):
    status, code, title = 401, "unauthorized", "A token is required"


class Forbidden(ServeError):
    status, code, title = 403, "forbidden", "The token is not accepted"


class ForeignHost(ServeError):
    """Against DNS rebinding: a page of elsewhere whose name was made to resolve to this machine."""

    status, code, title = 403, "foreign_host", "The Host is not one of this server's"


class ForeignOrigin(ServeError):
    status, code, title = 403, "foreign_origin", "A page of another origin may not change this server"


class RequestTimeout(ServeError):
    status, code, title = 408, "request_timeout", "The request did not arrive in time"


class StoreConflict(ServeError):
    """The store is shared with somebody who is in the way."""

    status, code, title = 409, "store_conflict", "The budget could not be stored beside what others store"


class VersionMismatch(ServeError):
    status, code, title = 412, "version_mismatch", "The budget has changed meanwhile"


class BodyTooLarge(ServeError):
    status, code, title = 413, "body_too_large", "The body is too large"


class ImageTooLarge(ServeError):
    """More pixels than allowed, or a shape that is: judged from the header, before decoding."""

    status, code, title = 413, "image_too_large", "The image has too many pixels"


class TooManyImages(ServeError):
    status, code, title = 413, "too_many_images", "The request holds too many images"


class UnsupportedMediaType(ServeError):
    status, code, title = 415, "unsupported_media_type", "The media type is not supported"


class ExpectationFailed(ServeError):
    status, code, title = 417, "expectation_failed", "The expectation cannot be met"


class InvalidRequest(ServeError):
    status, code, title = 422, "invalid_request", "The request is not valid"


class BudgetInfeasible(ServeError):
    """Raised with feasible={"gmacs": [lo, hi], "accuracy": [lo, hi]}."""

    status, code, title = 422, "budget_infeasible", "No operating point reaches this target"


class HeaderTooLarge(ServeError):
    status, code, title = 431, "request_header_too_large", "The header is too large"


class EngineFailed(ServeError):
    status, code, title = 500, "engine_failed", "The engine failed on this batch"


class InternalError(ServeError):
    """What nobody foresaw. The cause is in the log, under the request id, and nowhere else."""

    status, code, title = 500, "internal_error", "The server failed"


class Overloaded(ServeError):
    """Raised with retry_after_s=... (sent as Retry-After)."""

    status, code, title = 503, "overloaded", "The server is at capacity"


class Draining(ServeError):
    status, code, title = 503, "draining", "The server is shutting down"


class StoreUnavailable(ServeError):
    """Raised with reason=... (of STORE_REASONS) where the store is somewhere else."""

    status, code, title = 503, "store_unavailable", "The budget could not be stored"


class NotReady(ServeError):
    """The answer of a failing probe; no other route raises it."""

    status, code, title = 503, "not_ready", "The server is not ready"


class DeadlineExceeded(ServeError):
    status, code, title = 504, "deadline_exceeded", "The deadline passed before any exit was reached"


class HttpVersionNotSupported(ServeError):
    status, code, title = 505, "http_version_not_supported", "The version of HTTP is not supported"


def _kinds(of: type[ServeError]) -> Iterator[type[ServeError]]:
    for kind in of.__subclasses__():
        yield kind
        yield from _kinds(kind)


BY_CODE = {kind.code: kind for kind in _kinds(ServeError)}


class BundleError(Exception):
    """A bundle that does not fit its manifest. The message names the file and what is wrong with it."""


class EngineUnavailable(Exception):
    """An engine that cannot run on this machine. The message says what is missing and what to do, in one line."""
