"""Messages of the Open Inference Protocol v2, their tensors in JSON and in the binary extension."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from jaxtyping import Int32
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from model.errors import InvalidParameter
from service.inference.pipeline import ImageContent
from service.requests import MAX_IMAGES, decode_base64, invalid_request

LENGTH_HEADER = "Inference-Header-Content-Length"
_LENGTH_BYTES = 4

InputName = Literal["image", "image_rgb", "image_bgr"]
IDS_OUTPUT = "panoptic_ids"
OutputName = Literal["panoptic", "instance", "semantic", "panoptic_ids"]
Datatype = Literal["BYTES", "UINT8", "INT32"]
INPUTS: dict[InputName, tuple[Datatype, list[int]]] = {
    "image": ("BYTES", [-1]),
    "image_rgb": ("UINT8", [-1, -1, -1, 3]),
    "image_bgr": ("UINT8", [-1, -1, -1, 3]),
}
"""Datatype and shape of each input, one of which a request has: encoded files, or upright images of one size as arrays
N H W 3 or H W 3, their channels in the order of the name."""
OUTPUTS: dict[OutputName, tuple[Datatype, list[int]]] = {
    "panoptic": ("BYTES", [-1]),
    "instance": ("BYTES", [-1]),
    "semantic": ("BYTES", [-1]),
    "panoptic_ids": ("INT32", [-1, -1, -1]),
}
"""Datatype and shape of each output: the JSON of `/v1/segment` for each image, or the segment ids of the pixels."""


class _Message(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, defer_build=True)


class _Request(_Message):
    model_config = ConfigDict(extra="forbid")


class RepositoryEntry(_Message):
    """A version in the model repository."""

    name: str
    version: str
    state: Literal["LOADING", "READY", "UNAVAILABLE"]
    reason: str


class InferInput(_Request):
    """The images of a request: encoded files in `image` (BYTES; base64 in JSON), or pixels in `image_rgb` or
    `image_bgr` (UINT8)."""

    name: InputName
    datatype: Literal["BYTES", "UINT8"]
    shape: Annotated[list[PositiveInt], Field(min_length=1)]
    parameters: dict[str, Any] = {}
    """`binary_data_size`: bytes of this tensor after the JSON."""
    data: list[Any] | None = None
    """Base64 texts or pixel values, flat or nested."""

    @model_validator(mode="after")
    def _check_datatype(self) -> "InferInput":
        if self.datatype != INPUTS[self.name][0]:
            raise ValueError("'image' takes files as BYTES; 'image_rgb' and 'image_bgr' take arrays as UINT8")
        return self


class InferOutputRequest(_Request):
    """A requested output."""

    name: OutputName
    parameters: dict[str, Any] = {}
    """`binary_data`: whether the output follows the JSON."""


class InferRequest(_Request):
    """An inference request. Parameters are the options of `/v1/segment` except `task`, and `priority`, `timeout` (µs)
    and `binary_data_output`. Without `outputs`, all are returned; `panoptic_ids` only if the images have one size."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=1)]
    outputs: list[InferOutputRequest] = []


class OipError(_Message):
    """Any error."""

    error: str


_RAW_REQUEST = InferRequest.model_construct(parameters={"binary_data_output": True})

Output = list[bytes] | Int32[np.ndarray, "N H W"]
"""Elements of a BYTES tensor, or an INT32 tensor."""


def parse_infer_request(body: bytes, header: str | None) -> tuple[InferRequest, tuple[ImageContent, ...]]:
    """Return the request and its images; `header` is the length of the JSON part, 0 for a body that is one image.

    Raises InvalidParameter and RequestValidationError, and as `decode_base64`.
    """
    length = _parse_length(header, len(body))
    if length == 0:
        return _RAW_REQUEST, (body,)
    try:
        request = InferRequest.model_validate_json(body[:length])
    except ValidationError as error:
        raise invalid_request(error) from error
    return request, _read_images(request.inputs[0], body[length:])


def list_outputs(request: InferRequest) -> dict[OutputName, bool]:
    """Return the requested outputs, and whether each is binary. Raises InvalidParameter."""
    default = bool(request.parameters.get("binary_data_output", False))
    if not request.outputs:
        return dict.fromkeys(OUTPUTS, default)
    outputs: dict[OutputName, bool] = {}
    for each in request.outputs:
        if each.name in outputs:
            raise InvalidParameter(f"output {each.name!r} is requested twice")
        outputs[each.name] = bool(each.parameters.get("binary_data", default))
    return outputs


