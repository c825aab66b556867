"""Errors as HTTP answers: one table of statuses, one function that makes the one body (RFC 9457)."""

import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model.errors import (
    ArtifactError,
    CheckpointError,
    ClusterNotFound,
    ConfigError,
    DeadlineExceeded,
    HeadersTooLarge,
    ImageTooLarge,
    InferenceError,
    InputError,
    InvalidCategoryNames,
    InvalidImage,
    InvalidParameter,
    LabelStoreError,
    ModelNotFound,
    NotAcceptable,
    NotReady,
    PermissionDenied,
    PreconditionFailed,
    QueueFull,
    RateLimited,
    RegistryConflict,
    RegistryError,
    ShuttingDown,
    TooManyPixels,
    TrainingError,
    Unauthorized,
    UnsupportedMediaType,
    UrlInputUnsupported,
    UsegError,
)

logger = logging.getLogger(__name__)

PROBLEM_MEDIA_TYPE = "application/problem+json"
CLIENT_CLOSED_REQUEST = 499
"""Counted and logged where the client hung up; nobody is left to receive it."""
NOT_READY_RETRY_S = 5
OIP_PREFIX = "/v2"


@dataclass(frozen=True, kw_only=True)
class ProblemType:
    """What all errors of one class have in common."""

    status: int
    slug: str
    """The stable end of the problem's `type`, for programs to compare."""
    title: str
    rejection: str | None = None
    """The reason under which it is counted as turned away, if it is."""


INTERNAL_ERROR = ProblemType(status=500, slug="internal", title="An error of the service")

PROBLEM_TYPES: dict[type[UsegError], ProblemType] = {
    InputError: ProblemType(status=400, slug="bad-request", title="The request cannot be served"),
    ImageTooLarge: ProblemType(
        status=413, slug="image-too-large", title="The image is too large", rejection="too_large"
    ),
    TooManyPixels: ProblemType(
        status=422, slug="too-many-pixels", title="The image has too many pixels", rejection="too_many_pixels"
    ),
    InvalidImage: ProblemType(status=422, slug="image-unreadable", title="The image cannot be read"),
    InvalidParameter: ProblemType(status=422, slug="option-invalid", title="An option is invalid"),
    UnsupportedMediaType: ProblemType(status=415, slug="media-unsupported", title="The body is of an unsupported type"),
    NotAcceptable: ProblemType(status=406, slug="answer-unsupported", title="No acceptable type of answer"),
    UrlInputUnsupported: ProblemType(
        status=422, slug="url-refused", title="Nothing is fetched from an address", rejection="url_blocked"
    ),
    HeadersTooLarge: ProblemType(
        status=431, slug="headers-too-large", title="The headers are too large", rejection="too_large"
    ),
    Unauthorized: ProblemType(status=401, slug="unauthorized", title="An API key is needed", rejection="unauthorized"),
    PermissionDenied: ProblemType(status=403, slug="forbidden", title="This is for administrators"),
    ModelNotFound: ProblemType(status=404, slug="model-not-found", title="There is no such model"),
    RegistryConflict: ProblemType(status=409, slug="registry-conflict", title="The registry is in another state"),
    ClusterNotFound: ProblemType(status=404, slug="cluster-unknown", title="The model has no such cluster"),
    PreconditionFailed: ProblemType(status=412, slug="revision-passed", title="The names were changed since"),
    InvalidCategoryNames: ProblemType(
        status=409, slug="names-unusable", title="The names of clusters cannot be changed"
    ),
    QueueFull: ProblemType(status=503, slug="busy", title="The queue is full", rejection="queue_full"),
    RateLimited: ProblemType(status=429, slug="rate-limited", title="Too many requests", rejection="rate_limit"),
    NotReady: ProblemType(status=503, slug="not-ready", title="The service is not ready", rejection="not_ready"),
    ShuttingDown: ProblemType(status=503, slug="draining", title="The service is going away", rejection="draining"),
    DeadlineExceeded: ProblemType(status=504, slug="deadline-passed", title="The answer took too long"),
    ArtifactError: INTERNAL_ERROR,
    InferenceError: INTERNAL_ERROR,
    LabelStoreError: INTERNAL_ERROR,
    CheckpointError: INTERNAL_ERROR,
    TrainingError: INTERNAL_ERROR,
    RegistryError: INTERNAL_ERROR,
    ConfigError: INTERNAL_ERROR,
}


def find_problem_type(error: Exception) -> ProblemType:
    """The row of the nearest listed class above `error`; `INTERNAL_ERROR` for what is not ours."""
    match error:
        case UsegError():
            return next((PROBLEM_TYPES[each] for each in type(error).__mro__ if each in PROBLEM_TYPES), INTERNAL_ERROR)
        case RequestValidationError():
            return PROBLEM_TYPES[InvalidParameter]
        case HTTPException():
            title = HTTPStatus(error.status_code).phrase
            return ProblemType(status=error.status_code, slug=title.lower().replace(" ", "-"), title=title)
        case _:
            return INTERNAL_ERROR


def make_error_response(error: Exception, request_id: str, path: str = "") -> Response:
    """The one error answer, in the Open Inference Protocol's form under its paths.

    An error of the service's own is logged here and told to nobody.
    """
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    body = make_problem(error, request_id)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, NotAcceptable):
        headers["Vary"] = "Accept"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="useg"'
    if isinstance(error, QueueFull | NotReady):
        headers["Retry-After"] = str(retry_after_s(error))
    if path.startswith(OIP_PREFIX):
        return Response(orjson.dumps({"error": body["detail"]}), body["status"], headers, "application/json")
    return Response(orjson.dumps(body), body["status"], headers, PROBLEM_MEDIA_TYPE)


def make_problem(error: Exception, request_id: str) -> dict[str, Any]:
    """The body of the error answer, for a request or for one picture of several; logs an error of the service's own."""
    kind = find_problem_type(error)
    body: dict[str, Any] = {
        "type": f"urn:useg:problem:{kind.slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": _error_detail(error),
        "instance": f"urn:useg:request:{request_id}",
    }
    if kind is INTERNAL_ERROR:
        logger.error("request %s failed", request_id, exc_info=error)
        body["detail"] = f"the service failed; its log has the cause under request {request_id}"
    if isinstance(error, QueueFull | NotReady):
        body["retry_after_ms"] = retry_after_s(error) * 1000
    return body


def retry_after_s(error: QueueFull | NotReady) -> int:
    """When to come back."""
    return max(1, error.retry_after_s) if isinstance(error, QueueFull) else NOT_READY_RETRY_S


def _error_detail(error: Exception) -> str:
    if isinstance(error, RequestValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    if isinstance(error, HTTPException):
        return f"{error.detail}: /openapi.json lists the routes and their methods"
    return str(error)
