"""The contract of an artifact: what its network takes and returns, its thresholds, and the hashes of its files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import Field, NonNegativeInt, PositiveInt

from model.embeddings import Category, CategoryExamples
from model.errors import ArtifactError, ConfigError, ContractMismatch
from model.files import hash_file, replace_file
from model.validation import parse_versioned_json, to_versioned_json

FORMAT_VERSION = 4
CONTRACT_FILE = "contract.json"
NETWORK_FILE = "network.onnx"
INT8_FILES = ("int8.xml", "int8.bin")
"""The network in int8 arithmetic, if there is one; OpenVINO loads the first file, which refers to the second."""
GOLDEN_FILE = "golden.npz"
"""Inputs and their reference outputs."""
INT8_GOLDEN_FILE = "golden-int8.npz"
"""The same inputs and the outputs in int8."""

Task = Literal["panoptic", "instance", "semantic"]
TASKS: tuple[Task, ...] = get_args(Task)

SegmentFormat = Literal["coco-panoptic", "coco-instances", "coco-polygons", "png", "overlay", "geojson"]
"""Files that `useg segment` writes."""

Precision = Literal["fp32", "fp16-stored", "int8-stored", "fp16"]
"""fp32, fp16: precision of weights and arithmetic. fp16-stored: weights in fp16, arithmetic in fp32. int8-stored: the
same, and the weights of a frozen encoder in int8."""

Detail = Literal["low", "standard", "high"]
"""low: smaller input sizes. high: also windows at a larger scale (`model.postprocessing.windows`)."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds of post-processing, each in 0..1."""

    score_threshold: float = 0.3
    """Detections with a lower score are dropped."""
    mask_threshold: float = 0.5
    """A pixel belongs to a detection if its mask probability is higher."""
    overlap_threshold: float = 0.5
    """A detection is left out of the panoptic map if a larger fraction of its mask is covered by better ones."""
    min_component_area_fraction: float = 0.0
    """A mask is split into connected components; those smaller than this fraction of the largest are dropped. 0: masks
    stay whole."""
    min_stuff_area_fraction: float = 0.0133
    """Stuff regions smaller than this fraction of the image become void (the paper's 4,096 px of 640x480)."""
    duplicate_iou_threshold: float = 1.0
    """A detection is dropped if its mask has a higher IoU with a better one of any cluster. 1: none is dropped."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {value}")


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """An input size of a network; images are placed at the top left and padded."""

    height_px: PositiveInt
    width_px: PositiveInt

    @classmethod
    def square(cls, side_px: int) -> "InputSize":
        """Return the input size with equal sides."""
        return cls(height_px=side_px, width_px=side_px)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values between increasing edges, below the first and above the last; a value on an edge is above it."""

    edges: tuple[float, ...]
    counts: tuple[NonNegativeInt, ...]

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ConfigError(
                f"a histogram with {len(self.edges)} increasing edges has one more bin, not {self.counts}"
            )


@dataclass(frozen=True, kw_only=True)
class Int8Accuracy:
    """Agreement of the panoptic segmentations of the network in int8 with its own in fp32, on unlabeled photos."""

    photos: int
    clusters_equal: float
    """Fraction of pixels of the same cluster, or void in both."""
    panoptic_quality: float
    """PQ over the segments of all photos, 0..1; 0 if there are none."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What an artifact contains and promises.

    Cluster ids are those of the pseudo-labels: things are 1..thing_clusters, stuff follows.
    """

    name: str
    version: str
    network: str
    input_sizes: Annotated[tuple[InputSize, ...], Field(min_length=1)]
    """Input sizes, their sides multiples of `stride_px`; all images of a batch have the same one."""
    stride_px: PositiveInt
    """Stride of the semantic logits, and of masks that cover the image, in input pixels."""
    max_detections: PositiveInt
    """Detections in every raw output, padded with score 0."""
    thing_clusters: PositiveInt
    stuff_clusters: NonNegativeInt
    """0: the network predicts things only."""
    embedding_dim: int = 0
    """Size of the embedding of each patch; 0: the network has none."""
    embedding_stride_px: int = 14
    """Side of a patch, in input pixels."""
    box_mask_size: NonNegativeInt = 0
    """Side of a square mask inside its box, in cells; 0: masks cover the image."""
    precision: Precision = "fp32"
    low_input_sizes: tuple[InputSize, ...] = ()
    """Input sizes of detail "low"; empty: there is no such detail."""
    int8: Int8Accuracy | None = None
    """Measured loss of the network in int8 (`INT8_FILES`); None: there is none."""
    network_config: dict[str, Any] = field(default_factory=dict)
    """Configuration of the network; with the weights, it restores the network in torch."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    categories: dict[int, Category] = field(default_factory=dict)
    """Names that the artifact ships with, by cluster id; `model.registry.category_names` keeps later changes."""
    examples: CategoryExamples | None = None
    """Embeddings of labeled segments: a segment takes the category of the most similar ones."""
    drift_reference: dict[str, Histogram] = field(default_factory=dict)
    """Expected output statistics (see `model.drift`); empty if not measured."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 by file name."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Origin of encoder, photos and labels, and measurements; for people only."""

    def __post_init__(self) -> None:
        sides = [side for size in self.all_input_sizes for side in (size.height_px, size.width_px)]
        if misfits := [side for side in sides if side % self.stride_px]:
            raise ContractMismatch(f"contract: side {misfits[0]} is not a multiple of the stride {self.stride_px}")
        clusters = self.thing_clusters + self.stuff_clusters
        if unknown := [cluster for cluster in self.categories if not 1 <= cluster <= clusters]:
            raise ContractMismatch(f"contract: names clusters {unknown}, there are 1..{clusters}")
        if self.examples and self.examples.embedding_dim != self.embedding_dim:
            raise ContractMismatch(
                f"contract: the examples have {self.examples.embedding_dim} values, embeddings {self.embedding_dim}"
            )

    @property
    def all_input_sizes(self) -> tuple[InputSize, ...]:
        """The input sizes of every detail, standard first."""
        return (*self.input_sizes, *self.low_input_sizes)

    def is_thing(self, cluster: int) -> bool:
        return 1 <= cluster <= self.thing_clusters

    def write(self, directory: Path) -> None:
        """Write or replace `contract.json`."""
        replace_file(directory / CONTRACT_FILE, to_versioned_json(self, FORMAT_VERSION))


Shape = Sequence[int | None]
"""Lengths of the axes after the batch axis; None allows any length."""


@dataclass(frozen=True, kw_only=True)
class RawOutputs:
    """Raw outputs for one image, with static shapes; detections are unordered."""

    scores: Float32[np.ndarray, "D"]
    clusters: Int64[np.ndarray, "D"]
    """Thing clusters, counted from 0."""
    boxes: Float32[np.ndarray, "D 4"]
    """x0, y0, x1, y1 in input pixels."""
    masks: Float32[np.ndarray, "D h w"]
    """Probabilities: over the image at the contract's stride, or inside each box (`Contract.box_mask_size`)."""
    semantic: Float32[np.ndarray, "S+1 h w"]
    """Logits; channel 0 is "things", channel s is stuff cluster s."""
    embeddings: Float32[np.ndarray, "E rows columns"] | None = None
    """Unit vectors of the patches of the input, by which segments get categories; None if the network has none."""


