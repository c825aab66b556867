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
    AnswerUnsupported,
    ArtifactError,
    Busy,
    CheckpointError,
    ClusterUnknown,
    ConfigError,
    DeadlinePassed,
    Draining,
    Forbidden,
    HeadersTooLarge,
    ImageTooLarge,
    ImageUnreadable,
    InferenceError,
    InputError,
    LabelStoreError,
    MediaUnsupported,
    ModelNotFound,
    NamesError,
    NotReady,
    OptionInvalid,
    RateLimited,
    RegistryConflict,
    RegistryError,
    RevisionPassed,
    TooManyPixels,
    TrainingError,
    Unauthorized,
    UrlRefused,
    UsegError,
)

logger = logging.getLogger(__name__)

PROBLEM_MEDIA = "application/problem+json"
CLIENT_GONE = 499
"""Counted and logged where the client hung up; nobody is left to receive it."""
NOT_READY_RETRY_S = 5
OIP_PREFIX = "/v2"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What all errors of one class have in common."""

    status: int
    slug: str
    """The stable end of the problem's `type`, for programs to compare."""
    title: str
    rejection: str | None = None
    """The reason under which it is counted as turned away, if it is."""


INTERNAL = Kind(status=500, slug="internal", title="An error of the service")

KINDS: dict[type[UsegError], Kind] = {
    InputError: Kind(status=400, slug="bad-request", title="The request cannot be served"),
    ImageTooLarge: Kind(status=413, slug="image-too-large", title="The image is too large", rejection="too_large"),
    TooManyPixels: Kind(
        status=422, slug="too-many-pixels", title="The image has too many pixels", rejection="too_many_pixels"
    ),
    ImageUnreadable: Kind(status=422, slug="image-unreadable", title="The image cannot be read"),
    OptionInvalid: Kind(status=422, slug="option-invalid", title="An option is invalid"),
    MediaUnsupported: Kind(status=415, slug="media-unsupported", title="The body is of an unsupported type"),
    AnswerUnsupported: Kind(status=406, slug="answer-unsupported", title="No acceptable type of answer"),
    UrlRefused: Kind(
        status=422, slug="url-refused", title="Nothing is fetched from an address", rejection="url_blocked"
    ),
    HeadersTooLarge: Kind(
        status=431, slug="headers-too-large", title="The headers are too large", rejection="too_large"
    ),
    Unauthorized: Kind(status=401, slug="unauthorized", title="An API key is needed", rejection="unauthorized"),
    Forbidden: Kind(status=403, slug="forbidden", title="This is for administrators"),
    ModelNotFound: Kind(status=404, slug="model-not-found", title="There is no such model"),
    RegistryConflict: Kind(status=409, slug="registry-conflict", title="The registry is in another state"),
    ClusterUnknown: Kind(status=404, slug="cluster-unknown", title="The model has no such cluster"),
    RevisionPassed: Kind(status=412, slug="revision-passed", title="The names were changed since"),
    NamesError: Kind(status=409, slug="names-unusable", title="The names of clusters cannot be changed"),
    Busy: Kind(status=503, slug="busy", title="The queue is full", rejection="queue_full"),
    RateLimited: Kind(status=429, slug="rate-limited", title="Too many requests", rejection="rate_limit"),
    NotReady: Kind(status=503, slug="not-ready", title="The service is not ready", rejection="not_ready"),
    Draining: Kind(status=503, slug="draining", title="The service is going away", rejection="draining"),
    DeadlinePassed: Kind(status=504, slug="deadline-passed", title="The answer took too long"),
    ArtifactError: INTERNAL,
    InferenceError: INTERNAL,
    LabelStoreError: INTERNAL,
    CheckpointError: INTERNAL,
    TrainingError: INTERNAL,
    RegistryError: INTERNAL,
    ConfigError: INTERNAL,
}


def find_kind(error: Exception) -> Kind:
    """The row of the nearest listed class above `error`; `INTERNAL` for what is not ours."""
    match error:
        case UsegError():
            return next((KINDS[each] for each in type(error).__mro__ if each in KINDS), INTERNAL)
        case RequestValidationError():
            return KINDS[OptionInvalid]
        case HTTPException():
            title = HTTPStatus(error.status_code).phrase
            return Kind(status=error.status_code, slug=title.lower().replace(" ", "-"), title=title)
        case _:
            return INTERNAL


def answer_error(error: Exception, request_id: str, path: str = "") -> Response:
    """The one error answer, in the Open Inference Protocol's form under its paths.

    An error of the service's own is logged here and told to nobody.
    """
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    body = describe_problem(error, request_id)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, AnswerUnsupported):
        headers["Vary"] = "Accept"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="useg"'
    if isinstance(error, Busy | NotReady):
        headers["Retry-After"] = str(find_retry_s(error))
    if path.startswith(OIP_PREFIX):
        return Response(orjson.dumps({"error": body["detail"]}), body["status"], headers, "application/json")
    return Response(orjson.dumps(body), body["status"], headers, PROBLEM_MEDIA)


def describe_problem(error: Exception, request_id: str) -> dict[str, Any]:
    """The body of the error answer, for a request or for one picture of several; logs an error of the service's own."""
    kind = find_kind(error)
    body: dict[str, Any] = {
        "type": f"urn:useg:problem:{kind.slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": _describe(error),
        "instance": f"urn:useg:request:{request_id}",
    }
    if kind is INTERNAL:
        logger.error("request %s failed", request_id, exc_info=error)
        body["detail"] = f"the service failed; its log has the cause under request {request_id}"
    if isinstance(error, Busy | NotReady):
        body["retry_after_ms"] = find_retry_s(error) * 1000
    return body


def find_retry_s(error: Busy | NotReady) -> int:
    """When to come back."""
    return max(1, error.retry_after_s) if isinstance(error, Busy) else NOT_READY_RETRY_S


def _describe(error: Exception) -> str:
    if isinstance(error, RequestValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    if isinstance(error, HTTPException):
        return f"{error.detail}: /openapi.json lists the routes and their methods"
    return str(error)
