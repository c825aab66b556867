"""What is kept of one labelled picture once an answer was held against it; nothing of the size of a photo."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from jaxtyping import Int

from model.errors import ImageUnreadable, LabelStoreError
from model.pixels import read_photo
from training.progress import show
from training.scores.meetings.answers import Answer, ClusterMap, Detection, Source
from training.scores.meetings.instances import Shape
from training.scores.meetings.matching import Spaces, VoteThresholds, count_pixels, count_stuff_votes, count_thing_votes
from training.scores.meetings.overlap import Overlap, measure_overlap, merge_true_stuff
from training.scores.sets.truth import TrueLabels, TrueObject, Truth, TruthPicture, crop_centre


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One picture."""

    image_id: int
    digest: str
    """The sha256 of its file."""
    size: tuple[int, int]
    """Height, width."""
    panoptic: Overlap | None
    """None where the truth knows only objects."""
    semantic: Overlap | None
    objects: tuple[TrueObject, ...]
    detections: tuple[Detection, ...]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """How often clusters met categories; those of several pictures, sets or processes add up."""

    panoptic: Int[np.ndarray, "N C"]
    """Pixels of the panoptic map."""
    semantic: Int[np.ndarray, "N C"]
    """Pixels of the semantic map."""
    votes: Int[np.ndarray, "N C"]
    """Votes after the paper's rule."""

    def __add__(self, other: "Tables") -> "Tables":
        return Tables(
            panoptic=self.panoptic + other.panoptic,
            semantic=self.semantic + other.semantic,
            votes=self.votes + other.votes,
        )


def list_spaces(source: Source, truth: Truth) -> Spaces:
    """What is to be matched with what."""
    return Spaces(
        thing_clusters=source.thing_clusters,
        stuff_clusters=source.stuff_clusters,
        things=truth.taxonomy.things,
        categories=len(truth.taxonomy.names),
    )


def compare(picture: TruthPicture, truth: Truth, source: Source) -> Comparison:
    """Ask the source about one picture and hold its answer against the truth."""
    photo = read_photo(picture.path)
    digest = hash_photo(picture)
    labels = picture.annotation.read(photo.height, photo.width)
    answer = source.answer(photo.image, digest)
    if answer.panoptic.label_map.shape != (photo.height, photo.width):
        raise LabelStoreError(
            f"the label of {picture.path} has the shape {answer.panoptic.label_map.shape}, "
            f"the photo {photo.height, photo.width}"
        )
    return Comparison(
        image_id=picture.image_id,
        digest=digest,
        size=(photo.height, photo.width),
        panoptic=_overlap(answer.panoptic, labels, truth) if truth.kind == "panoptic" else None,
        semantic=_overlap(answer.semantic, labels, truth),
        objects=labels.objects,
        detections=_choose_detections(answer, truth),
    )


def compare_all(source: Source, truth: Truth, stage: str = "evaluate") -> list[Comparison]:
    """Every picture of the set, in its order: the only pass over the photos. `examine` makes it with many processes."""
    return [compare(each, truth, source) for each in show(truth.pictures, stage, unit="picture")]


def hash_photo(picture: TruthPicture) -> str:
    """The sha256 of the photo's file."""
    try:
        return sha256(picture.path.read_bytes()).hexdigest()
    except OSError as error:
        raise ImageUnreadable(f"{picture.path}: {error.strerror}") from error


def count_tables(comparisons: Sequence[Comparison], spaces: Spaces, thresholds: VoteThresholds) -> Tables:
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
        count_pixels((overlap for each in comparisons if (overlap := getattr(each, name)) is not None), spaces)
        for name in ("panoptic", "semantic")
    )
    return Tables(panoptic=panoptic, semantic=semantic, votes=votes)


def describe_truth(each: Comparison, categories: Int[np.ndarray, "C"]) -> list[dict[str, Any]]:
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


def describe_results(each: Comparison, categories: Int[np.ndarray, "N"], shape: Shape) -> list[dict[str, Any]]:
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


def _overlap(answer: ClusterMap, labels: TrueLabels, truth: Truth) -> Overlap | None:
    if labels.label_map is None:
        return None
    predicted, true = answer.label_map, labels.label_map
    if truth.crop_px is not None:
        predicted, true = crop_centre(predicted, truth.crop_px), crop_centre(true, truth.crop_px)
    measured = measure_overlap(predicted, answer.clusters, true, labels.segments, labels.crowds)
    return merge_true_stuff(measured, truth.taxonomy.things)


def _choose_detections(answer: Answer, truth: Truth) -> tuple[Detection, ...]:
    """None where there is no true object to hold them against."""
    return () if truth.kind == "semantic" else answer.detections