def encode_infer_response(
    head: dict[str, Any], outputs: Mapping[OutputName, bool], values: Sequence[Output]
) -> tuple[bytes, int | None]:
    """Return the body, and the length of its JSON part if binary tensors follow it."""
    entries: list[dict[str, Any]] = []
    tensors: list[bytes] = []
    for (name, is_binary), value in zip(outputs.items(), values, strict=True):
        shape = [len(value)] if isinstance(value, list) else list(value.shape)
        entry: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name][0], "shape": shape}
        if is_binary:
            tensors.append(_encode_binary(value))
            entry["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            entry["data"] = (
                [each.decode() for each in value] if isinstance(value, list) else value.astype("<i4").ravel()
            )
        entries.append(entry)
    text = orjson.dumps(head | {"outputs": entries}, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([text, *tensors]), len(text)) if tensors else (text, None)


def _parse_length(header: str | None, body_length: int) -> int:
    if header is None:
        return body_length
    if not (header.isascii() and header.isdecimal() and len(header) < 16 and int(header) <= body_length):
        raise InvalidParameter(
            f"{LENGTH_HEADER} must be a number up to the body's length {body_length}, got {header!r}"
        )
    return int(header)


def _read_images(tensor: InferInput, binary: bytes) -> tuple[ImageContent, ...]:
    size = tensor.parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or size != len(binary)):
        raise InvalidParameter(f"binary_data_size is {size!r}, but {len(binary)} bytes follow the JSON")
    is_array = tensor.datatype == "UINT8"
    if is_array and (len(tensor.shape) not in (3, 4) or tensor.shape[-1] != 3):
        raise InvalidParameter(f"{tensor.name!r} has the shape {tensor.shape}, expected N H W 3 or H W 3")
    num_images = math.prod(tensor.shape[:-3] if is_array else tensor.shape)
    if num_images > MAX_IMAGES:
        raise InvalidParameter(
            f"{tensor.name!r} has the shape {tensor.shape}: at most {MAX_IMAGES} images are accepted"
        )
    if is_array:
        pixels = binary if size is not None else _decode_pixels(tensor)
        _check_count(tensor, len(pixels))
        images = np.frombuffer(pixels, np.uint8).reshape(num_images, *tensor.shape[-3:])
        return tuple(np.ascontiguousarray(images[..., ::-1] if tensor.name == "image_bgr" else images))
    files = _decode_binary(binary) if size is not None else _decode_texts(tensor)
    _check_count(tensor, len(files))
    return files


def _check_count(tensor: InferInput, count: int) -> None:
    if count != math.prod(tensor.shape):
        raise InvalidParameter(f"{tensor.name!r} has the shape {tensor.shape} but {count} elements")


def _flatten(data: Any) -> Any:
    while isinstance(data, list) and data and isinstance(data[0], list):
        data = [element for row in data if isinstance(row, list) for element in row]
    return data


def _decode_texts(tensor: InferInput) -> tuple[bytes, ...]:
    elements = _flatten(tensor.data)
    if not isinstance(elements, list) or not all(isinstance(element, str) for element in elements):
        raise InvalidParameter(f'"data" of {tensor.name!r} must be a list of images as base64')
    return tuple(decode_base64(element) for element in elements)


def _decode_pixels(tensor: InferInput) -> bytes:
    try:
        return bytes(_flatten(tensor.data) or ())
    except (TypeError, ValueError) as error:
        raise InvalidParameter(f'"data" of {tensor.name!r} must be a list of integers in 0..255') from error


def _decode_binary(binary: bytes) -> tuple[bytes, ...]:
    """Split elements, each after its length as four little-endian bytes."""
    elements: list[bytes] = []
    start = 0
    while start < len(binary):
        length = int.from_bytes(binary[start : start + _LENGTH_BYTES], "little")
        start += _LENGTH_BYTES + length
        if start > len(binary):
            raise InvalidParameter(f"element {len(elements)} of 'image' is truncated")
        elements.append(binary[start - length : start])
        if len(elements) > MAX_IMAGES:
            raise InvalidParameter(f"'image' holds more than {MAX_IMAGES} images")
    return tuple(elements)


def encode_bytes_tensor(elements: Iterable[bytes]) -> bytes:
    """Return a BYTES tensor: each element after its length as four little-endian bytes."""
    return b"".join(len(element).to_bytes(_LENGTH_BYTES, "little") + element for element in elements)


def _encode_binary(value: Output) -> bytes:
    if isinstance(value, list):
        return encode_bytes_tensor(value)
    return value.astype("<i4").tobytes()
