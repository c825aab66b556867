"""What the views of a photo have in common: one list of objects, and how steady a teacher is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int16

from model.errors import LabelStoreError
from model.files import atomic_write, load_npz
from model.networks.query_rescoring import matrix_nms_decay
from training.self_training.teacher import LEAST_SCORE, THRESHOLDS, ViewPredictions

_SAME = 0.7
"""IoU from which the objects of two views are one, as in the vote."""
_WINDOW = 0.8
"""What a window's word counts beside that of the whole photo, of which it shows a part."""
_COUNTED_SCORE = 0.2
"""Of objects that steadiness is measured on."""
_COVERING_SCORE = 0.4
"""From which an object covers what it lies on: as the default model's threshold."""
_LEAST_CELLS = 4


@dataclass(frozen=True, kw_only=True)
class MergedPredictions:
    """What all views together say of a photo, in the cells of its square; objects best first."""

    soft: Float32[np.ndarray, "N h w"]
    scores: Float32[np.ndarray, "N"]
    """The best view's, halved where no other that shows the object whole finds it; less beside a rival."""
    clusters: Int[np.ndarray, "N"]
    """Counted from 1."""
    semantic: Int16[np.ndarray, "h w"]
    """The likeliest of 0, things, and the stuff clusters."""
    certainty: Float32[np.ndarray, "h w"]
    """Its chance."""


@dataclass(frozen=True, kw_only=True)
class TtaConsistency:
    """What can be said of a teacher without labels; means over photos, 0..1."""

    flip: float
    """IoU of objects with those of the mirrored photo, by score."""
    scale: float
    """IoU with those of windows, made larger, that show them whole."""
    covered: float
    """Share of the photo with an object or stuff."""

    @classmethod
    def average(cls, photos: Sequence[Self]) -> Self:
        """The mean over those of which there is something to say; NaN if there is none."""
        figures = np.array([(each.flip, each.scale, each.covered) for each in photos])
        known = ~np.isnan(figures)
        sums = np.where(known, figures, 0.0).sum(0)
        flip, scale, covered = np.where(known.any(0), sums / np.maximum(known.sum(0), 1), np.nan).tolist()
        return cls(flip=flip, scale=scale, covered=covered)

    def list_falls(self, before: Self, tolerance: float) -> list[str]:
        """What is less than it was, in words; what was not known before (NaN) cannot fall."""
        pairs = ((name, getattr(before, name), getattr(self, name)) for name in ("flip", "scale", "covered"))
        return [
            f"{name} {old:.3f} to {new:.3f}"
            for name, old, new in pairs
            if not (math.isnan(old) or new >= old - tolerance)
        ]


def merge_views(views: Sequence[ViewPredictions]) -> MergedPredictions:
    """Objects grouped around the surest, at most one of each view; the first two views show the photo whole.

    A mask is the mean of its group's, by score, and so is its chance of each cluster. Groups that overlap are rivals:
    the less sure one's score decays, as in the network. Objects that a window cuts off are left out. Stuff is the mean
    over the views that show a cell.
    """
    finds = [_drop_cut(each) for each in views]
    soft, scores, chances = (
        np.concatenate([getattr(each, name) for each in finds]) for name in ("soft", "scores", "chances")
    )
    origins = np.repeat(np.arange(len(finds)), [len(each.scores) for each in finds])
    trusted = np.where(origins < 2, scores, np.float32(_WINDOW) * scores)
    hard = soft > THRESHOLDS.mask_threshold
    groups = _group(hard, trusted, origins)
    semantic, certainty = _read_semantic(views)
    masks = np.array([np.average(soft[each], axis=0, weights=scores[each]) for each in groups], np.float32)
    masks = masks.reshape(len(groups), *semantic.shape)
    agreed = [len(each) / _count_views(views, hard[each[0]]) for each in groups]
    sureness = np.array([trusted[each[0]] * (1 + share) / 2 for each, share in zip(groups, agreed, strict=True)])
    sureness = _yield_to_rivals(sureness.astype(np.float32), masks > THRESHOLDS.mask_threshold)
    order = [place for place in np.argsort(-sureness, kind="stable") if sureness[place] >= LEAST_SCORE]
    clusters = np.array([(scores[each] @ chances[each]).argmax() + 1 for each in groups], np.int64)
    return MergedPredictions(
        soft=masks[order], scores=sureness[order], clusters=clusters[order], semantic=semantic, certainty=certainty
    )


def measure_consistency(views: Sequence[ViewPredictions]) -> TtaConsistency:
    """Of one photo; NaN where nothing was found to measure on. The first view shows it whole, the second mirrored."""
    whole, mirrored, *windows = views
    is_thing = (whole.hard & (whole.scores >= _COVERING_SCORE)[:, None, None]).any(0)
    covered = (is_thing | (whole.semantic.argmax(0) > 0))[whole.inside].mean()
    return TtaConsistency(flip=_agree(whole, [mirrored]), scale=_agree(whole, windows), covered=float(covered))


def compare(masks: Bool[np.ndarray, "N h w"], others: Bool[np.ndarray, "M h w"]) -> Float[np.ndarray, "N M"]:
    """Intersection over union of each with each; 0 of two empty ones."""
    flat, rest = (each.reshape(len(each), math.prod(each.shape[1:])).astype(np.float32) for each in (masks, others))
    shared = flat @ rest.T
    joined = flat.sum(1)[:, None] + rest.sum(1)[None] - shared
    overlaps: Float[np.ndarray, "N M"] = shared / np.maximum(joined, 1.0)
    return overlaps


