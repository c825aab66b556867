"""Clusters to categories, from tables of how often they met; tables of several sets or processes add up."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from model.errors import ConfigError
from training.choices import MatchingMethod
from training.evaluation.overlap import OverlapMatrix

UNMATCHED = -1


@dataclass(frozen=True, kw_only=True)
class LabelSpaces:
    """What is matched with what: things only with things, stuff only with stuff, as in CUPS' evaluation.

    Clusters are counted as in a contract, from 1 and things first; categories from 0 and things first.
    """

    thing_clusters: int
    stuff_clusters: int
    things: int
    categories: int

    def make_table(self) -> Int[np.ndarray, "N C"]:
        """A table of nothing; row 0 belongs to no cluster."""
        return np.zeros((self.thing_clusters + self.stuff_clusters + 1, self.categories), np.int64)

    @property
    def blocks(self) -> tuple[tuple[slice, slice], ...]:
        """The rows and columns of things, and those of stuff."""
        things = slice(1, self.thing_clusters + 1), slice(0, self.things)
        return things, (slice(self.thing_clusters + 1, None), slice(self.things, None))


@dataclass(frozen=True, kw_only=True)
class VoteThresholds:
    """When the paper's rule lets a prediction vote; all lie in 0..1. The paper's own for COCO and 800 clusters."""

    score: float = 0.4
    """Detections scored below do not vote."""
    iou: float = 0.6
    """Least box IoU of a detection with a true object, exclusive."""
    stuff_iou: float = 0.15
    """Least IoU of a predicted with a true stuff region, exclusive."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"vote threshold {name} must lie in 0..1, got {value}")


def match(table: Int[np.ndarray, "N C"], spaces: LabelSpaces, method: MatchingMethod) -> Int[np.ndarray, "N"]:
    """The category of each cluster; UNMATCHED for one that met none in the table, or was left over.

    `majority` and `votes`: each cluster takes the category that it met most, many to one. They differ in their tables:
    shared pixels, or the paper's votes. `assignment`: one to one, the linear assignment that shares most; the clusters
    left over have no category. `cups`: that assignment, the rest by majority (CUPS, panoptic_quality.py; unlike there,
    semantic maps keep things and stuff apart, too, and a cluster that met nothing has no category).
    """
    matched = np.full(len(table), UNMATCHED, np.int64)
    for rows, columns in spaces.blocks:
        block = table[rows, columns]
        found = match_block(block, method)
        matched[rows] = np.where(found == UNMATCHED, UNMATCHED, found + (columns.start or 0))
    return matched


def match_block(block: Int[np.ndarray, "N C"], method: MatchingMethod) -> Int[np.ndarray, "N"]:
    """The column of each row, UNMATCHED for a row of zeros or one left over; ties go to the first column."""
    matched = np.full(len(block), UNMATCHED, np.int64)
    if not block.size:
        return matched
    majority = np.where(block.any(1), block.argmax(1), UNMATCHED)
    match method:
        case "majority" | "votes":
            return majority
        case "assignment" | "cups":
            rows, columns = linear_sum_assignment(block, maximize=True)
            matched[rows] = np.where(block[rows, columns] > 0, columns, UNMATCHED)
            return np.where(matched == UNMATCHED, majority, matched) if method == "cups" else matched
        case _:
            assert_never(method)


def count_shared_pixels(overlaps: Iterable[OverlapMatrix], spaces: LabelSpaces) -> Int[np.ndarray, "N C"]:
    """Pixels shared by each cluster and each category; crowds do not count."""
    table = spaces.make_table()
    for overlap in overlaps:
        voters = ~overlap.is_crowd
        shared = overlap.pixels[1:, 1:][:, voters]
        for row, cluster in enumerate(overlap.predicted):
            np.add.at(table[cluster], overlap.true[voters], shared[row])
    return table


def count_stuff_votes(
    overlap: OverlapMatrix, spaces: LabelSpaces, thresholds: VoteThresholds
) -> Int[np.ndarray, "N C"]:
    """One vote for each pair of a stuff cluster and a stuff category whose regions agree in this picture.

    U2Seg, sem_seg_evaluation.py. The overlap has one segment a cluster and one a stuff category.
    """
    table = spaces.make_table()
    shared = overlap.pixels[1:, 1:]
    union = overlap.pixels[1:].sum(1)[:, None] + overlap.pixels[:, 1:].sum(0)[None] - shared
    is_stuff = (overlap.predicted[:, None] > spaces.thing_clusters) & (overlap.true[None] >= spaces.things)
    for row, column in zip(*np.nonzero(is_stuff & (shared > thresholds.stuff_iou * union)), strict=True):
        table[overlap.predicted[row], overlap.true[column]] += 1
    return table


def count_thing_votes(
    clusters: Int[np.ndarray, "P"],
    scores: Float[np.ndarray, "P"],
    boxes: Float[np.ndarray, "P 4"],
    true: Int[np.ndarray, "T"],
    true_boxes: Float[np.ndarray, "T 4"],
    spaces: LabelSpaces,
    thresholds: VoteThresholds,
) -> Int[np.ndarray, "N C"]:
    """One vote for each pair of a detection and a true object whose boxes (x, y, width, height) agree.

    U2Seg, appendix B and coco_evaluation.py: a detection may vote more than once, and groups vote like single objects.
    """
    table = spaces.make_table()
    agrees = (pairwise_xywh_iou(boxes, true_boxes) > thresholds.iou) & (scores >= thresholds.score)[:, None]
    rows, columns = np.nonzero(agrees)
    np.add.at(table, (clusters[rows], true[columns]), 1)
    return table


def pairwise_xywh_iou(first: Float[np.ndarray, "P 4"], second: Float[np.ndarray, "T 4"]) -> Float[np.ndarray, "P T"]:
    """IoU of every pair of boxes given as x, y, width, height."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum((first[:, :2] + first[:, 2:])[:, None], (second[:, :2] + second[:, 2:])[None])
    shared = np.prod(np.maximum(high - low, 0.0), axis=2)
    areas = np.prod(first[:, 2:], axis=1)[:, None] + np.prod(second[:, 2:], axis=1)[None]
    iou: Float[np.ndarray, "P T"] = shared / np.maximum(areas - shared, np.finfo(np.float64).tiny)
    return iou
