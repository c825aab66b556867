"""Error responses (RFC 9457): the table of statuses, the function that makes the body, and their documentation."""

import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model.errors import (
    ClusterNotFound,
    DeadlineExceeded,
    HeadersTooLarge,
    ImageTooLarge,
    InputError,
    InvalidCategoryNames,
    InvalidImage,
    InvalidParameter,
    ModelNotFound,
    NotAcceptable,
    NotReady,
    PermissionDenied,
    PreconditionFailed,
    QueueFull,
    RateLimited,
    RegistryConflict,
    ShuttingDown,
    TooManyPixels,
    Unauthorized,
    UnsupportedMediaType,
    UploadTimeout,
    UrlInputUnsupported,
    UsegError,
)
from service.schemas import Problem

logger = logging.getLogger(__name__)

PROBLEM_MEDIA_TYPE = "application/problem+json"
CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics if the client disconnected; it is never sent."""
OIP_PREFIX = "/v2"
_NOT_READY_RETRY_S = 5

Responses = dict[int | str, dict[str, Any]]
"""Documented responses of a route, as FastAPI takes them."""


@dataclass(frozen=True)
class ProblemType:
    """What all errors of a class have in common."""

    status: int
    slug: str
    """Stable end of the problem's `type`."""
    title: str
    rejection: str | None = None
    """Label in the metric of rejected requests; None if the error is not counted there."""


INTERNAL_ERROR = ProblemType(500, "internal", "Internal server error")

PROBLEM_TYPES: dict[type[UsegError], ProblemType] = {
    InputError: ProblemType(400, "bad-request", "Bad request"),
    ImageTooLarge: ProblemType(413, "image-too-large", "The image is too large", "too_large"),
    TooManyPixels: ProblemType(422, "too-many-pixels", "The image has too many pixels", "too_many_pixels"),
    InvalidImage: ProblemType(422, "invalid-image", "The image cannot be decoded"),
    InvalidParameter: ProblemType(422, "invalid-parameter", "Invalid parameter"),
    UnsupportedMediaType: ProblemType(415, "unsupported-media-type", "Unsupported Content-Type of the body"),
    NotAcceptable: ProblemType(406, "not-acceptable", "No response format matches the Accept header"),
    UrlInputUnsupported: ProblemType(
        422, "url-input-unsupported", "Image URLs are not supported; upload the image", "url_blocked"
    ),
    HeadersTooLarge: ProblemType(431, "headers-too-large", "The headers are too large", "too_large"),
    Unauthorized: ProblemType(401, "unauthorized", "An API key is required", "unauthorized"),
    PermissionDenied: ProblemType(403, "permission-denied", "An admin key is required"),
    ModelNotFound: ProblemType(404, "model-not-found", "Model not found"),
    RegistryConflict: ProblemType(409, "registry-conflict", "The state of the registry does not allow this change"),
    ClusterNotFound: ProblemType(404, "cluster-not-found", "Cluster not found"),
    PreconditionFailed: ProblemType(412, "precondition-failed", "The category names have changed in the meantime"),
    InvalidCategoryNames: ProblemType(409, "invalid-category-names", "The category names cannot be changed"),
    QueueFull: ProblemType(503, "queue-full", "The queue is full", "queue_full"),
    RateLimited: ProblemType(429, "rate-limited", "Too many requests", "rate_limit"),
    NotReady: ProblemType(503, "not-ready", "The server is not ready", "not_ready"),
    ShuttingDown: ProblemType(503, "shutting-down", "The server is shutting down", "draining"),
    UploadTimeout: ProblemType(408, "upload-timeout", "The body did not arrive in time"),
    DeadlineExceeded: ProblemType(504, "deadline-exceeded", "The request timed out"),
}
"""All others are `INTERNAL_ERROR`."""


def unwrap_error(error: Exception) -> Exception:
    """Return the error that FastAPI wraps in an HTTPException while it reads a JSON body."""
    if not isinstance(error, HTTPException) or not isinstance(error.__cause__, Exception):
        return error
    return error.__cause__ if isinstance(error.__cause__, UsegError) else InvalidParameter("the body is not valid JSON")


