"""What OpenAPI says of the routes beyond their Python signatures."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from model.contract import TASKS
from service.middleware.auth import is_public
from service.oip.schemas import Responses, document_errors
from service.requests.body import MAX_IMAGES
from service.requests.context import PRIORITY_HEADER, ROUTING_HEADER, TIMEOUT_HEADER
from service.requests.parameters import FORMAT_NAMES, MAX_EDGE_PX, MIN_EDGE_PX
from service.responses.examples import ANSWER, BATCH, FEATURES, LABELLED, PROBLEM_DETAILS, TASKS_ANSWER, example_problem
from service.responses.problems import OIP_PREFIX, PROBLEM_MEDIA_TYPE, PROBLEM_TYPES
from service.responses.schemas import (
    BatchResponse,
    FeatureCollection,
    HuggingFaceMask,
    MultiTaskResponse,
    Problem,
    SegmentationResponse,
    SegmentJsonBody,
)

_SCHEMAS: Sequence[type[BaseModel]] = (
    SegmentationResponse,
    MultiTaskResponse,
    BatchResponse,
    FeatureCollection,
    HuggingFaceMask,
    SegmentJsonBody,
    Problem,
)
_BINARY = {"type": "string", "format": "binary"}
_FRACTION = {"type": "number", "minimum": 0, "maximum": 1}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_HEADERS = {
    "Server-Timing": {"description": "Milliseconds in each stage.", "schema": {"type": "string"}},
    "X-Model-Version": {"description": "The artifact's version.", "schema": {"type": "string"}},
    "X-Image-Notes": {"description": "What was left out of the picture, if anything.", "schema": {"type": "string"}},
    "X-Request-ID": {"description": "The request's id, its sender's or ours.", "schema": {"type": "string"}},
}


class DocumentedApi(FastAPI):
    """An application whose OpenAPI document holds what the routes here refer to."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            document = super().openapi()
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(_list_schemas())
            components["securitySchemes"] = _SECURITY
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    operation["responses"] = _document_middleware_errors(path, method) | operation["responses"]
            document["security"] = [{}, *({name: []} for name in _SECURITY)]  # a service without keys asks for none
        return self.openapi_schema or {}


def _document_middleware_errors(path: str, method: str) -> dict[str, Any]:
    """What a request may be answered before its route is asked."""
    statuses = [HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE]
    if not is_public(path):
        statuses.append(HTTPStatus.UNAUTHORIZED)
    if method == "post":
        statuses.append(HTTPStatus.TOO_MANY_REQUESTS)
    describe = document_errors if path.startswith(OIP_PREFIX) else document_problems
    return {str(int(status)): answer for status, answer in describe(*statuses).items()}


def _list_schemas() -> dict[str, Any]:
    _, document = models_json_schema(
        [(schema, "serialization") for schema in _SCHEMAS], ref_template="#/components/schemas/{model}"
    )
    return dict(document["$defs"])


def document_problems(*statuses: int) -> Responses:
    """The documented error answers of a route, with an example for each kind of error there is of a status."""
    return {status: _document_problem(status) for status in statuses}


def _document_problem(status: int) -> dict[str, Any]:
    examples = {
        kind.slug: {"summary": kind.title, "value": example_problem(kind, PROBLEM_DETAILS.get(kind.slug))}
        for kind in dict.fromkeys(PROBLEM_TYPES.values())
        if kind.status == status
    }
    content: dict[str, Any] = {"schema": _refer(Problem)}
    if examples:
        content["examples"] = examples
    described: dict[str, Any] = {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM_MEDIA_TYPE: content},
    }
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        schema = {"type": "integer", "minimum": 1}
        described["headers"] = {"Retry-After": {"description": "Seconds until it is worth a try.", "schema": schema}}
    return described


def _refer(schema: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema.__name__}"}


def _parameter(name: str, description: str, schema: dict[str, Any], place: str = "query") -> dict[str, Any]:
    return {"name": name, "in": place, "description": description, "schema": schema}


def _list_parameter(name: str, description: str, items: dict[str, Any], **schema: Any) -> dict[str, Any]:
    """One whose entries are separated by commas."""
    listed = {"type": "array", "items": items, **schema}
    return _parameter(name, description, listed) | {"style": "form", "explode": False}


