"""Matches clusters to categories from co-occurrence counts, also in auxiliary images, which are not evaluated."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, assert_never

import numpy as np
from cyclopts import Parameter
from jaxtyping import Int
from pycocotools import mask as coco

from model.errors import ConfigError
from model.files import hash_file
from training.evaluation.datasets.dataset_spec import DatasetFormat, DatasetSpec
from training.evaluation.datasets.ground_truth import (
    Annotation,
    AnnotationKind,
    GroundTruthDataset,
    GroundTruthLabels,
    GroundTruthObject,
)
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import ImageResult, evaluate_all
from training.evaluation.overlap import OverlapMatrix
from training.evaluation.predictors import PredictedObject, Predictor, load_predictor
from training.option_types import Fraction

UNMATCHED = -1
MatchingMethod = Literal["neighbors", "majority", "hungarian", "cups", "votes"]
"""See `match_clusters`."""


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """How clusters get their categories. The thresholds of `votes` are U2Seg's for COCO and 800 clusters."""

    method: Annotated[MatchingMethod, Parameter(name="--matching")] = "neighbors"
    """How clusters are matched to categories: each to the category with which it shares most pixels (majority); the
    same, but a segment takes the category of the labeled segments with the most similar embeddings, if the network has
    embeddings (neighbors); one to one (hungarian); one to one, the remaining clusters by majority (cups); by U2Seg's
    votes (votes)."""
    min_score: Annotated[Fraction, Parameter(name="--match-min-score")] = 0.4
    """Votes: minimum score of a detection, 0..1."""
    min_iou: Annotated[Fraction, Parameter(name="--match-min-iou")] = 0.6
    """Votes: box IoU that a detection and an object must exceed, 0..1."""
    min_stuff_iou: Annotated[Fraction, Parameter(name="--match-min-stuff-iou")] = 0.15
    """Votes: IoU that a predicted and a labeled stuff region must exceed, 0..1."""


@dataclass(frozen=True, kw_only=True)
class LabelSpaces:
    """The clusters and categories to match: things only with things, stuff only with stuff, as in CUPS.

    Clusters are numbered as in a contract, from 1 and things first; category indices from 0 and things first.
    """

    thing_clusters: int
    stuff_clusters: int
    num_things: int
    num_categories: int

    def zero_counts(self) -> Int[np.ndarray, "N C"]:
        """Return counts of zero by cluster and category index; row 0 is unused."""
        return np.zeros((self.thing_clusters + self.stuff_clusters + 1, self.num_categories), np.int64)


def label_spaces(predictor: Predictor, dataset: GroundTruthDataset) -> LabelSpaces:
    """Return the clusters of the predictor and the categories of the dataset."""
    return LabelSpaces(
        thing_clusters=predictor.thing_clusters,
        stuff_clusters=predictor.stuff_clusters,
        num_things=dataset.taxonomy.num_things,
        num_categories=len(dataset.taxonomy.names),
    )


def match_clusters(counts: Int[np.ndarray, "N C"], spaces: LabelSpaces, method: MatchingMethod) -> Int[np.ndarray, "N"]:
    """Return the category index of each cluster; UNMATCHED if it co-occurs with none, or is left over.

    `neighbors`, `majority`, `votes`: each cluster takes the category with the highest count, many to one; `votes` is
    given other counts. `hungarian`: the one-to-one assignment with the highest sum; other clusters are left over.
    `cups`: that assignment, the others by majority (CUPS, panoptic_quality.py; unlike there, things and stuff are
    separate in semantic maps too, and a cluster that co-occurs with nothing gets no category).
    """
    matched = np.full(len(counts), UNMATCHED, np.int64)
    first_stuff = spaces.thing_clusters + 1
    things = slice(1, first_stuff), slice(0, spaces.num_things)
    stuff = slice(first_stuff, None), slice(spaces.num_things, None)
    for rows, columns in (things, stuff):
        block = match_block(counts[rows, columns], method)
        matched[rows] = np.where(block == UNMATCHED, UNMATCHED, block + columns.start)
    return matched


