"""The answers in JSON, documented for OpenAPI.

The service writes them without a detour over these classes; a test holds the two together.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from model.contract import Task


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageInfo(_Schema):
    """The picture as it was read."""

    width: Annotated[int, Field(ge=1, description="Pixels, upright.")]
    height: Annotated[int, Field(ge=1, description="Pixels, upright.")]
    frames: Annotated[int, Field(ge=1, description="Frames in the file.")]
    frame_used: Annotated[int, Field(ge=0, description="The frame that was segmented, from 0.")]
    orientation_applied: Annotated[bool, Field(description="Whether EXIF asked for a turn, which was made.")]
    notes: Annotated[list[str], Field(description="What was left out.")]


class ModelInfo(_Schema):
    """The artifact that answered."""

    name: str
    version: str


class RunLengths(_Schema):
    """A mask in COCO's compressed run lengths, column-major, in the upright picture's size."""

    size: Annotated[tuple[int, int], Field(description="Height, width.")]
    counts: str


class SegmentInfo(_Schema):
    """One region."""

    id: Annotated[int, Field(ge=1, description="Its value in the PNG answer: R + 256 G + 65536 B.")]
    cluster: Annotated[int, Field(ge=1, description="The network's own class.")]
    category_id: Annotated[int | None, Field(description="The cluster's category; null if it has none.")]
    category: Annotated[str | None, Field(description="The category's name; null if it has none.")]
    isthing: Annotated[bool, Field(description="A countable object, or else stuff.")]
    score: Annotated[float, Field(ge=0.0, le=1.0)]
    area: Annotated[int, Field(ge=1, description="Pixels.")]
    bbox: Annotated[tuple[int, int, int, int], Field(description="x, y, width, height in pixels.")]
    segmentation: RunLengths


class SegmentationAnswer(_Schema):
    """The segments of one picture. Those of the tasks panoptic and semantic do not overlap, instances may."""

    image: ImageInfo
    model: ModelInfo
    task: Task
    segments_info: list[SegmentInfo]


class Liveness(_Schema):
    """The process answers."""

    status: Annotated[str, Field(examples=["alive"])]


class Readiness(_Schema):
    """Pictures are taken."""

    status: Annotated[str, Field(examples=["ready"])]
    model: ModelInfo


class Problem(_Schema):
    """Any error (RFC 9457)."""

    type: Annotated[str, Field(description="Stable, for programs.", examples=["urn:useg:problem:image-unreadable"])]
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: Annotated[str, Field(description="What was given, what is expected, what to do.")]
    instance: Annotated[str, Field(description="The request, as in X-Request-ID.")]
    retry_after_ms: Annotated[int, Field(ge=1000, description="With 503: when to come back.")] | None = None
