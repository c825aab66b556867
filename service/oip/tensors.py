"""Requests and answers of the Open Inference Protocol v2, in JSON and with its binary extension."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from jaxtyping import Int32

from model.errors import InvalidParameter
from service.requests.body import MAX_IMAGES, decode_base64

INPUT = "image"
IDS = "panoptic_ids"
OUTPUTS: dict[str, tuple[str, list[int]]] = {
    "panoptic": ("BYTES", [-1]),
    "instance": ("BYTES", [-1]),
    "semantic": ("BYTES", [-1]),
    IDS: ("INT32", [-1, -1, -1]),
}
"""Datatype and shape of each output: the answer to a task as JSON, a picture an element, or the ids of its pixels."""
LENGTH_HEADER = "Inference-Header-Content-Length"
_LENGTH_BYTES = 4
_TOP = {"id", "parameters", "inputs", "outputs"}


@dataclass(frozen=True, kw_only=True)
class RequestedOutput:
    """An output that was asked for."""

    name: str
    is_binary: bool


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """Pictures, and what is to be told of them."""

    id: str | None
    pictures: tuple[bytes, ...]
    outputs: tuple[RequestedOutput, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)


Output = list[bytes] | Int32[np.ndarray, "N H W"]
"""Elements of a BYTES tensor, or an INT32 tensor."""


def parse_infer_request(body: bytes, header: str | None) -> InferRequest:
    """The request in a body, whose JSON is as long as the header of the binary extension says, if there is one.

    Raises InvalidParameter for whatever does not keep the protocol, and as `decode_base64` does.
    """
    length = _read_length(header, len(body))
    if length == 0:
        outputs = (RequestedOutput(name="panoptic", is_binary=True),)
        return InferRequest(id=None, pictures=(body,), outputs=outputs)
    try:
        content = orjson.loads(body[:length])
    except orjson.JSONDecodeError as error:
        raise InvalidParameter(f"the request is no JSON: {error}") from error
    if not isinstance(content, dict) or "inputs" not in content or not content.keys() <= _TOP:
        raise InvalidParameter(
            'the request must be an object of "inputs" and, if any, "id", "parameters" and "outputs"'
        )
    parameters = _get_typed(content, "parameters", dict, {})
    is_binary = bool(parameters.get("binary_data_output", False))
    return InferRequest(
        id=_get_typed(content, "id", str, None),
        pictures=_read_pictures(_get_typed(content, "inputs", list, []), body[length:]),
        outputs=_read_outputs(_get_typed(content, "outputs", list, None), is_binary),
        parameters={name: value for name, value in parameters.items() if name != "binary_data_output"},
    )


def encode_infer_response(
    head: dict[str, Any], outputs: Sequence[tuple[RequestedOutput, Output]]
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON where tensors follow in binary."""
    entries: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for wanted, output in outputs:
        shape = [len(output)] if isinstance(output, list) else list(output.shape)
        entry: dict[str, Any] = {"name": wanted.name, "datatype": OUTPUTS[wanted.name][0], "shape": shape}
        if wanted.is_binary:
            tail.append(_write_binary(output))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        elif isinstance(output, list):
            entry["data"] = [element.decode() for element in output]
        entries.append(entry)
    text = orjson.dumps(head | {"outputs": entries})
    return (b"".join([text, *tail]), len(text)) if tail else (text, None)


def _read_length(header: str | None, body_length: int) -> int:
    if header is None:
        return body_length
    if not (header.isascii() and header.isdecimal() and len(header) < 16 and int(header) <= body_length):
        raise InvalidParameter(
            f"{LENGTH_HEADER} must be a number up to the body's length {body_length}, got {header!r}"
        )
    return int(header)


def _get_typed(content: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key)
    if value is not None and not isinstance(value, kind):
        raise InvalidParameter(f'"{key}" must be a JSON {"object" if kind is dict else kind.__name__}')
    return default if value is None else value


def _read_pictures(inputs: list[Any], binary: bytes) -> tuple[bytes, ...]:
    if len(inputs) != 1 or not isinstance(inputs[0], dict) or inputs[0].get("name") != INPUT:
        raise InvalidParameter(f'"inputs" must hold the one tensor {INPUT!r}')
    tensor = inputs[0]
    if tensor.get("datatype") != "BYTES":
        raise InvalidParameter(
            f"{INPUT!r} must be of the datatype BYTES: encoded pictures, got {tensor.get('datatype')!r}"
        )
    shape = _get_typed(tensor, "shape", list, [])
    is_shape = bool(shape) and all(type(side) is int and side > 0 for side in shape)
    if not is_shape or not 1 <= (count := math.prod(shape)) <= MAX_IMAGES:
        raise InvalidParameter(f"{INPUT!r} must hold 1 to {MAX_IMAGES} pictures, got the shape {shape!r}")
    size = _get_typed(tensor, "parameters", dict, {}).get("binary_data_size")
    if size is None:
        pictures = _read_data(tensor.get("data"))
    elif type(size) is not int or size != len(binary):
        raise InvalidParameter(f"binary_data_size is {size!r}, {len(binary)} bytes follow")
    else:
        pictures = _read_binary(binary)
    if len(pictures) != count:
        raise InvalidParameter(f"{INPUT!r} has the shape {shape} and {len(pictures)} elements")
    return pictures


def _read_data(data: Any) -> tuple[bytes, ...]:
    """Elements in JSON, where bytes that are no text stand in base64; flat or nested."""
    elements = data
    while isinstance(elements, list) and elements and isinstance(elements[0], list):
        elements = [element for row in elements if isinstance(row, list) for element in row]
    if not isinstance(elements, list) or not all(isinstance(element, str) for element in elements):
        raise InvalidParameter(f'"data" of {INPUT!r} must be a list of pictures in base64')
    return tuple(decode_base64(element) for element in elements)


def _read_binary(binary: bytes) -> tuple[bytes, ...]:
    """Elements that follow their lengths, four bytes each, the lowest first."""
    elements: list[bytes] = []
    start = 0
    while start < len(binary):
        length = int.from_bytes(binary[start : start + _LENGTH_BYTES], "little")
        start += _LENGTH_BYTES + length
        if start > len(binary):
            raise InvalidParameter(f"element {len(elements)} of {INPUT!r} is cut short")
        elements.append(binary[start - length : start])
        if len(elements) > MAX_IMAGES:
            raise InvalidParameter(f"{INPUT!r} holds more than {MAX_IMAGES} pictures")
    return tuple(elements)


def _read_outputs(given: list[Any] | None, is_binary: bool) -> tuple[RequestedOutput, ...]:
    if not given:
        return (RequestedOutput(name="panoptic", is_binary=is_binary),)
    wanted: dict[str, RequestedOutput] = {}
    for entry in given:
        name = entry.get("name") if isinstance(entry, dict) else None
        if name not in OUTPUTS or name in wanted:
            raise InvalidParameter(f"no output, or one twice, in {name!r}: there are {', '.join(OUTPUTS)}")
        own = _get_typed(entry, "parameters", dict, {}).get("binary_data", is_binary)
        if name == IDS and not own:
            raise InvalidParameter(f"{IDS!r} comes as binary data alone: set its parameter binary_data")
        wanted[name] = RequestedOutput(name=name, is_binary=bool(own))
    return tuple(wanted.values())


def _write_binary(output: Output) -> bytes:
    if isinstance(output, list):
        return b"".join(len(each).to_bytes(_LENGTH_BYTES, "little") + each for each in output)
    return output.astype("<i4").tobytes()
