"""COCO's average precision and recall, with boxes or masks, for one class or for many."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IouType = Literal["bbox", "segm"]
_Matches = dict[str, np.ndarray] | None
"""pycocotools' words for the detections of a category in a picture; None where there is nothing of it."""
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium",
         "ar_large")  # fmt: skip
"""pycocotools' twelve figures, in its order."""
HEADLINE_METRICS = ("ap", "ap50", "ap75", "ar100")
"""Those with an interval."""
_DETECTIONS = 100
_ELEMENTS = 4_000_000
"""Of one array of a bootstrap: 32 MB."""


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """All detections of one category, best first, as far as a bootstrap needs them."""

    images: Int[np.ndarray, "D"]
    """Place of each detection's picture."""
    hits: tuple[Int[np.ndarray, "H"], ...]
    """At each IoU threshold the ranks of the detections that found an object."""
    ignored: tuple[Int[np.ndarray, "I"], ...]
    """And the ranks of those that count neither way: they lie on a group."""


@dataclass(frozen=True, kw_only=True)
class CocoBatch:
    """Some pictures' objects and detections: annotations without ids in COCO's words, with an area."""

    truth: Sequence[dict[str, Any]]
    results: Sequence[dict[str, Any]]
    sizes: dict[int, tuple[int, int]]
    """Height, width by image id."""


class CocoEvaluator:
    """Detections held against true objects, by pycocotools."""

    def __init__(self, batches: Iterable[CocoBatch], categories: Sequence[int], shape: IouType) -> None:
        """All pictures in the order of their ids, some at a time: no more than a batch's masks are ever in memory."""
        self._evaluation = COCOeval(iouType=shape)
        self._parameters = self._evaluation.params
        self._parameters.catIds = sorted(categories)
        areas = len(self._parameters.areaRng)
        matched: list[list[_Matches]] = [[] for _ in range(len(categories) * areas)]
        images: list[int] = []
        for each in batches:
            found = _match(each, self._parameters.catIds, shape)
            count = len(each.sizes)
            for place, gathered in enumerate(matched):
                gathered += found[place * count : (place + 1) * count]
            images += sorted(each.sizes)
        # What `evaluate` would have left of all pictures at once.
        self._parameters.imgIds = images
        self._evaluation.evalImgs = [each for gathered in matched for each in gathered]
        self._evaluation._paramsEval = self._parameters
        self._categories = matched[::areas]

    def summarise(self) -> dict[str, float | None]:
        """The twelve figures in 0..1, computed by pycocotools; None where there is no object to find."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._evaluation.accumulate()
            self._evaluation.summarize()
        return {
            name: None if value < 0 else float(value) for name, value in zip(STATS, self._evaluation.stats, strict=True)
        }

    def list_categories(self) -> dict[int, float]:
        """AP of each category that has an object to find, in 0..1; after `summarise`."""
        precision = self._evaluation.eval["precision"][:, :, :, 0, -1]
        means = {number: precision[:, :, place] for place, number in enumerate(self._parameters.catIds)}
        return {number: float(each.mean()) for number, each in means.items() if (each > -1).all()}

    def measure(self, weights: Float[np.ndarray, "D N"]) -> dict[str, Float[np.ndarray, "D"]]:
        """AP, AP50, AP75 and AR100 where pictures, in the order of their ids, count so often; undefined is 0."""
        thresholds = len(self._parameters.iouThrs)
        precision, recall = (np.zeros((thresholds, len(weights))) for _ in range(2))
        counted = np.zeros(len(weights))
        for results in self._categories:
            objects = weights @ np.array([(~each["gtIgnore"].astype(bool)).sum() if each else 0 for each in results])
            counted += objects > 0
            if ranking := _rank(results):
                size = max(1, _ELEMENTS // len(ranking.images))
                for rows in (slice(first, first + size) for first in range(0, len(weights), size)):
                    pieces = _average(ranking, objects[rows], weights[rows], self._parameters.recThrs)
                    precision[:, rows] += pieces[0]
                    recall[:, rows] += pieces[1]
        floor = np.maximum(counted, 1)
        at = {round(float(each), 2): place for place, each in enumerate(self._parameters.iouThrs)}
        return {
            "ap": precision.mean(0) / floor,
            "ap50": precision[at[0.5]] / floor,
            "ap75": precision[at[0.75]] / floor,
            "ar100": recall.mean(0) / floor,
        }


def _match(pictures: CocoBatch, categories: list[int], shape: IouType) -> list[_Matches]:
    """What pycocotools found, for each category, each range of areas and each picture; the part that figures need."""
    images = [{"id": each, "height": height, "width": width} for each, (height, width) in pictures.sizes.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        known, found = (_index(images, entries, categories) for entries in (pictures.truth, pictures.results))
        evaluation = COCOeval(known, found, shape)
        evaluation.evaluate()
    return [
        each
        and {
            "dtScores": np.array(each["dtScores"]),
            "dtMatches": each["dtMatches"].astype(bool),
            "dtIgnore": each["dtIgnore"].astype(bool),
            "gtIgnore": each["gtIgnore"].astype(bool),
        }
        for each in evaluation.evalImgs
    ]


def _rank(results: list[_Matches]) -> _Ranking | None:
    """Detections in pycocotools' order; None if there are none."""
    found = [(place, each) for place, each in enumerate(results) if each and len(each["dtScores"])]
    if not found:
        return None
    scores = np.concatenate([np.asarray(each["dtScores"])[:_DETECTIONS] for _, each in found])
    images = np.concatenate([np.full(len(each["dtScores"][:_DETECTIONS]), place) for place, each in found])
    order = np.argsort(-scores, kind="mergesort")
    hit, ignored = (
        np.concatenate([each[key][:, :_DETECTIONS] for _, each in found], axis=1)[:, order].astype(bool)
        for key in ("dtMatches", "dtIgnore")
    )
    return _Ranking(
        images=images[order],
        hits=tuple(np.flatnonzero(row) for row in hit & ~ignored),
        ignored=tuple(np.flatnonzero(row) for row in ignored),
    )


