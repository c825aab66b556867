"""The answers in JSON, documented for OpenAPI.

The service writes them without a detour over these classes; a test holds the two together.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.contract import Task


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageInfo(Schema):
    """The picture as it was read."""

    width: Annotated[int, Field(ge=1, description="Pixels of the answer, upright.")]
    height: Annotated[int, Field(ge=1, description="Pixels of the answer, upright.")]
    original_width: Annotated[int, Field(ge=1, description="Pixels of the file, upright; `max_side` tells them apart.")]
    original_height: Annotated[int, Field(ge=1, description="Pixels of the file, upright.")]
    frames: Annotated[int, Field(ge=1, description="Frames in the file.")]
    frame_used: Annotated[int, Field(ge=0, description="The frame that was segmented, from 0.")]
    orientation_applied: Annotated[bool, Field(description="Whether EXIF asked for a turn, which was made.")]
    notes: Annotated[list[str], Field(description="What was left out.")]


class ModelInfo(Schema):
    """The artifact that answered."""

    name: Annotated[str, Field(examples=["useg-vits14"])]
    version: Annotated[str, Field(examples=["1"])]


class CocoRle(Schema):
    """A mask in COCO's compressed run lengths, column-major, in the upright picture's size."""

    size: Annotated[tuple[int, int], Field(description="Height, width.")]
    counts: str


class SegmentProperties(Schema):
    """One region, but for its mask."""

    id: Annotated[int, Field(ge=1, description="Its value in the PNG answer: R + 256 G + 65536 B.")]
    cluster: Annotated[int, Field(ge=1, description="The network's own class.")]
    category_id: Annotated[int | None, Field(description="The cluster's category; null if it has none.")]
    category: Annotated[str | None, Field(description="The category's name; null if it has none.")]
    isthing: Annotated[bool, Field(description="A countable object, or else stuff.")]
    score: Annotated[float, Field(ge=0.0, le=1.0)]
    area: Annotated[int, Field(ge=1, description="Pixels.")]
    bbox: Annotated[tuple[int, int, int, int], Field(description="x, y, width, height in pixels.")]


class SegmentInfo(SegmentProperties):
    """One region."""

    segmentation: CocoRle


class TaskResult(Schema):
    """The segments for one task. Those of the tasks panoptic and semantic do not overlap, instances may."""

    task: Task
    segments_info: list[SegmentInfo]


class SegmentationResponse(TaskResult):
    """One picture and one task."""

    image: ImageInfo
    model: ModelInfo


class MultiTaskResponse(Schema):
    """One picture and several tasks, in the order they were asked for."""

    image: ImageInfo
    model: ModelInfo
    answers: list[TaskResult]


Ring = list[tuple[int, int]]


class MultiPolygon(Schema):
    """The parts of a mask: of each its outer ring, then its holes; x and y from the upper left, rings closed."""

    type: Literal["MultiPolygon"]
    coordinates: list[list[Ring]]


class Feature(Schema):
    """One region as polygons."""

    type: Literal["Feature"]
    id: int
    geometry: MultiPolygon
    properties: SegmentProperties


class FeatureCollection(Schema):
    """The segments of one picture as GeoJSON has polygons (RFC 7946), but in pixels."""

    type: Literal["FeatureCollection"]
    image: ImageInfo
    model: ModelInfo
    task: Task
    features: list[Feature]


class HuggingFaceMask(Schema):
    """One region as Hugging Face's image-segmentation task has it."""

    label: Annotated[str, Field(description="The category's name, or LABEL_ and the cluster.")]
    score: Annotated[float, Field(ge=0.0, le=1.0)]
    mask: Annotated[str, Field(description="A grey PNG in base64; 255 is the region.")]


class Liveness(Schema):
    """The process answers."""

    status: Literal["alive"]


class Readiness(Schema):
    """Pictures are taken."""

    status: Literal["ready"]
    model: ModelInfo


class Problem(Schema):
    """Any error (RFC 9457)."""

    type: Annotated[str, Field(description="Stable, for programs.", examples=["urn:useg:problem:image-unreadable"])]
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: Annotated[str, Field(description="What was given, what is expected, what to do.")]
    instance: Annotated[str, Field(description="The request, as in X-Request-ID.")]
    retry_after_ms: Annotated[int, Field(ge=1000, description="With 429 and 503: when to come back.")] | None = None


class BatchResult(Schema):
    """What became of one picture."""

    index: Annotated[int, Field(ge=0, description="Its place in the request.")]
    name: Annotated[str | None, Field(description="Its file's name in the form.")]
    status: Annotated[int, Field(ge=200, le=599)]
    answer: SegmentationResponse | MultiTaskResponse | None = None
    problem: Problem | None = None


class BatchResponse(Schema):
    """Several pictures; 200 if all were answered, else 207."""

    model: ModelInfo
    items: list[BatchResult]


class SegmentJsonBody(Schema):
    """Pictures in JSON, as Hugging Face has it."""

    inputs: Annotated[str | list[str], Field(description="A picture in base64, or a list: a batch.")]
    parameters: Annotated[dict[str, Any], Field(default_factory=dict, description="As in the query.")]
