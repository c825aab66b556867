"""What OpenAPI says of the Open Inference Protocol's routes."""

from http import HTTPStatus
from typing import Any

from service.oip.tensors import INPUT, LENGTH_HEADER, OUTPUTS

Responses = dict[int | str, dict[str, Any]]

_BINARY = {"type": "string", "format": "binary"}
_LENGTH = {LENGTH_HEADER: {"description": "Bytes of JSON before the tensors.", "schema": {"type": "integer"}}}
_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string", "enum": ["BYTES", "INT32"]},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {"type": "string"}},
    },
}
_REQUESTED_OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "enum": list(OUTPUTS)}, "parameters": {"type": "object"}},
}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}

NOT_READY: Responses = {
    503: {
        "description": "Not ready.",
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["ready"], "properties": {"ready": {"type": "boolean"}}},
                "example": {"ready": False},
            }
        },
    }
}


def document_errors(*statuses: int) -> Responses:
    """The documented error answers of a route, in the protocol's one form."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {
                "application/json": {"schema": _ERROR, "example": {"error": f"{HTTPStatus(status).phrase.lower()}: …"}}
            },
        }
        for status in statuses
    }


MODEL_ERRORS = document_errors(404, 503)
INFER_ERRORS = document_errors(400, 404, 413, 415, 422, 500, 503, 504)

INFER_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "parameters": {"type": "object"},
                    "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
                    "outputs": {"type": "array", "items": _REQUESTED_OUTPUT},
                },
            },
            "example": {
                "id": "42",
                "parameters": {"threshold": 0.4},
                "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [1], "data": ["iVBORw0KGgo…"]}],
                "outputs": [{"name": "panoptic"}],
            },
        },
        "application/octet-stream": {"schema": {**_BINARY, "description": "JSON, then tensors."}},
    },
}
INFER_RESPONSES: Responses = {
    200: {
        "description": "The outputs that were asked for; tensors in binary follow the JSON.",
        "headers": _LENGTH,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model_name", "outputs"],
                    "properties": {
                        "model_name": {"type": "string"},
                        "model_version": {"type": "string"},
                        "id": {"type": "string"},
                        "outputs": {"type": "array", "items": _TENSOR},
                    },
                },
                "example": {
                    "model_name": "useg-vits14",
                    "model_version": "1",
                    "id": "42",
                    "outputs": [{"name": "panoptic", "datatype": "BYTES", "shape": [1], "data": ["{…}"]}],
                },
            },
            "application/octet-stream": {"schema": {**_BINARY, "description": "JSON, then tensors."}},
        },
    }
}
