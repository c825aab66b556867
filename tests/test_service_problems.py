"""Every error has one status and one body, and internal errors are not sent to clients."""

import logging

import orjson
import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from model.errors import (
    ArtifactError,
    ConfigError,
    ContractMismatch,
    DeadlineExceeded,
    ImageTooLarge,
    InvalidImage,
    InvalidParameter,
    NotAcceptable,
    NotReady,
    QueueFull,
    UnsupportedMediaType,
    UploadTimeout,
)
from service.problems import PROBLEM_TYPES, find_problem_type, make_error_response
from service.schemas import Problem


def test_slugs_are_unique() -> None:
    kinds = set(PROBLEM_TYPES.values())
    assert len({kind.slug for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("error", "status", "slug"),
    [
        (ImageTooLarge("x"), 413, "image-too-large"),
        (InvalidImage("x"), 422, "invalid-image"),
        (InvalidParameter("x"), 422, "invalid-parameter"),
        (UnsupportedMediaType("x"), 415, "unsupported-media-type"),
        (NotAcceptable("x"), 406, "not-acceptable"),
        (QueueFull("x", retry_after_s=3), 503, "queue-full"),
        (NotReady("x"), 503, "not-ready"),
        (DeadlineExceeded("x"), 504, "deadline-exceeded"),
        (UploadTimeout("x"), 408, "upload-timeout"),
        (ConfigError("x"), 500, "internal"),
        (ContractMismatch("x"), 500, "internal"),
        (HTTPException(404), 404, "not-found"),
        (HTTPException(405), 405, "method-not-allowed"),
        (RequestValidationError([]), 422, "invalid-parameter"),
        (ZeroDivisionError("x"), 500, "internal"),
    ],
)
def test_each_error_has_a_status_and_a_slug(error: Exception, status: int, slug: str) -> None:
    assert (find_problem_type(error).status, find_problem_type(error).slug) == (status, slug)


def test_the_body_describes_the_error_and_the_request() -> None:
    response = make_error_response(InvalidImage("no picture: send one"), "abc")
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert orjson.loads(response.body) == {
        "type": "urn:useg:problem:invalid-image",
        "title": "The image cannot be decoded",
        "status": 422,
        "detail": "no picture: send one",
        "instance": "urn:useg:request:abc",
    }


@pytest.mark.parametrize(("given_s", "sent"), [(7, "7"), (0, "1")])
def test_queue_full_has_a_retry_after_of_at_least_one_second(given_s: int, sent: str) -> None:
    response = make_error_response(QueueFull("full", retry_after_s=given_s), "abc")
    assert response.headers["retry-after"] == sent
    assert Problem.model_validate_json(response.body).retry_after_ms == int(sent) * 1000


def test_not_ready_has_a_retry_after() -> None:
    assert int(make_error_response(NotReady("warming up"), "abc").headers["retry-after"]) >= 1


@pytest.mark.parametrize("error", [RuntimeError("secret path"), ArtifactError("secret path")])
def test_an_internal_error_is_logged_but_not_sent(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        response = make_error_response(error, "abc")
    assert response.status_code == 500
    assert b"secret" not in response.body
    assert b"abc" in response.body
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is error


def test_method_not_allowed_keeps_the_allow_header() -> None:
    assert make_error_response(HTTPException(405, headers={"Allow": "POST"}), "abc").headers["allow"] == "POST"


def test_a_disconnected_client_counts_as_499() -> None:
    assert make_error_response(ClientDisconnect(), "abc").status_code == 499