def find_problem_type(error: Exception) -> ProblemType:
    """Return the entry of the nearest listed base class of `error`; `INTERNAL_ERROR` for any other exception."""
    if isinstance(error, HTTPException):
        title = HTTPStatus(error.status_code).phrase
        return ProblemType(error.status_code, title.lower().replace(" ", "-"), title)
    kind = InvalidParameter if isinstance(error, RequestValidationError) else type(error)
    return next((PROBLEM_TYPES[each] for each in kind.__mro__ if each in PROBLEM_TYPES), INTERNAL_ERROR)


def make_error_response(error: Exception, request_id: str, path: str = "") -> Response:
    """Return the response to a failed request, in the form of the Open Inference Protocol under its paths.

    An internal error is logged here, and its message is not sent.
    """
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    body = make_problem(error, request_id)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, NotAcceptable):
        headers["Vary"] = "Accept"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="useg"'
    if retry_after_ms := body.get("retry_after_ms"):
        headers["Retry-After"] = str(retry_after_ms // 1000)
    if path.startswith(OIP_PREFIX):
        return Response(orjson.dumps({"error": body["detail"]}), body["status"], headers, "application/json")
    return Response(orjson.dumps(body), body["status"], headers, PROBLEM_MEDIA_TYPE)


def make_problem(error: Exception, request_id: str) -> dict[str, Any]:
    """Return the body for a request, or for one image of a batch; logs an internal error."""
    problem_type = find_problem_type(error)
    body: dict[str, Any] = {
        "type": f"urn:useg:problem:{problem_type.slug}",
        "title": problem_type.title,
        "status": problem_type.status,
        "detail": _error_detail(error),
        "instance": f"urn:useg:request:{request_id}",
    }
    if problem_type is INTERNAL_ERROR:
        logger.error("request %s failed", request_id, exc_info=error)
        body["detail"] = f"internal error; the server's log has the cause under request {request_id}"
    if isinstance(error, QueueFull):
        body["retry_after_ms"] = max(1, error.retry_after_s) * 1000
    elif isinstance(error, NotReady):
        body["retry_after_ms"] = _NOT_READY_RETRY_S * 1000
    return body


REFERENCED_SCHEMAS: set[type[BaseModel]] = set()
"""Schemas to which routes refer by name: FastAPI does not see them, and they are not needed at the start."""


def reference(*schemas: type[BaseModel]) -> dict[str, Any]:
    """Return an OpenAPI schema that is any of `schemas`, which `service.app` adds to the document."""
    REFERENCED_SCHEMAS.update(schemas)
    references = [{"$ref": f"#/components/schemas/{schema.__name__}"} for schema in schemas]
    return references[0] if len(references) == 1 else {"anyOf": references}


def document_problems(*statuses: int) -> Responses:
    """Document the errors of a route: the kinds that have one of these statuses."""
    return {status: _document_problem(status) for status in statuses}


def _error_detail(error: Exception) -> str:
    if isinstance(error, RequestValidationError):
        return "; ".join(_validation_detail(each) for each in error.errors())
    if isinstance(error, HTTPException):
        return f"{error.detail}: /openapi.json lists the routes and their methods"
    return str(error)


def _validation_detail(error: dict[str, Any]) -> str:
    """Return `threshold: Input should be …` for an error that pydantic found."""
    message = error["msg"].removeprefix("Value error, ")
    location = ".".join(str(each) for each in error["loc"] if each not in ("query", "header", "path", "body"))
    return f"{location}: {message}" if location else message


def _document_problem(status: int) -> dict[str, Any]:
    slugs = [f"`{kind.slug}`" for kind in PROBLEM_TYPES.values() if kind.status == status] or ["`internal`"]
    content: dict[str, Any] = {PROBLEM_MEDIA_TYPE: {"schema": reference(Problem)}}
    response: dict[str, Any] = {"description": f"{HTTPStatus(status).phrase}: {', '.join(slugs)}", "content": content}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        schema = {"type": "integer", "minimum": 1}
        response["headers"] = {"Retry-After": {"description": "Seconds until the next attempt.", "schema": schema}}
    return response
