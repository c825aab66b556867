"""Messages of the Open Inference Protocol v2 (REST) and of its Triton extensions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

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


class ServerMetadata(_Message):
    """The server and the protocol extensions that it supports."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(_Message):
    """Name, type and shape of a tensor; -1 is any length."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(_Message):
    """Inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


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


class InferOutput(_Message):
    """An output tensor: for each image the JSON response of `/v1/segment`, or the segment ids of its pixels."""

    name: OutputName
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[str] | list[int] | None = None


class InferResponse(_Message):
    """The requested outputs."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutput]


class OipError(_Message):
    """Any error."""

    error: str