def _average(
    ranking: _Ranking,
    objects: Float[np.ndarray, "D"],
    weights: Float[np.ndarray, "D N"],
    levels: Float[np.ndarray, "R"],
) -> tuple[Float[np.ndarray, "T D"], Float[np.ndarray, "T D"]]:
    """Average precision and greatest recall at each threshold for each row of weights, 0 where there is no object."""
    precision, recall = (np.zeros((len(ranking.hits), len(weights))) for _ in range(2))
    seen = np.cumsum(weights[:, ranking.images], axis=1)
    for place, (hits, ignored) in enumerate(zip(ranking.hits, ranking.ignored, strict=True)):
        if not len(hits):
            continue
        counted = seen[:, hits]
        if len(ignored):
            skipped = np.cumsum(weights[:, ranking.images[ignored]], axis=1)
            before = np.searchsorted(ignored, hits)
            counted = counted - np.where(before > 0, skipped[:, before - 1], 0.0)
        right = np.cumsum(weights[:, ranking.images[hits]], axis=1)
        reached = right / np.maximum(objects, 1.0)[:, None]
        precision[place] = _interpolate(reached, right / np.maximum(counted, 1.0), levels) * (objects > 0)
        recall[place] = reached[:, -1] * (objects > 0)
    return precision, recall


def _interpolate(
    recall: Float[np.ndarray, "D H"], precision: Float[np.ndarray, "D H"], levels: Float[np.ndarray, "R"]
) -> Float[np.ndarray, "D"]:
    """Mean over the levels of the best precision from where recall reaches them.

    The hits alone are looked at: between two of them precision only falls.
    """
    count = recall.shape[1]
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    rows = np.arange(len(recall))[:, None]
    found = np.searchsorted((recall + 2 * rows).ravel(), (levels + 2 * rows).ravel(), side="left")
    places = found.reshape(len(recall), len(levels)) - rows * count
    best = envelope[rows, places.clip(max=count - 1)] * (places < count)
    mean: Float[np.ndarray, "D"] = best.sum(1) / len(levels)
    return mean


def _index(images: list[dict[str, Any]], entries: Sequence[dict[str, Any]], categories: list[int]) -> COCO:
    index = COCO()
    numbered = [{"iscrowd": 0, **entry, "id": number} for number, entry in enumerate(entries, start=1)]
    index.dataset = {"images": images, "annotations": numbered, "categories": [{"id": each} for each in categories]}
    index.createIndex()
    return index
