"""The teacher of self-training: a trained decoder's predictions for views of a photo (mirrored, cropped), merged."""

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int16
from torch import Tensor
from torch.nn import functional

from model.errors import DatasetError
from model.export.export import TRANSFORMER_THRESHOLDS
from model.files import atomic_write, load_npz
from model.images import read_image
from model.networks.interface import NetworkOutput, normalize
from model.networks.mask_transformer import (
    MASK_STRIDE_PX,
    DecoderOutput,
    MaskDecoder,
    matrix_nms_decay,
    to_network_output,
)
from model.postprocessing.masks import split_components
from training.data.features import FeatureCache, count_patches
from training.data.photos import PhotoFile
from training.mask_transformer.samples import CropView, full_view
from training.pseudo_labels.consensus import group_by_iou, pairwise_mask_iou

THRESHOLDS = TRANSFORMER_THRESHOLDS
"""Mask threshold and minimum component size, as in the network's panoptic output."""
MIN_SCORE = 0.1
"""Queries with a lower score are ignored."""
_CROP_SIDE = 0.75
"""Side of a crop of cached features, as a fraction of the input's."""
_BORDER = np.ones((3, 3), np.uint8)
MAX_INSTANCES = 40
"""Instances stored per photo, best first."""
_SAME_INSTANCE_IOU = 0.7
"""Instances of two views with this IoU are the same."""
_CROP_SCORE_FACTOR = 0.8
"""Weight of the scores of crops, which show only a part of the photo."""
_MIN_CONSISTENCY_SCORE = 0.2
"""Instances with a lower score do not count for the consistency."""
_MIN_COVERAGE_SCORE = 0.4
"""Instances with a lower score do not count for the coverage; the bundled model's score threshold."""
_MIN_AREA = 4
_QUANTIZED, _LEVELS = ("mask_probs", "semantic_probs"), 255
"""Stored probabilities."""


@dataclass(frozen=True, kw_only=True)
class ViewPredictions:
    """Predictions for one view, in map pixels of the whole photo's input."""

    mask_probs: Float32[np.ndarray, "N h w"]
    """Probability of each connected component of an instance; 0 outside the view."""
    scores: Float32[np.ndarray, "N"]
    cluster_probs: Float32[np.ndarray, "N K"]
    """Probabilities of the thing clusters, given an instance."""
    semantic_probs: Float32[np.ndarray, "S+1 h w"]
    """Probabilities of things and of each stuff cluster; 0 outside the view."""
    is_visible: Bool[np.ndarray, "h w"]
    """Pixels of the photo in the view, without those next to its border inside the photo."""

    @property
    def masks(self) -> Bool[np.ndarray, "N h w"]:
        return self.mask_probs > THRESHOLDS.mask_threshold


