"""JSON responses, documented for OpenAPI.

The responses to segmentations are written by `service.inference.pipeline` without these classes, which is faster; a
test compares the two.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.contract import Task
from model.registry.versions import DeploymentEvent
from service.metrics import VersionRole


class Schema(BaseModel):
    """Base of the documented responses; the docstrings of fields are their descriptions."""

    # Schemas are built when the documentation is requested, which shortens the start; FastAPI needs those of bodies.
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, defer_build=True)


class ImageInfo(Schema):
    """The image as it was decoded."""

    width: Annotated[int, Field(ge=1, examples=[640])]
    """Width of the result in pixels, after EXIF rotation."""
    height: Annotated[int, Field(ge=1, examples=[480])]
    """Height of the result in pixels, after EXIF rotation."""
    original_width: Annotated[int, Field(ge=1, examples=[640])]
    """Width of the file in pixels, after EXIF rotation; differs from `width` if `longest_edge` scaled it down."""
    original_height: Annotated[int, Field(ge=1, examples=[480])]
    """Height of the file in pixels, after EXIF rotation."""
    num_frames: Annotated[int, Field(ge=1, examples=[1])]
    """Number of frames in the file."""
    frame_index: Annotated[int, Field(ge=0, examples=[0])]
    """Index of the segmented frame."""
    exif_transposed: bool
    """Whether the image was rotated or flipped according to its EXIF orientation."""
    warnings: list[str]
    """What was ignored in the image."""


class ModelInfo(Schema):
    """The model that produced a result."""

    name: Annotated[str, Field(examples=["useg-vits14"])]
    version: Annotated[str, Field(examples=["1"])]


class CocoRle(Schema):
    """A mask as COCO's compressed run-length encoding, column-major, in the size of the result."""

    size: tuple[int, int]
    """Height and width."""
    counts: str


class SegmentInfo(Schema):
    """A segment."""

    id: Annotated[int, Field(ge=1)]
    """Value of its pixels in the PNG: R + 256 G + 65536 B."""
    cluster_id: Annotated[int, Field(ge=1, examples=[7])]
    """Class of the network; of several clusters of one category, the one with the most pixels."""
    cluster_ids: Annotated[list[int], Field(min_length=1, examples=[[7]])]
    """All clusters of the segment: more than one if `merge_clusters` merged them, the largest first."""
    category_id: Annotated[int | None, Field(examples=[18])]
    """Id of the cluster's category; null if it has no name."""
    category_name: Annotated[str | None, Field(examples=["dog"])]
    """Name of the cluster's category; null if it has none."""
    isthing: Literal[0, 1]
    """1 for a countable object, 0 for stuff, as in COCO."""
    score: Annotated[float, Field(ge=0.0, le=1.0, examples=[0.91])]
    area: Annotated[int, Field(ge=1, examples=[1200])]
    """Number of pixels."""
    bbox: tuple[int, int, int, int]
    """x, y, width and height in pixels."""
    segmentation: CocoRle


class TaskResult(Schema):
    """The segments of one task. Panoptic and semantic segments do not overlap, instances may."""

    task: Task
    segments_info: list[SegmentInfo]


class SegmentationResponse(TaskResult):
    """The result for one image and one task."""

    image: ImageInfo
    model: ModelInfo


class MultiTaskResponse(Schema):
    """The results for one image and several tasks, in the order of the request."""

    image: ImageInfo
    model: ModelInfo
    results: list[TaskResult]


class Liveness(Schema):
    """The process responds."""

    status: Literal["alive"]


class Readiness(Schema):
    """Images are accepted."""

    status: Literal["ready"]
    model: ModelInfo


class Problem(Schema):
    """An error (RFC 9457)."""

    type: Annotated[str, Field(examples=["urn:useg:problem:invalid-image"])]
    """Stable identifier of the kind of error."""
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    """What was received, what was expected, and what to do."""
    instance: Annotated[str, Field(examples=["urn:useg:request:2f1c3f0e-6a0c-4a52-9f43-6a3f2a1d7c55"])]
    """The request, with the id of `X-Request-ID`."""
    retry_after_ms: Annotated[int | None, Field(ge=1000)] = None
    """With status 429 and 503: when to try again."""


class BatchResult(Schema):
    """The result for one image of a batch."""

    index: Annotated[int, Field(ge=0)]
    """Index of the image in the request."""
    name: str | None
    """Name of its file in the form."""
    status: Annotated[int, Field(ge=200, le=599)]
    result: SegmentationResponse | MultiTaskResponse | None = None
    error: Problem | None = None


class BatchResponse(Schema):
    """The results for several images; status 200 if all succeeded, else 207."""

    model: ModelInfo
    results: list[BatchResult]


class VersionStatus(Schema):
    """One version of a model."""

    version: str
    state: VersionRole
    """State in this process. `standby`: previously active and still loaded, for a rollback; `failed`: rejected by a
    check or rolled back; `unloaded`: not in use; `missing_from_registry`: still serving, but no longer in the registry;
    it will not survive a restart."""
    traffic_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of the traffic of a canary or a shadow."""
    reason: str | None = None
    """Why it failed."""
    backend: str | None = None
    """What runs its network, if it is loaded."""
    skipped_backends: dict[str, str] = Field(default_factory=dict)
    """Why faster backends are not in use, if the backend was chosen automatically."""


class ModelStatus(Schema):
    """One model; without a registry it has one version and no history."""

    name: str
    active: str | None
    """Version that is active in the registry."""
    serving_version: str | None
    """Version that handles requests in this process."""
    revision: int | None
    """Number of changes of the registry's state."""
    versions: list[VersionStatus]


class ModelHistory(ModelStatus):
    """One model and the changes that led to its state."""

    previous_versions: list[str]
    """Previously active versions, the latest last; `rollback` returns to it."""
    history: list[DeploymentEvent]
    """The latest changes, oldest first."""


class ModelList(Schema):
    """All served models."""

    models: list[ModelStatus]