def match_block(counts: Int[np.ndarray, "N C"], method: MatchingMethod) -> Int[np.ndarray, "N"]:
    """Return the column of each row; UNMATCHED for rows of zeros or left over; ties go to the first column."""
    matched = np.full(len(counts), UNMATCHED, np.int64)
    if not counts.size:
        return matched
    majority = np.where(counts.any(1), counts.argmax(1), UNMATCHED)
    match method:
        case "neighbors" | "majority" | "votes":
            return majority
        case "hungarian" | "cups":
            from scipy.optimize import linear_sum_assignment  # takes 0.7 s, more than the rest of this package

            rows, columns = linear_sum_assignment(counts, maximize=True)
            matched[rows] = np.where(counts[rows, columns] > 0, columns, UNMATCHED)
            return np.where(matched == UNMATCHED, majority, matched) if method == "cups" else matched
        case _:
            assert_never(method)


def count_cooccurrences(
    results: Sequence[ImageResult], kind: AnnotationKind, spaces: LabelSpaces, config: MatchingConfig
) -> tuple[Int[np.ndarray, "N C"], Int[np.ndarray, "N C"]]:
    """Return the counts, by cluster and category index, by which the panoptic and the semantic map are matched.

    They are votes if the method says so or only objects are labeled, else the shared pixels of each map; where no
    panoptic map is labeled, those of the semantic map serve both.
    """
    if config.method == "votes" or kind in ("masks", "boxes"):
        votes = spaces.zero_counts()
        for result in results:
            votes += count_thing_votes(result.detections, result.objects, spaces, config)
            if result.semantic is not None:
                votes += count_stuff_votes(result.semantic, spaces, config)
        return votes, votes
    semantic = count_shared_pixels([each.semantic for each in results], spaces)
    return count_shared_pixels(
        [each.panoptic for each in results], spaces
    ) if kind == "panoptic" else semantic, semantic


def count_shared_pixels(overlaps: Iterable[OverlapMatrix | None], spaces: LabelSpaces) -> Int[np.ndarray, "N C"]:
    """Count the pixels shared by each cluster and each category, without crowds."""
    counts = spaces.zero_counts()
    for overlap in overlaps:
        if overlap is not None:
            pairs = overlap.predicted[:, None], overlap.ground_truth[None, ~overlap.is_crowd]
            np.add.at(counts, pairs, overlap.pixels[1:, 1:][:, ~overlap.is_crowd])
    return counts


def count_stuff_votes(overlap: OverlapMatrix, spaces: LabelSpaces, config: MatchingConfig) -> Int[np.ndarray, "N C"]:
    """Count one vote for each pair of a stuff cluster and a stuff category whose regions in this image agree.

    U2Seg, sem_seg_evaluation.py. The overlap has one segment per cluster and one per stuff category.
    """
    votes = spaces.zero_counts()
    shared = overlap.pixels[1:, 1:]
    union = overlap.pixels[1:].sum(1)[:, None] + overlap.pixels[:, 1:].sum(0)[None] - shared
    is_stuff = (overlap.predicted[:, None] > spaces.thing_clusters) & (overlap.ground_truth[None] >= spaces.num_things)
    for row, column in zip(*np.nonzero(is_stuff & (shared > config.min_stuff_iou * union)), strict=True):
        votes[overlap.predicted[row], overlap.ground_truth[column]] += 1
    return votes


def count_thing_votes(
    detections: Sequence[PredictedObject],
    objects: Sequence[GroundTruthObject],
    spaces: LabelSpaces,
    config: MatchingConfig,
) -> Int[np.ndarray, "N C"]:
    """Count one vote for each pair of a detection and an object whose boxes agree.

    U2Seg, appendix B and coco_evaluation.py: a detection may vote more than once, and crowds count as single objects.
    """
    votes = spaces.zero_counts()
    voting = [each for each in detections if each.score >= config.min_score]
    if not voting or not objects:
        return votes
    boxes = np.array([each.rle.bbox for each in voting], np.float64)
    object_boxes = np.array([each.bbox for each in objects], np.float64)
    ious = coco.iou(boxes, object_boxes, np.zeros(len(objects), np.uint8))
    for row, column in np.argwhere(ious > config.min_iou):
        votes[voting[row].cluster, objects[column].category] += 1
    return votes