_OUTPUT_NAMES = tuple(entry.name for entry in fields(RawOutputs))


def output_names(embedding_dim: int) -> tuple[str, ...]:
    """Return the names of the outputs of a network, in order."""
    return _OUTPUT_NAMES if embedding_dim else _OUTPUT_NAMES[:-1]


def check_shapes(actual: Mapping[str, Shape], contract: Contract) -> None:
    """Raise ContractMismatch if inputs and outputs of a graph, by name, differ from the contract."""
    given, expected = ({name: list(shape) for name, shape in each.items()} for each in (actual, io_shapes(contract)))
    if given != expected:
        raise ContractMismatch(f"the network has {given}, its contract says {expected}")


def io_shapes(contract: Contract) -> dict[str, Shape]:
    """Return the shapes of all inputs and outputs; with several input sizes, image axes are None."""
    height = width = rows = columns = patch_rows = patch_columns = None
    if len(contract.all_input_sizes) == 1:
        height, width = contract.input_sizes[0].height_px, contract.input_sizes[0].width_px
        rows, columns = height // contract.stride_px, width // contract.stride_px
        patch_rows, patch_columns = (side // contract.embedding_stride_px for side in (height, width))
    side = contract.box_mask_size
    shapes: dict[str, Shape] = {
        "pixels": [3, height, width],
        "sizes": [2],
        "scores": [contract.max_detections],
        "clusters": [contract.max_detections],
        "boxes": [contract.max_detections, 4],
        "masks": [contract.max_detections, *((side, side) if side else (rows, columns))],
        "semantic": [contract.stuff_clusters + 1, rows, columns],
    }
    if contract.embedding_dim:
        shapes["embeddings"] = [contract.embedding_dim, patch_rows, patch_columns]
    return shapes


def find_bundled_artifact() -> Path:
    """Return the directory of the artifact that comes with the `model` package."""
    return Path(str(files("model"))) / "default"


def read_contract(directory: Path) -> Contract:
    """Read the contract of an artifact, and check that its files are present and unchanged.

    Raises ArtifactError for a missing or changed file, ContractMismatch for an invalid contract.
    """
    path = directory / CONTRACT_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    try:
        contract = parse_versioned_json(Contract, content, FORMAT_VERSION, ": export the run again")
    except ConfigError as error:
        raise ContractMismatch(f"{path}: {error}") from error
    for required in (NETWORK_FILE, GOLDEN_FILE, *((*INT8_FILES, INT8_GOLDEN_FILE) if contract.int8 else ())):
        if required not in contract.files:
            raise ContractMismatch(f"{path}: no hash for {required}")
    for name, expected in contract.files.items():
        _check_file(directory, name, expected)
    return contract


def _check_file(directory: Path, name: str, expected: str) -> None:
    if Path(name).name != name:
        raise ArtifactError(f"{directory / CONTRACT_FILE} lists {name!r}: only files in the same folder may be listed")
    path = directory / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing")
    actual = hash_file(path)
    if actual != expected:
        raise ArtifactError(f"{path} was changed: sha256 {actual:.12}…, the contract says {expected:.12}…")
