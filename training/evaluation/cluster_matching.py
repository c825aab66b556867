"""Matches clusters to categories from co-occurrence counts, also in auxiliary images, which are not evaluated."""

from collections.abc import Sequence
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
    GroundTruthDataset,
    GroundTruthLabels,
    GroundTruthObject,
)
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import ImageResult
from training.evaluation.overlap import OverlapMatrix
from training.evaluation.predictors import PredictedObject, Predictor
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


def match_clusters(
    counts: Int[np.ndarray, "N C"], thing_clusters: int, num_things: int, method: MatchingMethod
) -> Int[np.ndarray, "N"]:
    """Return the category index of each cluster; UNMATCHED if it co-occurs with none, or is left over.

    Things are matched only with things, stuff only with stuff, as in CUPS. Clusters are numbered as in a contract, from
    1 and things first (row 0 is unused); category indices from 0 and things first.
    `neighbors`, `majority`, `votes`: each cluster takes the category with the highest count, many to one; `votes` is
    given other counts. `hungarian`: the one-to-one assignment with the highest sum; other clusters are left over.
    `cups`: that assignment, the others by majority (CUPS, panoptic_quality.py; unlike there, things and stuff are
    separate in semantic maps too, and a cluster that co-occurs with nothing gets no category).
    """
    matched = np.full(len(counts), UNMATCHED, np.int64)
    things = slice(1, thing_clusters + 1), slice(0, num_things)
    stuff = slice(thing_clusters + 1, None), slice(num_things, None)
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
    results: Sequence[ImageResult], predictor: Predictor, dataset: GroundTruthDataset, config: MatchingConfig
) -> tuple[Int[np.ndarray, "N C"], Int[np.ndarray, "N C"]]:
    """Return the counts, by cluster and category index, by which the panoptic and the semantic map are matched.

    They are votes if the method says so or only objects are labeled, else the shared pixels of each map, without
    crowds; in an image without a panoptic label, those of the semantic map serve both.
    """
    taxonomy = dataset.taxonomy
    shape = (predictor.thing_clusters + predictor.stuff_clusters + 1, len(taxonomy.names))
    if config.method == "votes" or dataset.kind in ("masks", "boxes"):
        votes = np.zeros(shape, np.int64)
        for result in results:
            np.add.at(votes, find_thing_votes(result.detections, result.objects, config), 1)
            if result.semantic is not None:
                pairs = find_stuff_votes(result.semantic, predictor.thing_clusters, taxonomy.num_things, config)
                np.add.at(votes, pairs, 1)
        return votes, votes
    panoptic, semantic = np.zeros((2, *shape), np.int64)
    for result in results:
        for table, overlap in ((panoptic, result.panoptic or result.semantic), (semantic, result.semantic)):
            if overlap is not None:
                pairs = overlap.predicted[:, None], overlap.ground_truth[None, ~overlap.is_crowd]
                np.add.at(table, pairs, overlap.pixels[1:, 1:][:, ~overlap.is_crowd])
    return panoptic, semantic


def find_stuff_votes(
    overlap: OverlapMatrix, thing_clusters: int, num_things: int, config: MatchingConfig
) -> tuple[Int[np.ndarray, "V"], Int[np.ndarray, "V"]]:
    """Return cluster and category index of each pair of a stuff cluster and a stuff category whose regions agree.

    U2Seg, sem_seg_evaluation.py. The overlap has one segment per cluster and one per stuff category.
    """
    shared = overlap.pixels[1:, 1:]
    union = overlap.pixels[1:].sum(1)[:, None] + overlap.pixels[:, 1:].sum(0)[None] - shared
    is_stuff = (overlap.predicted[:, None] > thing_clusters) & (overlap.ground_truth[None] >= num_things)
    rows, columns = np.nonzero(is_stuff & (shared > config.min_stuff_iou * union))
    return overlap.predicted[rows], overlap.ground_truth[columns]


def find_thing_votes(
    detections: Sequence[PredictedObject], objects: Sequence[GroundTruthObject], config: MatchingConfig
) -> tuple[Int[np.ndarray, "V"], Int[np.ndarray, "V"]]:
    """Return cluster and category index of each pair of a detection and an object whose boxes agree.

    U2Seg, appendix B and coco_evaluation.py: a detection may vote more than once, and crowds count as single objects.
    """
    voting = [each for each in detections if each.score >= config.min_score]
    boxes = np.array([each.rle.bbox for each in voting], np.float64).reshape(-1, 4)
    object_boxes = np.array([each.bbox for each in objects], np.float64).reshape(-1, 4)
    ious = np.reshape(coco.iou(boxes, object_boxes, np.zeros(len(objects), np.uint8)), (len(voting), len(objects)))
    rows, columns = np.nonzero(ious > config.min_iou)
    clusters = np.array([each.cluster for each in voting], np.int64)
    return clusters[rows], np.array([each.category for each in objects], np.int64)[columns]


@dataclass(frozen=True, kw_only=True)
class AuxiliarySpec:
    """Which labeled images help to match clusters."""

    aux_dataset: Path
    """An auxiliary dataset, file or folder: its images help to match clusters and are not evaluated."""
    aux_format: DatasetFormat | None = None
    """Layout of the auxiliary dataset, as --format."""

    def read(self, dataset: GroundTruthDataset) -> GroundTruthDataset:
        """Return the images in the categories of the evaluated dataset.

        Raises ConfigError if it shares an image or no category with the dataset, or if it has only boxes."""
        auxiliary = DatasetSpec(folder=self.aux_dataset, format=self.aux_format).read()
        translated = translate_dataset(auxiliary, dataset.taxonomy)
        digests = {hash_file(image.path) for image in dataset.images}
        if shared := sum(hash_file(image.path) in digests for image in translated.images):
            raise ConfigError(f"{shared} auxiliary images are images of the dataset itself: remove them")
        return translated


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