@dataclass(frozen=True, kw_only=True)
class AuxiliaryImages:
    """Auxiliary images, in the categories of the evaluated dataset."""

    dataset: GroundTruthDataset
    pseudo_labels: Predictor | None = None
    """Of these images, in place of a predictor that only knows the evaluated ones."""

    def evaluate(self, predictor: Predictor) -> list[ImageResult]:
        """Evaluate every image. Raises ConfigError if the pseudo-labels have other clusters than the predictor."""
        if self.pseudo_labels and self.pseudo_labels.digest != predictor.digest:
            raise ConfigError("--aux-labels have other clusters: label both datasets with one codebook")
        results = evaluate_all(self.pseudo_labels or predictor, self.dataset)
        # Where only objects are labeled, the semantic map stands for the panoptic map: it has the same things.
        return [replace(each, panoptic=each.panoptic or each.semantic) for each in results]


@dataclass(frozen=True, kw_only=True)
class AuxiliarySpec:
    """Which labeled images help to match clusters."""

    aux_dataset: Path
    """An auxiliary dataset, file or folder: its images help to match clusters and are not evaluated."""
    aux_format: DatasetFormat | None = None
    """Layout of the auxiliary dataset, as --format."""
    aux_labels: Path | None = None
    """Pseudo-labels of the auxiliary images, if PREDICTOR is pseudo-labels."""

    def read(self, dataset: GroundTruthDataset, threads: int) -> AuxiliaryImages:
        """Raises ConfigError if it shares an image or no category with the dataset, or if it has only boxes."""
        translated = translate_dataset(
            DatasetSpec(folder=self.aux_dataset, format=self.aux_format).read(), dataset.taxonomy
        )
        digests = {hash_file(image.path) for image in dataset.images}
        if shared := sum(hash_file(image.path) in digests for image in translated.images):
            raise ConfigError(f"{shared} auxiliary images are images of the dataset itself: remove them")
        labels = load_predictor(self.aux_labels, threads=threads) if self.aux_labels else None
        return AuxiliaryImages(dataset=translated, pseudo_labels=labels)


@dataclass(frozen=True, kw_only=True)
class TranslatedAnnotation(Annotation):
    """A label in the categories of another dataset. Lists of objects become a label map, small objects on top."""

    annotation: Annotation
    categories: dict[int, int]
    """Category index in the other taxonomy by category index in its own; categories that are not listed become void."""

    def read(self, height: int, width: int) -> GroundTruthLabels:
        labels = self.annotation.read(height, width)
        objects = tuple(
            replace(each, category=self.categories[each.category])
            for each in labels.objects
            if each.category in self.categories
        )
        segments = {
            segment: self.categories[index] for segment, index in labels.segments.items() if index in self.categories
        }
        return replace(labels, segments=segments, objects=objects).draw_segments(height, width)


def translate_dataset(dataset: GroundTruthDataset, taxonomy: Taxonomy) -> GroundTruthDataset:
    """Return the dataset in other categories: each becomes the category of its name, or of its supercategory's name.

    Things stay things and stuff stays stuff. Raises ConfigError if no category is shared, or if objects have only
    boxes.
    """
    if dataset.kind == "boxes":
        raise ConfigError(f"{dataset.name} has only boxes: auxiliary images need masks")
    own = dataset.taxonomy
    known = {(name, taxonomy.is_thing(index)): index for index, name in enumerate(taxonomy.names)}
    categories: dict[int, int] = {}
    for index, names in enumerate(zip(own.names, own.groups or own.names, strict=True)):
        found = [known[name, own.is_thing(index)] for name in names if (name, own.is_thing(index)) in known]
        if found:
            categories[index] = found[0]
    if not categories:
        raise ConfigError(f"{dataset.name} and the evaluated dataset have no category in common")
    images = tuple(
        replace(image, annotation=TranslatedAnnotation(annotation=image.annotation, categories=categories))
        for image in dataset.images
    )
    return replace(dataset, taxonomy=taxonomy, images=images)
