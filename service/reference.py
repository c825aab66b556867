"""What OpenAPI says of the routes beyond their Python signatures."""

from http import HTTPStatus
from typing import Any

from model.contract import TASKS
from service.errors import PROBLEM_MEDIA
from service.schemas import Problem, SegmentationAnswer

Responses = dict[int | str, dict[str, Any]]

_BINARY = {"type": "string", "format": "binary"}
_HEADERS = {
    "Server-Timing": {"description": "Milliseconds in each stage.", "schema": {"type": "string"}},
    "X-Image-Notes": {"description": "What was left out of the picture, if anything.", "schema": {"type": "string"}},
}


def describe_problems(*statuses: int) -> Responses:
    """The documented error answers of a route."""
    content = {PROBLEM_MEDIA: {"schema": Problem.model_json_schema()}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


SEGMENT_RESPONSES: Responses = {
    200: {
        "description": "The segments, in the type that `Accept` asks for.",
        "model": SegmentationAnswer,
        "headers": _HEADERS,
        "content": {
            "image/png": {"schema": {**_BINARY, "description": "COCO panoptic: id = R + 256 G + 65536 B, 0 is void."}},
            "image/jpeg": {"schema": {**_BINARY, "description": "The picture under its coloured segments."}},
        },
    },
    **describe_problems(406, 413, 415, 422, 500, 503, 504),
}

SEGMENT_REQUEST: dict[str, Any] = {
    "parameters": [
        {
            "name": "task",
            "in": "query",
            "description": "panoptic: objects and stuff, no overlap; instance: objects; semantic: one segment a class.",
            "schema": {"type": "string", "enum": list(TASKS), "default": "panoptic"},
        },
        {
            "name": "threshold",
            "in": "query",
            "description": "Least score of an object, in place of the artifact's own.",
            "schema": {"type": "number", "minimum": 0, "maximum": 1},
        },
    ],
    "requestBody": {
        "required": True,
        "description": "One JPEG, PNG, WebP, GIF, BMP or TIFF file, in a form or by itself.",
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {"file": _BINARY}}
            },
            "image/*": {"schema": _BINARY},
            "application/octet-stream": {"schema": _BINARY},
        },
    },
}