def make_tta_views(whole: CropView) -> list[CropView]:
    """Return the whole photo, the mirrored photo, and crops that together cover the photo."""
    grid = whole.grid
    # Multiples of this keep both patches and map pixels aligned.
    step = math.lcm(whole.side_px // grid, MASK_STRIDE_PX) * grid // whole.side_px
    side = int(_CROP_SIDE * grid) // step * step
    tops, lefts = (sorted({0, max(0, length - side) // step * step}) for length in count_patches(whole.letterbox, grid))
    crops = [replace(whole, top=top, left=left, side=side) for top in tops for left in lefts]
    return [whole, replace(whole, is_mirrored=True), *crops]


@torch.inference_mode()
def predict_views(decoder: MaskDecoder, photo: PhotoFile, cache: FeatureCache) -> list[ViewPredictions]:
    """Return the predictions for each of `make_tta_views`."""
    image, maps = read_image(photo.path).image, cache.read(photo.digest)
    whole = full_view(photo.height, photo.width, decoder.config.side_px, decoder.grid_size)
    views = make_tta_views(whole)
    features = torch.stack([torch.from_numpy(each.crop_features(maps)).flatten(1, 2) for each in views], dim=1).float()
    pixels = torch.from_numpy(np.stack([each.crop_image(image) for each in views]))
    output = decoder(features, normalize(pixels).contiguous(memory_format=torch.channels_last))
    raw = to_network_output(output)
    is_photo = np.zeros((whole.map_side, whole.map_side), bool)
    is_photo[: whole.letterbox.map_height, : whole.letterbox.map_width] = True
    return [_decode_view(output, raw, index, view, is_photo) for index, view in enumerate(views)]


def _decode_view(
    output: DecoderOutput, raw: NetworkOutput, index: int, view: CropView, is_photo: Bool[np.ndarray, "h w"]
) -> ViewPredictions:
    components = [
        (query, component)
        for query in (raw.scores[index] >= MIN_SCORE).nonzero().flatten().tolist()
        for component in split_components(raw.masks[index, query].numpy(), THRESHOLDS)
    ]
    queries = [query for query, _ in components]
    masks = np.array([component for _, component in components], np.float32).reshape(-1, *is_photo.shape)
    return ViewPredictions(
        mask_probs=_to_whole_map(torch.from_numpy(masks), view) * is_photo,
        scores=raw.scores[index, queries].numpy(),
        cluster_probs=output.class_logits[index, queries, :-1].softmax(1).numpy(),
        semantic_probs=_to_whole_map(output.semantic_logits[index].softmax(0), view) * is_photo,
        is_visible=_find_visible(view, is_photo),
    )


def _find_region(view: CropView) -> tuple[slice, slice]:
    """Return the rows and columns of the whole photo's map that the view shows."""
    rows, columns = (
        slice(first * view.map_side // view.grid, (first + view.side) * view.map_side // view.grid)
        for first in (view.top, view.left)
    )
    return rows, columns


def _find_visible(view: CropView, is_photo: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    shown = np.zeros_like(is_photo)
    shown[_find_region(view)] = True
    near_hidden: np.ndarray = cv2.dilate((is_photo & ~shown).astype(np.uint8), _BORDER)
    visible: Bool[np.ndarray, "h w"] = is_photo & shown & (near_hidden == 0)
    return visible


def _to_whole_map(maps: Float[Tensor, "N h w"], view: CropView) -> Float32[np.ndarray, "N h w"]:
    """Paste maps of a view into the whole photo's map."""
    rows, columns = _find_region(view)
    pasted = np.zeros(maps.shape, np.float32)
    if len(maps):
        unmirrored = maps.flip(2) if view.is_mirrored else maps
        pasted[:, rows, columns] = functional.adaptive_avg_pool2d(unmirrored, rows.stop - rows.start).numpy()
    return pasted


@dataclass(frozen=True)
class TtaConsistency:
    """Quality of a teacher, measured without labels; means over photos, 0..1, or NaN without any instance."""

    flip: float
    """IoU of the instances with those of the mirrored photo, weighted by score."""
    scale: float
    """IoU with those of enlarged crops that show the whole instance."""
    coverage: float
    """Fraction of the photo with an instance or stuff."""

    @classmethod
    def average(cls, photos: Sequence[Self]) -> Self:
        """Return the mean over the photos, each value over those where it is not NaN."""
        values = np.ma.masked_invalid([astuple(each) for each in photos])
        return cls(*values.mean(0).filled(math.nan).tolist())

    def list_drops(self, before: Self, tolerance: float) -> list[str]:
        """Describe the values that dropped by more than the tolerance; a value that was NaN before cannot drop."""
        pairs = ((name, old, getattr(self, name)) for name, old in asdict(before).items())
        return [
            f"{name} {old:.3f} to {new:.3f}"
            for name, old, new in pairs
            if not (math.isnan(old) or new >= old - tolerance)
        ]


@dataclass(frozen=True, kw_only=True)
class TeacherPredictions:
    """Predictions for a photo, merged from all views, in map pixels of its input; instances best first."""

    mask_probs: Float32[np.ndarray, "N h w"]
    scores: Float32[np.ndarray, "N"]
    """The score in the best view, halved if no other view that shows the whole instance finds it, and decayed by
    overlapping instances of higher score."""
    clusters: Int[np.ndarray, "N"]
    """1-based."""
    semantic: Int16[np.ndarray, "h w"]
    """The most probable of things (0) and the stuff clusters."""
    semantic_probs: Float32[np.ndarray, "h w"]
    """Probability of that class."""
    consistency: TtaConsistency

    def write(self, path: Path) -> None:
        """Save as npz; probabilities are rounded to 255ths."""
        arrays = {**vars(self), "consistency": np.array(astuple(self.consistency))}
        quantized = {name: np.round(arrays[name] * _LEVELS).astype(np.uint8) for name in _QUANTIZED}
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **{**arrays, **quantized})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises DatasetError if the file is missing or invalid."""
        try:
            stored = load_npz(path)
            arrays: dict[str, Any] = {each.name: stored[each.name] for each in fields(cls)}
        except (ValueError, KeyError) as error:
            raise DatasetError(f"{path} is not a file of teacher predictions, delete it: {error}") from error
        arrays |= {name: arrays[name].astype(np.float32) / _LEVELS for name in _QUANTIZED}
        return cls(**{**arrays, "consistency": TtaConsistency(*arrays["consistency"].tolist())})


def merge_views(views: Sequence[ViewPredictions]) -> TeacherPredictions:
    """Group the instances of all views, at most one of each view; the first two show the whole photo, one mirrored.

    Mask and cluster probabilities are means over a group, weighted by score. Where groups overlap, the lower score
    decays, as in the network. Instances that a crop cuts off are left out. Semantic probabilities are means over the
    views that show a pixel.
    """
    kept = np.concatenate([_find_whole(each) for each in views])
    mask_probs, scores, cluster_probs = (
        np.concatenate([getattr(each, name) for each in views])[kept]
        for name in ("mask_probs", "scores", "cluster_probs")
    )
    view_indices = np.repeat(np.arange(len(views)), [len(each.scores) for each in views])[kept]
    weighted_scores = np.where(view_indices < 2, scores, np.float32(_CROP_SCORE_FACTOR) * scores)
    masks = mask_probs > THRESHOLDS.mask_threshold
    ious = pairwise_mask_iou(masks, masks)
    groups = [
        _best_per_view(members, ious[seed, members], view_indices[members])
        for seed, members in group_by_iou(ious, weighted_scores, _SAME_INSTANCE_IOU)
    ]
    num_shown = np.sum([each.semantic_probs.sum(0) > 0.5 for each in views], axis=0)
    semantic_probs = np.sum([each.semantic_probs for each in views], axis=0) / np.maximum(num_shown, 1)
    merged = np.array([np.average(mask_probs[each], axis=0, weights=scores[each]) for each in groups], np.float32)
    merged = merged.reshape(len(groups), *num_shown.shape)
    hidden = np.stack([~each.is_visible for each in views])
    num_views = [np.count_nonzero(~(masks[each[0]] & hidden).any((1, 2))) for each in groups]
    found_in = [len(each) / count for each, count in zip(groups, num_views, strict=True)]
    merged_scores = np.array(
        [weighted_scores[each[0]] * (1 + fraction) / 2 for each, fraction in zip(groups, found_in, strict=True)]
    )
    merged_scores = _decay_overlapping(merged_scores.astype(np.float32), merged > THRESHOLDS.mask_threshold)
    ranked = np.argsort(-merged_scores, kind="stable")[:MAX_INSTANCES]
    order = ranked[merged_scores[ranked] >= MIN_SCORE]
    clusters = np.array([(scores[each] @ cluster_probs[each]).argmax() + 1 for each in groups], np.int64)
    return TeacherPredictions(
        mask_probs=merged[order],
        scores=merged_scores[order],
        clusters=clusters[order],
        semantic=semantic_probs.argmax(0).astype(np.int16),
        semantic_probs=semantic_probs.max(0).astype(np.float32),
        consistency=measure_consistency(views),
    )


def measure_consistency(views: Sequence[ViewPredictions]) -> TtaConsistency:
    """Measure the consistency for one photo. The first view must be the whole photo, the second the mirrored one."""
    whole, mirrored, crops = views[0], views[1:2], views[2:]
    is_thing = (whole.masks & (whole.scores >= _MIN_COVERAGE_SCORE)[:, None, None]).any(0)
    is_covered = is_thing | (whole.semantic_probs.argmax(0) > 0)
    return TtaConsistency(
        flip=_mean_best_iou(whole, mirrored),
        scale=_mean_best_iou(whole, crops),
        coverage=float(is_covered[whole.is_visible].mean()),
    )


def _find_whole(view: ViewPredictions) -> Bool[np.ndarray, "N"]:
    """Return which instances the view does not cut off and are not tiny."""
    is_cut_off = (view.masks & ~view.is_visible).any((1, 2))
    is_whole: Bool[np.ndarray, "N"] = ~is_cut_off & (view.masks.sum((1, 2)) >= _MIN_AREA)
    return is_whole


def _best_per_view(
    members: Int[np.ndarray, "n"], ious: Float[np.ndarray, "n"], view_indices: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "m"]:
    """Return the member of each view with the highest IoU with the seed; the seed first."""
    ranked = np.argsort(-ious, kind="stable")
    _, firsts = np.unique(view_indices[ranked], return_index=True)
    return members[ranked[np.sort(firsts)]]


def _decay_overlapping(scores: Float32[np.ndarray, "N"], masks: Bool[np.ndarray, "N h w"]) -> Float32[np.ndarray, "N"]:
    """Decay the scores of instances that overlap better ones (matrix NMS)."""
    if not len(scores):
        return scores
    ious = torch.from_numpy(pairwise_mask_iou(masks, masks)).float()
    decay = matrix_nms_decay(torch.from_numpy(scores)[None], ious[None])[0].numpy()
    decayed: Float32[np.ndarray, "N"] = scores * decay
    return decayed


def _mean_best_iou(whole: ViewPredictions, others: Sequence[ViewPredictions]) -> float:
    """Return the mean of each instance's best IoU in the views that show all of it, weighted by score."""
    weighted_sum = weight = 0.0
    is_counted = whole.scores >= _MIN_CONSISTENCY_SCORE
    for other in others:
        kept = is_counted & ~(whole.masks & ~other.is_visible).any((1, 2))
        found = other.masks[other.scores >= _MIN_CONSISTENCY_SCORE]
        best = pairwise_mask_iou(whole.masks[kept], found).max(1, initial=0.0)
        weighted_sum += float(best @ whole.scores[kept])
        weight += float(whole.scores[kept].sum())
    return weighted_sum / weight if weight else math.nan
