"""What is kept of one labelled picture once an answer was held against it; nothing of the size of a photo."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Int

from model.errors import InvalidImage, LabelStoreError
from model.files import atomic_write
from model.formats.rle import Rle
from model.images import read_image
from training.evaluation.datasets.ground_truth import (
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    GroundTruthObject,
    crop_center,
)
from training.evaluation.matching.cluster_matching import (
    LabelSpaces,
    VoteThresholds,
    count_shared_pixels,
    count_stuff_votes,
    count_thing_votes,
)
from training.evaluation.metrics.average_precision import IouType
from training.evaluation.overlap import OverlapMatrix, compute_overlap, merge_ground_truth_stuff
from training.evaluation.predictors import ClusterMap, ImagePrediction, PredictedObject, Predictor
from training.progress import track


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """One picture."""

    image_id: int
    digest: str
    """The sha256 of its file."""
    size: tuple[int, int]
    """Height, width."""
    panoptic: OverlapMatrix | None
    """None where the truth knows only objects."""
    semantic: OverlapMatrix | None
    objects: tuple[GroundTruthObject, ...]
    detections: tuple[PredictedObject, ...]


@dataclass(frozen=True, kw_only=True)
class CooccurrenceCounts:
    """How often clusters met categories; those of several pictures, sets or processes add up."""

    panoptic: Int[np.ndarray, "N C"]
    """Pixels of the panoptic map."""
    semantic: Int[np.ndarray, "N C"]
    """Pixels of the semantic map."""
    votes: Int[np.ndarray, "N C"]
    """Votes after the paper's rule."""

    def __add__(self, other: "CooccurrenceCounts") -> "CooccurrenceCounts":
        return CooccurrenceCounts(
            panoptic=self.panoptic + other.panoptic,
            semantic=self.semantic + other.semantic,
            votes=self.votes + other.votes,
        )


def label_spaces(source: Predictor, truth: GroundTruthDataset) -> LabelSpaces:
    """What is to be matched with what."""
    return LabelSpaces(
        thing_clusters=source.thing_clusters,
        stuff_clusters=source.stuff_clusters,
        things=truth.taxonomy.things,
        categories=len(truth.taxonomy.names),
    )


def evaluate_image(picture: GroundTruthImage, truth: GroundTruthDataset, source: Predictor) -> ImageResult:
    """Ask the source about one picture and hold its answer against the truth."""
    photo = read_image(picture.path)
    digest = hash_photo(picture)
    labels = picture.annotation.read(photo.height, photo.width)
    answer = source.answer(photo.image, digest)
    if answer.panoptic.label_map.shape != (photo.height, photo.width):
        raise LabelStoreError(
            f"the label of {picture.path} has the shape {answer.panoptic.label_map.shape}, "
            f"the photo {photo.height, photo.width}"
        )
    return ImageResult(
        image_id=picture.image_id,
        digest=digest,
        size=(photo.height, photo.width),
        panoptic=_overlap(answer.panoptic, labels, truth) if truth.kind == "panoptic" else None,
        semantic=_overlap(answer.semantic, labels, truth),
        objects=labels.objects,
        detections=_choose_detections(answer, truth),
    )


def evaluate_all(source: Predictor, truth: GroundTruthDataset, stage: str = "evaluate") -> list[ImageResult]:
    """Every picture of the set, in its order: the only pass over the photos. `examine` makes it with many processes."""
    return [evaluate_image(each, truth, source) for each in track(truth.images, stage, unit="picture")]


def hash_photo(picture: GroundTruthImage) -> str:
    """The sha256 of the photo's file."""
    try:
        return sha256(picture.path.read_bytes()).hexdigest()
    except OSError as error:
        raise InvalidImage(f"{picture.path}: {error.strerror}") from error


def count_cooccurrences(
    comparisons: Sequence[ImageResult], spaces: LabelSpaces, thresholds: VoteThresholds
) -> CooccurrenceCounts:
    """All meetings in these pictures."""
    votes = spaces.make_table()
    for each in comparisons:
        if each.semantic is not None:
            votes += count_stuff_votes(each.semantic, spaces, thresholds)
        if each.objects and each.detections:
            votes += count_thing_votes(
                np.array([found.cluster for found in each.detections]),
                np.array([found.score for found in each.detections]),
                np.array([found.outline.bbox for found in each.detections], np.float64),
                np.array([true.category for true in each.objects]),
                np.array([true.bbox for true in each.objects], np.float64),
                spaces,
                thresholds,
            )
    panoptic, semantic = (
        count_shared_pixels((overlap for each in comparisons if (overlap := getattr(each, name)) is not None), spaces)
        for name in ("panoptic", "semantic")
    )
    return CooccurrenceCounts(panoptic=panoptic, semantic=semantic, votes=votes)


def to_coco_annotations(each: ImageResult, categories: Int[np.ndarray, "C"]) -> list[dict[str, Any]]:
    """One picture's true objects in COCO's words, their categories looked up in `categories`."""
    return [
        {
            "image_id": each.image_id,
            "category_id": int(categories[true.category]),
            "area": true.area,
            "bbox": list(true.bbox),
            "iscrowd": int(true.is_crowd),
            **({"segmentation": true.rle} if true.rle else {}),
        }
        for true in each.objects
    ]


