"""Messages of the Open Inference Protocol v2 (REST) and of its Triton extensions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

INPUT_NAME = "image"
IDS_OUTPUT = "panoptic_ids"
OutputName = Literal["panoptic", "instance", "semantic", "panoptic_ids"]
Datatype = Literal["BYTES", "INT32"]
OUTPUTS: dict[OutputName, tuple[Datatype, list[int]]] = {
    "panoptic": ("BYTES", [-1]),
    "instance": ("BYTES", [-1]),
    "semantic": ("BYTES", [-1]),
    "panoptic_ids": ("INT32", [-1, -1, -1]),
}
"""Datatype and shape of each output: the JSON of `/v1/segment` for each image, or the segment ids of the pixels."""


class _Message(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class _Request(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")


class ServerMetadata(_Message):
    """The server and the protocol extensions that it supports."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(_Message):
    """Whether the process responds."""

    live: bool


class ServerReady(_Message):
    """Whether images are accepted."""

    ready: bool


class ModelReady(_Message):
    """Whether a model accepts images."""

    name: str
    ready: bool


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


class TritonTensor(_Message):
    """A tensor in Triton's model configuration."""

    name: str
    data_type: Literal["TYPE_STRING", "TYPE_INT32"]
    dims: list[int]


class TritonModelConfig(_Message):
    """Triton's model configuration."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    """0: a request has no batch axis; the server itself batches images of several requests."""
    input: list[TritonTensor]
    output: list[TritonTensor]


class RepositoryEntry(_Message):
    """A version in the model repository."""

    name: str
    version: str
    state: Literal["LOADING", "READY", "UNAVAILABLE"]
    reason: str


class DurationStatistic(_Message):
    """How often something happened and how long it took in total."""

    count: int
    ns: int


class InferenceStatistics(_Message):
    """Requests, and stages of images."""

    success: DurationStatistic
    fail: DurationStatistic
    queue: DurationStatistic
    compute_input: DurationStatistic
    compute_infer: DurationStatistic
    compute_output: DurationStatistic
    cache_hit: DurationStatistic
    cache_miss: DurationStatistic


class VersionStatistics(_Message):
    """Statistics of a version since it was loaded."""

    name: str
    version: str
    last_inference: int
    """Milliseconds since 1970; 0 for never."""
    inference_count: int
    """Images."""
    execution_count: int
    """Batches."""
    inference_stats: InferenceStatistics
    batch_stats: list[Any]


class ModelStatistics(_Message):
    """Statistics of all loaded versions."""

    model_stats: list[VersionStatistics]


class InferInput(_Request):
    """The images of a request, each an encoded file: raw in binary, base64 in JSON."""

    name: Literal["image"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[PositiveInt], Field(min_length=1)]
    parameters: dict[str, Any] = {}
    """`binary_data_size`: bytes of this tensor after the JSON."""
    data: list[Any] | None = None
    """Base64 texts, flat or nested."""


class InferOutputRequest(_Request):
    """A requested output."""

    name: OutputName
    parameters: dict[str, Any] = {}
    """`binary_data`: whether the output follows the JSON."""


class InferRequest(_Request):
    """An inference request. Parameters are the options of `/v1/segment` except `task`, and `priority`, `timeout` (µs)
    and `binary_data_output`."""

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
    data: list[str] | None = None


class InferResponse(_Message):
    """The requested outputs."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutput]


class OipError(_Message):
    """Any error."""

    error: str
