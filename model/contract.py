"""What an artifact takes and gives: written by training, checked by whoever loads it."""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from model.errors import ArtifactError, ConfigError, ContractMismatch
from model.files import atomic_write, hash_file
from model.validation import did_you_mean

FORMAT_VERSION = 2
CONTRACT_FILE = "contract.json"
NETWORK_FILE = "network.onnx"
OPENVINO_FILES = ("network.xml", "network.bin")
"""What holds an int8 network; the first is opened, and finds the other beside it."""
GOLDEN_FILE = "golden.npz"

_ACCEPTED: dict[Any, Any] = {float: (int, float), tuple: list, Literal: str}
"""Types that JSON writes otherwise."""

Task = Literal["panoptic", "instance", "semantic"]
TASKS: tuple[Task, ...] = get_args(Task)

FloatPrecision = Literal["fp32", "fp16-stored", "int8-stored", "fp16"]
"""Of weights and arithmetic: fp32 both; fp16 weights that are computed with as fp32; the same, but int8 for those of a
frozen encoder; fp16 both."""
FLOAT_PRECISIONS: tuple[FloatPrecision, ...] = get_args(FloatPrecision)

Precision = Literal[FloatPrecision, "int8"]
"""The same; int8 both is made from another artifact, and OpenVINO alone answers it."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where soft answers become hard ones; every field lies in 0..1."""

    score: float = 0.3
    """Detections scored below are dropped."""
    mask: float = 0.5
    """A pixel belongs to a detection above this probability."""
    overlap: float = 0.5
    """A detection whose mask is covered by better ones beyond this share is dropped from the panoptic map."""
    part: float = 0.0
    """Detections are cut into connected parts, those below this share of the largest dropped; 0 leaves them whole."""
    stuff_area: float = 0.0133
    """Stuff regions below this share of the image become void (the paper's 4,096 px, of a photo of 640x480)."""
    duplicate: float = 1.0
    """A detection whose mask has a larger IoU with a better one's, of whatever cluster, is dropped; 1 keeps all."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"threshold {name} must lie in 0..1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Category:
    """A named class of somebody's data set."""

    id: int
    name: str


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """A size of input that a network takes; a picture lies at its top left."""

    height_px: int
    width_px: int

    @classmethod
    def square(cls, side_px: int) -> "InputSize":
        """The canvas of equal sides."""
        return cls(height_px=side_px, width_px=side_px)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between rising edges, below the first and above the last; a number on an edge counts above it."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ConfigError(f"a histogram of {len(self.edges)} rising edges has one bin more, not {len(self.counts)}")
        if min(self.counts) < 0:
            raise ConfigError(f"a histogram counts from 0 up, got {min(self.counts)}")


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The promise of one artifact.

    Clusters are numbered as in a label store: things 1..thing_clusters, stuff above them.
    """

    name: str
    version: str
    network: str
    input_sizes: tuple[InputSize, ...]
    """The sizes of input that the network takes, their sides multiples of `stride_px`; each batch has one of them."""
    stride_px: int
    """Semantic logits, and masks that lie in the picture, come at this stride of the input."""
    detections: int
    """Detections in every raw output, padded with score 0."""
    thing_clusters: int
    stuff_clusters: int
    """0: the network knows things alone."""
    box_mask_size: int = 0
    """Cells along each side of a mask that lies in its box; 0: masks lie in the picture."""
    precision: Precision = "fp32"
    settings: dict[str, Any] = field(default_factory=dict)
    """What was chosen in the graph and no weight shows; with the weights, it makes the network again."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    categories: dict[int, Category] = field(default_factory=dict)
    """Cluster to category; a cluster that is not in it has no name yet."""
    reference: dict[str, Histogram] = field(default_factory=dict)
    """How answers look in the mean, by the measures of `model.drift`; empty if that was not measured."""
    files: dict[str, str] = field(default_factory=dict)
    """File name to sha256."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where encoder, photos and labels come from, and what was measured; for people, not for code."""

    def __post_init__(self) -> None:
        sides = [side for canvas in self.input_sizes for side in (canvas.height_px, canvas.width_px)]
        if min(self.stride_px, self.detections, self.thing_clusters, *sides) < 1 or not sides:
            raise ContractMismatch("contract: sizes and counts must be positive")
        if min(self.stuff_clusters, self.box_mask_size) < 0:
            raise ContractMismatch("contract: stuff clusters and the side of masks cannot be negative")
        if odd := [side for side in sides if side % self.stride_px]:
            raise ContractMismatch(f"contract: side {odd[0]} is no multiple of the stride {self.stride_px}")
        clusters = self.thing_clusters + self.stuff_clusters
        if strangers := [each for each in self.categories if not 1 <= each <= clusters]:
            raise ContractMismatch(f"contract: names clusters {strangers}, there are 1..{clusters}")
        if self.precision not in PRECISIONS:
            raise ContractMismatch(f"contract: no precision is called {self.precision!r}: {', '.join(PRECISIONS)} are")

    @property
    def network_files(self) -> tuple[str, ...]:
        """What holds the network, that which a session opens before the rest."""
        return OPENVINO_FILES if self.precision == "int8" else (NETWORK_FILE,)

    def is_thing(self, cluster: int) -> bool:
        return 1 <= cluster <= self.thing_clusters

    def write(self, directory: Path) -> None:
        """Write `contract.json`, its keys in the order of the fields, in the place of one that is there."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"
        with atomic_write(directory / CONTRACT_FILE) as sibling:
            sibling.write_text(text, encoding="utf-8")


def read_contract(directory: Path) -> Contract:
    """The contract of an artifact whose files are all there and unchanged.

    Raises ArtifactError for a missing or changed file, ContractMismatch for a contract this version cannot keep.
    """
    path = directory / CONTRACT_FILE
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a readable contract: {error}") from error
    if not isinstance(content, dict):
        raise ContractMismatch(f"{path}: expected a JSON object")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ContractMismatch(
            f"{path}: format version {version}, this release reads {FORMAT_VERSION}: export the run again"
        )
    try:
        contract = _parse(content)
    except (ConfigError, TypeError, ValueError, KeyError) as error:
        raise ContractMismatch(f"{path}: {error}") from error
    for required in (*contract.network_files, GOLDEN_FILE):
        if required not in contract.files:
            raise ContractMismatch(f"{path}: lists no hash for {required}")
    for name, expected in contract.files.items():
        _check_file(directory, name, expected)
    return contract


def _parse(content: dict[str, Any]) -> Contract:
    reject_unknown(content, Contract)
    _reject_mistyped(content, Contract)
    thresholds = content.pop("thresholds", {})
    reject_unknown(thresholds, Thresholds)
    _reject_mistyped(thresholds, Thresholds)
    categories = {int(cluster): Category(**category) for cluster, category in content.pop("categories", {}).items()}
    input_sizes = tuple(_parse_canvas(size) for size in content.pop("input_sizes", ()))
    reference = {name: _parse_histogram(each) for name, each in content.pop("reference", {}).items()}
    return Contract(
        thresholds=Thresholds(**thresholds),
        categories=categories,
        input_sizes=input_sizes,
        reference=reference,
        **content,
    )


def _parse_histogram(content: dict[str, Any]) -> Histogram:
    reject_unknown(content, Histogram)
    _reject_mistyped(content, Histogram)
    return Histogram(edges=tuple(content["edges"]), counts=tuple(content["counts"]))


def _parse_canvas(content: dict[str, Any]) -> InputSize:
    reject_unknown(content, InputSize)
    _reject_mistyped(content, InputSize)
    return InputSize(**content)


def reject_unknown(content: dict[str, Any], target: type) -> None:
    """Raise ConfigError, with a near match, if `content` has a key that the dataclass `target` has not."""
    known = [entry.name for entry in fields(target)]
    for key in content:
        if key not in known:
            hint = did_you_mean(key, known, f"; known are {', '.join(known)}")
            raise ConfigError(f"unknown key {key!r} in {target.__name__}{hint}")


def _reject_mistyped(content: dict[str, Any], target: type) -> None:
    """Raise TypeError if a value is not what the field of the dataclass `target` holds; dataclasses come as objects."""
    for entry in fields(target):
        expected: Any = get_origin(entry.type) or entry.type
        accepted: Any = _ACCEPTED.get(expected, dict if is_dataclass(expected) else expected)
        value = content.get(entry.name)
        if entry.name in content and (not isinstance(value, accepted) or isinstance(value, bool)):
            raise TypeError(f"{entry.name} of {target.__name__} cannot be {value!r}")


def _check_file(directory: Path, name: str, expected: str) -> None:
    if Path(name).name != name:
        raise ArtifactError(f"{directory / CONTRACT_FILE} lists {name!r}: only files beside it may be listed")
    path = directory / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing")
    actual = hash_file(path)
    if actual != expected:
        raise ArtifactError(f"{path} was changed: sha256 {actual:.12}…, the contract says {expected!s:.12}…")
