"""The OpenAPI document describes every parameter, body, response and error."""

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, get_args

import httpx
import pytest
from fake_service import open_client

from service.problems import PROBLEM_TYPES
from service.requests import FormatName, SegmentParameters
from service.routes.segment import MEDIA_TYPES

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client() as each:
        yield each


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await client.get("/openapi.json")).json())


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a JSON document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(child)


def find_segment(document: dict[str, Any]) -> dict[str, Any]:
    return dict(document["paths"]["/v1/segment"]["post"])


async def test_every_parameter_has_a_description_and_its_choices(document: dict[str, Any]) -> None:
    parameters = {each["name"]: each for each in find_segment(document)["parameters"]}
    assert set(parameters) == {
        *SegmentParameters.model_fields,
        "X-Request-Timeout-Ms",
        "X-Request-Priority",
        "X-Routing-Key",
    }
    assert all(each["description"] for each in parameters.values())
    assert parameters["task"]["schema"]["items"]["enum"] == ["panoptic", "instance", "semantic"]
    assert parameters["formats"]["schema"]["items"]["enum"] == list(get_args(FormatName))


async def test_all_media_types_of_bodies_and_responses_are_listed(document: dict[str, Any]) -> None:
    operation = find_segment(document)
    assert set(operation["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
        "image/*",
        "application/octet-stream",
    }
    assert set(operation["responses"]["200"]["content"]) == set(MEDIA_TYPES)


async def test_every_kind_of_error_is_listed(document: dict[str, Any]) -> None:
    shown: dict[str, str] = {}
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if "application/problem+json" in response.get("content", {}):
                    shown |= dict.fromkeys(re.findall(r"`(.+?)`", response["description"]), status)
    assert len({kind.slug for kind in PROBLEM_TYPES.values()}) == len(PROBLEM_TYPES)
    expected = {kind.slug: str(kind.status) for kind in PROBLEM_TYPES.values()} | {"internal": "500"}
    assert shown == {slug: status for slug, status in expected.items() if slug != "bad-request"}
    answers = find_segment(document)["responses"]
    assert all("Retry-After" in answers[status]["headers"] for status in ("429", "503"))


async def test_errors_of_the_middleware_are_documented_on_every_route(document: dict[str, Any]) -> None:
    def list_statuses(path: str, method: str) -> set[str]:
        return set(document["paths"][path][method]["responses"])

    assert list_statuses("/livez", "get") == {"200", "431"}
    assert list_statuses("/v2", "get") == {"200", "401", "431"}
    assert {"401", "429", "431"} <= list_statuses("/v1/segment", "post")
    infer = document["paths"]["/v2/models/{name}/infer"]["post"]["responses"]
    assert {"401", "404", "422", "429", "431"} <= set(infer)
    schema = {"$ref": "#/components/schemas/OipError"}
    assert all(infer[status]["content"]["application/json"]["schema"] == schema for status in ("401", "429", "431"))


async def test_every_reference_resolves(document: dict[str, Any]) -> None:
    references = [each["$ref"] for each in walk(document) if "$ref" in each]
    assert len(references) > 10
    for reference in references:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


async def test_every_operation_has_a_summary_and_a_description(document: dict[str, Any]) -> None:
    operations = [each for path in document["paths"].values() for each in path.values()]
    assert len(operations) >= 3
    assert all(each["summary"] and each["description"] for each in operations)