def _drop_cut(view: ViewPredictions) -> ViewPredictions:
    """The finds that lie in the view, with a few cells."""
    hard = view.hard
    kept = (hard.sum((1, 2)) >= _LEAST_CELLS) & ~(hard & ~view.inside).any((1, 2))
    return replace(view, soft=view.soft[kept], scores=view.scores[kept], chances=view.chances[kept])


def _group(
    hard: Bool[np.ndarray, "N h w"], scores: Float[np.ndarray, "N"], origins: Int[np.ndarray, "N"]
) -> list[Int[np.ndarray, "n"]]:
    """Places of the objects that are one, the surest first."""
    overlaps = compare(hard, hard)
    is_free = np.ones(len(hard), bool)
    groups = []
    for seed in np.argsort(-scores, kind="stable"):
        if is_free[seed]:
            groups.append(_gather(overlaps[seed], origins, is_free))
            is_free &= overlaps[seed] < _SAME
    return groups


def _yield_to_rivals(scores: Float32[np.ndarray, "N"], hard: Bool[np.ndarray, "N h w"]) -> Float32[np.ndarray, "N"]:
    """Scores as they are beside better ones that draw the same."""
    if not len(scores):
        return scores
    overlaps = torch.from_numpy(compare(hard, hard)).float()
    kept: Float32[np.ndarray, "N"] = (
        scores * matrix_nms_decay(torch.from_numpy(scores)[None], overlaps[None])[0].numpy()
    )
    return kept


def _gather(
    overlaps: Float[np.ndarray, "N"], origins: Int[np.ndarray, "N"], is_free: Bool[np.ndarray, "N"]
) -> Int[np.ndarray, "n"]:
    """The best of each view among those that overlap a seed, the seed first."""
    fitting = np.flatnonzero(is_free & (overlaps >= _SAME))
    ranked = fitting[np.argsort(-overlaps[fitting], kind="stable")]
    _, firsts = np.unique(origins[ranked], return_index=True)
    return ranked[np.sort(firsts)]


def _count_views(views: Sequence[ViewPredictions], mask: Bool[np.ndarray, "h w"]) -> int:
    """Those that show all of it."""
    return sum(not (mask & ~each.inside).any() for each in views)


def _read_semantic(views: Sequence[ViewPredictions]) -> tuple[Int16[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    shown = np.sum([each.semantic.sum(0) > 0.5 for each in views], axis=0)
    mean = np.sum([each.semantic for each in views], axis=0) / np.maximum(shown, 1)
    return mean.argmax(0).astype(np.int16), mean.max(0).astype(np.float32)


def _agree(whole: ViewPredictions, others: Sequence[ViewPredictions]) -> float:
    """The mean of each object's best IoU in the views that show all of it, by score."""
    gained = weight = 0.0
    counted = whole.scores >= _COUNTED_SCORE
    for other in others:
        kept = counted & ~(whole.hard & ~other.inside).any((1, 2))
        found = other.hard[other.scores >= _COUNTED_SCORE]
        best = compare(whole.hard[kept], found).max(1, initial=0.0)
        gained += float(best @ whole.scores[kept])
        weight += float(whole.scores[kept].sum())
    return gained / weight if weight else math.nan


MOST_OBJECTS = 40
"""Kept of one photo, best first."""
_LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class TeacherPredictions:
    """Objects, stuff and how steady the views were."""

    found: MergedPredictions
    steadiness: TtaConsistency
    height: int
    """Of the photo, as the next."""
    width: int

    def write(self, path: Path) -> None:
        """Chances are rounded to 255ths."""
        found, steadiness = self.found, self.steadiness
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez_compressed(
                stream,
                soft=_pack(found.soft[:MOST_OBJECTS]),
                scores=found.scores[:MOST_OBJECTS],
                clusters=found.clusters[:MOST_OBJECTS],
                semantic=found.semantic,
                certainty=_pack(found.certainty),
                steadiness=np.array([steadiness.flip, steadiness.scale, steadiness.covered]),
                size=np.array([self.height, self.width]),
            )


def read_teacher_predictions(path: Path) -> TeacherPredictions:
    """Raises LabelStoreError if the file is missing or broken."""
    try:
        stored = load_npz(path)
        found = MergedPredictions(
            soft=stored["soft"].astype(np.float32) / _LEVELS,
            scores=stored["scores"],
            clusters=stored["clusters"],
            semantic=stored["semantic"],
            certainty=stored["certainty"].astype(np.float32) / _LEVELS,
        )
        flip, scale, covered = stored["steadiness"].tolist()
        height, width = stored["size"].tolist()
        steadiness = TtaConsistency(flip=flip, scale=scale, covered=covered)
        return TeacherPredictions(found=found, steadiness=steadiness, height=height, width=width)
    except (ValueError, KeyError) as error:
        raise LabelStoreError(f"{path} holds nothing that a teacher found: {error}") from error


def _pack(chances: np.ndarray) -> np.ndarray:
    packed: np.ndarray = np.round(chances * _LEVELS).astype(np.uint8)
    return packed