_JSON_CONTENT = {
    "schema": {"anyOf": [_refer(SegmentationResponse), _refer(MultiTaskResponse), _refer(BatchResponse)]},
    "examples": {
        "one picture, one task": {"value": ANSWER},
        "one picture, several tasks": {"value": TASKS_ANSWER},
        "a batch": {"value": BATCH},
    },
}
_CONTENT: dict[str, Any] = {
    "application/json": _JSON_CONTENT,
    "image/png": {"schema": {**_BINARY, "description": "COCO panoptic: id = R + 256 G + 65536 B, 0 is void."}},
    "image/jpeg": {"schema": {**_BINARY, "description": "The picture under its coloured segments."}},
    "application/geo+json": {"schema": _refer(FeatureCollection), "example": FEATURES},
    'image/png;profile="clusters"': {
        "schema": {**_BINARY, "description": "Grey: the cluster of each pixel, 0 is void; 16 bits above 255 clusters."}
    },
    "application/x-npz": {"schema": {**_BINARY, "description": "NumPy arrays: label_map, ids, clusters, scores, …"}},
    "application/vnd.hf.image-segmentation+json": {
        "schema": {"type": "array", "items": _refer(HuggingFaceMask)},
        "example": LABELLED,
    },
    "application/zip": {"schema": {**_BINARY, "description": "`parts` of every picture; with png a COCO data set."}},
    "multipart/mixed": {"schema": {**_BINARY, "description": "`parts` of every picture, `X-Status` with each."}},
}

SEGMENT_RESPONSES: Responses = {
    200: {
        "description": "The segments, in the type that `Accept` asks for; several pictures or tasks in JSON, zip or "
        "multipart alone.",
        "headers": _HEADERS,
        "content": _CONTENT,
    },
    207: {
        "description": "A batch in which pictures failed; the others are answered.",
        "headers": _HEADERS,
        "content": {
            "application/json": {"schema": _refer(BatchResponse), "example": BATCH},
            "application/zip": _CONTENT["application/zip"],
            "multipart/mixed": _CONTENT["multipart/mixed"],
        },
    },
    **document_problems(404, 406, 413, 415, 422, 500, 503, 504),
}

SEGMENT_REQUEST: dict[str, Any] = {
    "parameters": [
        _list_parameter(
            "task",
            "panoptic: objects and stuff, no overlap; instance: objects; semantic: one segment a class. Several come "
            "from the same run of the network.",
            {"type": "string", "enum": list(TASKS)},
            default=["panoptic"],
        ),
        _parameter("model", "The model by its name, where several are served.", {"type": "string", "maxLength": 64}),
        _parameter(
            "threshold",
            "Least score of an object, in place of the artifact's own; in the semantic answer, objects of a quarter of "
            "it fill what would be void.",
            _FRACTION,
        ),
        _parameter("mask_threshold", "Least probability of a pixel of an object.", _FRACTION),
        _parameter(
            "overlap_mask_area_threshold", "Least share of an object's mask that shows in the panoptic map.", _FRACTION
        ),
        _parameter("min_stuff_area", "Least share of the picture that stuff covers in the panoptic map.", _FRACTION),
        _list_parameter("classes", "Categories by name, clusters by number; no other is answered.", {"type": "string"}),
        _parameter(
            "max_side",
            "Longest side of the answer in pixels; a larger picture is answered in a smaller size.",
            {"type": "integer", "minimum": MIN_EDGE_PX, "maximum": MAX_EDGE_PX},
        ),
        _parameter(
            "agnostic_nms",
            "Drop an object that covers a better one (IoU above 0.5), of whatever class.",
            {"type": "boolean", "default": False},
        ),
        _list_parameter(
            "parts",
            "What a zip or multipart answer holds for each picture and task.",
            {"type": "string", "enum": list(FORMAT_NAMES)},
            default=["json", "png"],
        ),
        _parameter("subtask", "Hugging Face's name of `task`.", {"type": "string", "enum": list(TASKS)}),
        _parameter(TIMEOUT_HEADER, "Milliseconds that the answer is worth waiting for.", {"type": "integer"}, "header"),
        _parameter(
            ROUTING_HEADER, "Whose request it is: a canary answers all of a key or none.", {"type": "string"}, "header"
        ),
        _parameter(PRIORITY_HEADER, "1 goes first, 3 last.", {"type": "integer", "enum": [1, 2, 3]}, "header"),
    ],
    "requestBody": {
        "required": True,
        "description": "JPEG, PNG, WebP, GIF, BMP or TIFF files: one by itself, or one or more in a form or in JSON.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "array", "items": _BINARY, "maxItems": MAX_IMAGES}},
                }
            },
            "application/json": {
                "schema": _refer(SegmentJsonBody),
                "example": {"inputs": "iVBORw0KGgo…", "parameters": {"task": "instance", "threshold": 0.4}},
            },
            "image/*": {"schema": _BINARY},
            "application/octet-stream": {"schema": _BINARY},
        },
    },
}