def to_coco_results(each: ImageResult, categories: Int[np.ndarray, "N"], shape: IouType) -> list[dict[str, Any]]:
    """One picture's detections in COCO's words, clusters looked up in `categories`; those with none are left out.

    The area is the box's where boxes are compared and the mask's where masks are, as pycocotools has it.
    """
    return [
        {
            "image_id": each.image_id,
            "category_id": int(categories[found.cluster]),
            "score": found.score,
            "bbox": list(found.outline.bbox),
            "area": found.outline.area if shape == "segm" else found.outline.bbox[2] * found.outline.bbox[3],
            "segmentation": {"size": list(found.outline.size), "counts": found.outline.counts},
        }
        for found in each.detections
        if categories[found.cluster] >= 0
    ]


def _overlap(answer: ClusterMap, labels: GroundTruthLabels, truth: GroundTruthDataset) -> OverlapMatrix | None:
    if labels.label_map is None:
        return None
    predicted, true = answer.label_map, labels.label_map
    if truth.crop_px is not None:
        predicted, true = crop_center(predicted, truth.crop_px), crop_center(true, truth.crop_px)
    measured = compute_overlap(predicted, answer.clusters, true, labels.segments, labels.crowds)
    return merge_ground_truth_stuff(measured, truth.taxonomy.things)


def _choose_detections(answer: ImagePrediction, truth: GroundTruthDataset) -> tuple[PredictedObject, ...]:
    """None where there is no true object to hold them against."""
    return () if truth.kind == "semantic" else answer.detections


IMAGES_PER_FILE = 16
"""Pictures a file: what a killed run may lose is some seconds of work."""


def write_image_results(path: Path, comparisons: Sequence[ImageResult]) -> None:
    """As JSON, numbers to their last digit."""
    with atomic_write(path) as sibling:
        sibling.write_text(json.dumps([_describe(each) for each in comparisons]), encoding="ascii")


def read_image_results(path: Path) -> tuple[ImageResult, ...]:
    """Raises LabelStoreError if the file is missing or is not what was written."""
    try:
        return tuple(_parse(each) for each in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabelStoreError(f"{path} holds no comparisons ({error}): delete it and rerun") from error


@dataclass(frozen=True, kw_only=True)
class StoredImageResults(Sequence[ImageResult]):
    """Comparisons in files of GROUP each, the last of fewer; no more than one file's are in memory at a time."""

    files: Sequence[Path]
    places: range
    _held: dict[Path, tuple[ImageResult, ...]] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[ImageResult]:
        return (self._read(place) for place in self.places)

    @overload
    def __getitem__(self, index: int) -> ImageResult: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredImageResults": ...
    def __getitem__(self, index: int | slice) -> "ImageResult | StoredImageResults":
        if isinstance(index, slice):
            return StoredImageResults(files=self.files, places=self.places[index])
        return self._read(self.places[index])

    def _read(self, place: int) -> ImageResult:
        path = self.files[place // IMAGES_PER_FILE]
        if path not in self._held:
            self._held.clear()
            self._held[path] = read_image_results(path)
        return self._held[path][place % IMAGES_PER_FILE]


def _describe(comparison: ImageResult) -> dict[str, Any]:
    return {
        **vars(comparison),
        **{name: _describe_overlap(getattr(comparison, name)) for name in ("panoptic", "semantic")},
        "objects": [{**vars(each), "rle": _describe_rle(each.rle)} for each in comparison.objects],
        "detections": [asdict(each) for each in comparison.detections],
    }


def _parse(content: dict[str, Any]) -> ImageResult:
    overlaps = {name: _parse_overlap(content[name]) for name in ("panoptic", "semantic")}
    objects = tuple(GroundTruthObject(**{**each, "bbox": tuple(each["bbox"])}) for each in content["objects"])
    detections = tuple(
        PredictedObject(**{**each, "outline": _parse_outline(each["outline"])}) for each in content["detections"]
    )
    known = {"size": tuple(content["size"]), **overlaps, "objects": objects, "detections": detections}
    return ImageResult(**{**content, **known})


def _describe_overlap(overlap: OverlapMatrix | None) -> dict[str, Any] | None:
    return None if overlap is None else {name: array.tolist() for name, array in vars(overlap).items()}


def _parse_overlap(content: dict[str, Any] | None) -> OverlapMatrix | None:
    if content is None:
        return None
    counts = {name: np.array(content[name], np.int64) for name in ("pixels", "predicted", "true")}
    return OverlapMatrix(**counts, is_crowd=np.array(content["is_crowd"], bool))


def _describe_rle(rle: dict[str, Any] | None) -> dict[str, Any] | None:
    """pycocotools writes text as bytes, and reads either."""
    counts = rle and rle["counts"]
    return rle and {**rle, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _parse_outline(content: dict[str, Any]) -> Rle:
    return Rle(**{**content, "size": tuple(content["size"]), "bbox": tuple(content["bbox"])})
