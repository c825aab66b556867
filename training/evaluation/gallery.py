"""The pictures of a report: a photo, its truth and the answer side by side, a colour a category."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image
from pycocotools import mask as coco

from model.formats.encoders import segment_color
from model.formats.rle import decode_rle
from model.images import read_image
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage, GroundTruthLabels
from training.evaluation.evaluation_report import ImageMetrics
from training.evaluation.image_results import hash_photo
from training.evaluation.matching.class_mapping import ClassMapping, CrossFittedMapping
from training.evaluation.predictors import ImagePrediction, Predictor

EXAMPLES_PER_RANK = 3
"""Photos of the best, the median and the worst."""
_NAMELESS_RGB = (128, 128, 128)
_LINE_RGB = (245, 245, 245)
_BOX_PX = 3
_OBJECT_SCORE = 0.3
"""Least score of an object that is drawn where the truth knows only objects."""
_PREVIEW_PX = 420
_JPEG_QUALITY = 82


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    """A colour and what it stands for."""

    name: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """One photo of the gallery; its pictures are JPEG files."""

    rank: str
    figures: ImageMetrics
    photo: bytes
    truth: bytes
    answer: bytes
    chips: tuple[LegendEntry, ...]


@dataclass(frozen=True, kw_only=True)
class _Places:
    """A label map whose segments have places in the taxonomy; -1 has no name."""

    label_map: Int32[np.ndarray, "H W"]
    places: dict[int, int]


def pick_examples(qualities: Sequence[float]) -> dict[int, str]:
    """Places of the best, the middle and the worst pictures, in that order, and which of them each is."""
    order = np.argsort([-each for each in qualities], kind="stable").tolist()
    middle = max(0, (len(order) - EXAMPLES_PER_RANK) // 2)
    groups = {
        "best": order[:EXAMPLES_PER_RANK],
        "median": order[middle : middle + EXAMPLES_PER_RANK],
        "worst": order[-EXAMPLES_PER_RANK:],
    }
    chosen: dict[int, str] = {}
    for rank, places in groups.items():
        for place in places:
            chosen.setdefault(place, rank)
    return chosen


def render_gallery(
    figures: Sequence[ImageMetrics], source: Predictor, truth: GroundTruthDataset, fit: CrossFittedMapping
) -> list[GalleryItem]:
    """The source is asked about these few pictures once more: nothing of their size was kept."""
    chosen = pick_examples([each.quality for each in figures])
    return [
        _draw(truth.images[place], rank, figures[place], source, truth, fit.of(place)) for place, rank in chosen.items()
    ]


def _draw(
    picture: GroundTruthImage,
    rank: str,
    figures: ImageMetrics,
    source: Predictor,
    truth: GroundTruthDataset,
    naming: ClassMapping,
) -> GalleryItem:
    photo = read_image(picture.path)
    labels = picture.annotation.read(photo.height, photo.width)
    answer = source.answer(photo.image, hash_photo(picture))
    true = _place_truth(labels, photo.height, photo.width)
    found = _place_answer(answer, truth, naming)
    present = sorted({place for each in (true, found) for place in each.places.values()})
    return GalleryItem(
        rank=rank,
        figures=figures,
        photo=_encode_preview(photo.image),
        truth=_encode_preview(_paint(photo.image, true, truth)),
        answer=_encode_preview(_paint(photo.image, found, truth)),
        chips=tuple(LegendEntry(name=_name(place, truth), rgb=category_rgb(place)) for place in present),
    )


def _place_truth(labels: GroundTruthLabels, height: int, width: int) -> _Places:
    if labels.label_map is not None:
        return _Places(label_map=labels.label_map, places=labels.segments)
    label_map = np.zeros((height, width), np.int32)
    for number, each in enumerate(labels.objects, start=1):
        if each.rle is not None:
            label_map[coco.decode(each.rle).astype(bool)] = number
        else:
            _draw_box(label_map, each.bbox, number)
    return _Places(
        label_map=label_map, places={number: each.category for number, each in enumerate(labels.objects, start=1)}
    )


def _place_answer(answer: ImagePrediction, truth: GroundTruthDataset, naming: ClassMapping) -> _Places:
    if truth.kind in ("panoptic", "semantic"):
        shown = answer.panoptic if truth.kind == "panoptic" else answer.semantic
        table = naming.panoptic if truth.kind == "panoptic" else naming.semantic
        return _Places(
            label_map=shown.label_map, places={each: int(table[cluster]) for each, cluster in shown.clusters.items()}
        )
    label_map = np.zeros_like(answer.panoptic.label_map)
    kept = [each for each in answer.detections if each.score >= _OBJECT_SCORE]
    for number, each in reversed(list(enumerate(kept, start=1))):
        if truth.kind == "boxes":
            _draw_box(label_map, each.outline.bbox, number)
        else:
            label_map[decode_rle(each.outline)] = number
    return _Places(
        label_map=label_map,
        places={number: int(naming.panoptic[each.cluster]) for number, each in enumerate(kept, start=1)},
    )


def _paint(image: UInt8[np.ndarray, "H W 3"], shown: _Places, truth: GroundTruthDataset) -> UInt8[np.ndarray, "H W 3"]:
    ids = np.array([0, *shown.places], np.int64)
    numbers = _number(shown.label_map, ids)
    colours = np.array([(0, 0, 0), *(category_rgb(place) for place in shown.places.values())], np.float32)
    strengths = np.array(
        [0.0, *(0.62 if truth.taxonomy.is_thing(place) else 0.4 for place in shown.places.values())], np.float32
    )[:, None]
    painted = image + strengths[numbers] * (colours[numbers] - image)
    painted[:, 1:][numbers[:, 1:] != numbers[:, :-1]] = _LINE_RGB
    painted[1:][numbers[1:] != numbers[:-1]] = _LINE_RGB
    rounded: UInt8[np.ndarray, "H W 3"] = painted.round().astype(np.uint8)
    return rounded


def _number(label_map: Int32[np.ndarray, "H W"], ids: Int[np.ndarray, "S"]) -> Int[np.ndarray, "H W"]:
    """Places in `ids`; 0 for values that it lacks."""
    order = np.argsort(ids)
    nearest = order[np.searchsorted(ids, label_map, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[nearest] == label_map, nearest, 0)


def _draw_box(label_map: Int32[np.ndarray, "H W"], bbox: Sequence[float], number: int) -> None:
    left, top, width, height = (round(each) for each in bbox)
    window = label_map[max(top, 0) : top + height, max(left, 0) : left + width]
    for edge in (window[:_BOX_PX], window[-_BOX_PX:], window[:, :_BOX_PX], window[:, -_BOX_PX:]):
        edge[:] = number


def category_rgb(place: int) -> tuple[int, int, int]:
    """The colour of a category, grey for none; neighbours lie far apart in hue."""
    return _NAMELESS_RGB if place < 0 else segment_color(place + 1, is_thing=True)


def _name(place: int, truth: GroundTruthDataset) -> str:
    return truth.taxonomy.names[place] if place >= 0 else "no category"


def _encode_preview(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """A small JPEG."""
    preview = Image.fromarray(image)
    preview.thumbnail((_PREVIEW_PX, _PREVIEW_PX))
    stream = io.BytesIO()
    preview.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()
