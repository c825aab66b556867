"""The evaluation report as one HTML file without scripts or external resources."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from jaxtyping import Int32, UInt8
from pycocotools import mask as coco

from model.files import atomic_write
from model.formats.overlay import encode_jpeg, segment_color
from model.images import read_image
from training.evaluation.class_mapping import ClassMapping
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage
from training.evaluation.evaluation_report import ClassMetrics, EvaluationReport, EvaluationSummary, ImageMetrics
from training.evaluation.image_results import hash_photo
from training.evaluation.metrics.bootstrap import ConfidenceInterval
from training.evaluation.predictors import ImagePrediction, Predictor
from training.pseudo_labels.visualize import draw_overlay

HTML_REPORT_FILE = "report.html"
EXAMPLES_PER_RANK = 3
_RANKS = ("Best", "Median", "Worst")
_UNMAPPED_RGB = (128, 128, 128)
_BOX_PX = 3
_MIN_DRAWN_SCORE = 0.3
"""Minimum score of a detection that is drawn if only objects are labeled."""
_MAX_SIDE_PX = 420
_CLASS_TITLES = {"pq": "PQ", "iou": "IoU", "ap": "AP"}
_INSTANCE_ROWS = {
    "agnostic_mask": "masks, class-agnostic",
    "agnostic_box": "boxes, class-agnostic",
    "named_mask": "masks, by category",
    "named_box": "boxes, by category",
}
_INSTANCE_COLUMNS = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium", "ap_large": "large",
    "ar1": "AR1", "ar10": "AR10", "ar100": "AR100",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """One image of the gallery, as JPEG files."""

    rank: str
    metrics: ImageMetrics
    image: bytes
    ground_truth: bytes
    prediction: bytes
    legend: dict[str, tuple[int, int, int]]
    """Color by name of a category."""


_CategoryMap = tuple[Int32[np.ndarray, "H W"], dict[int, int]]
"""A label map, and the category index of each segment, -1 for none."""


def write_html_report(report: EvaluationReport, gallery: Sequence[GalleryItem], folder: Path) -> None:
    """Write `report.html`."""
    with atomic_write(folder / HTML_REPORT_FILE) as sibling:
        sibling.write_text(render_html_report(report, gallery), encoding="utf-8")


def render_html_report(report: EvaluationReport, gallery: Sequence[GalleryItem]) -> str:
    """Return the HTML of the report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.ChainableUndefined,  # metrics that a dataset does not have
    )
    environment.filters["base64"] = lambda content: b64encode(content).decode("ascii")
    class_keys = [key for key in _CLASS_TITLES if any(getattr(each, key) is not None for each in report.classes)][:2]
    by_rank = [(rank, [item for item in gallery if item.rank == rank]) for rank in _RANKS]
    return environment.get_template(HTML_REPORT_FILE).render(
        summary=report.summary,
        headlines=_list_headlines(report.summary),
        instance_rows=_INSTANCE_ROWS,
        instance_columns=_INSTANCE_COLUMNS,
        class_titles=[_CLASS_TITLES[key] for key in class_keys],
        class_groups=_group_classes(report.classes, class_keys),
        gallery=[(rank, items) for rank, items in by_rank if items],
    )


def _list_headlines(summary: EvaluationSummary) -> list[tuple[str, ConfidenceInterval]]:
    metrics = [
        ("Panoptic quality", summary.panoptic.get("pq")),
        ("Semantic, mean IoU", summary.semantic.get("miou")),
        ("Semantic, pixel accuracy", summary.semantic.get("accuracy")),
    ]
    for key, title in (("agnostic_mask", "Objects, mask"), ("agnostic_box", "Objects, box")):
        if key in summary.instance:
            headline = summary.instance[key].headline
            metrics += [(f"{title} AP", headline["ap"]), (f"{title} AR100", headline["ar100"])]
            break
    return [(title, interval) for title, interval in metrics if interval]


def _group_classes(classes: Sequence[ClassMetrics], keys: list[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return things and stuff, best first, with a color and the values of `keys`."""
    groups = []
    for title, is_thing in (("Things", True), ("Stuff", False)):
        rows = [
            {"name": metrics.name, "rgb": category_rgb(index), "values": [getattr(metrics, key) for key in keys]}
            for index, metrics in enumerate(classes)
            if metrics.is_thing == is_thing and any(getattr(metrics, key) is not None for key in keys)
        ]
        if rows:
            groups.append((title, sorted(rows, key=lambda row: (-(row["values"][0] or 0.0), row["name"]))))
    return groups


def pick_examples(qualities: Sequence[float]) -> dict[int, str]:
    """Return the positions of the best, the median and the worst images, in that order, with their rank."""
    order = np.argsort([-quality for quality in qualities], kind="stable").tolist()
    middle = max(0, (len(order) - EXAMPLES_PER_RANK) // 2)
    groups = (order[:EXAMPLES_PER_RANK], order[middle : middle + EXAMPLES_PER_RANK], order[-EXAMPLES_PER_RANK:])
    examples: dict[int, str] = {}
    for rank, positions in zip(_RANKS, groups, strict=True):
        for position in positions:
            examples.setdefault(position, rank)
    return examples


def render_gallery(
    metrics: Sequence[ImageMetrics], predictor: Predictor, dataset: GroundTruthDataset, mappings: Sequence[ClassMapping]
) -> list[GalleryItem]:
    """Draw example images; runs the predictor on them again, since results keep no pixel arrays."""
    examples = pick_examples([each.quality for each in metrics])
    return [
        _draw_example(dataset.images[position], rank, metrics[position], predictor, dataset, mappings[position])
        for position, rank in examples.items()
    ]


def _draw_example(
    image: GroundTruthImage,
    rank: str,
    metrics: ImageMetrics,
    predictor: Predictor,
    dataset: GroundTruthDataset,
    mapping: ClassMapping,
) -> GalleryItem:
    decoded = read_image(image.path)
    labels = image.annotation.read(decoded.height, decoded.width)
    if labels.label_map is None:
        objects = [(each.category, each.bbox, each.rle) for each in sorted(labels.objects, key=lambda each: -each.area)]
        ground_truth = _draw_objects(objects, decoded.height, decoded.width)
    else:
        ground_truth = labels.label_map, labels.segments
    prediction = _map_prediction(predictor.predict(decoded.image, hash_photo(image)), dataset, mapping)
    present = sorted({*ground_truth[1].values(), *prediction[1].values()})
    names = {-1: "no category", **dict(enumerate(dataset.taxonomy.names))}

    def draw(category_map: _CategoryMap) -> bytes:
        label_map, categories = category_map
        things = [segment for segment, index in categories.items() if 0 <= index < dataset.taxonomy.num_things]
        colors = {segment: category_rgb(index) for segment, index in categories.items()}
        return _encode_jpeg(draw_overlay(decoded.image, label_map, colors, things))

    return GalleryItem(
        rank=rank,
        metrics=metrics,
        image=_encode_jpeg(decoded.image),
        ground_truth=draw(ground_truth),
        prediction=draw(prediction),
        legend={names[index]: category_rgb(index) for index in present},
    )


def _map_prediction(prediction: ImagePrediction, dataset: GroundTruthDataset, mapping: ClassMapping) -> _CategoryMap:
    if dataset.kind in ("panoptic", "semantic"):
        is_panoptic = dataset.kind == "panoptic"
        cluster_map = prediction.panoptic if is_panoptic else prediction.semantic
        table = mapping.panoptic if is_panoptic else mapping.semantic
        clusters = np.array(list(cluster_map.clusters.values()), np.int64)
        found = mapping.categorize(table, clusters, cluster_map.embeddings)
        return cluster_map.label_map, dict(zip(cluster_map.clusters, found.tolist(), strict=True))
    objects = [
        (
            int(mapping.panoptic[each.cluster]),
            each.rle.bbox,
            None if dataset.kind == "boxes" else {"size": list(each.rle.size), "counts": each.rle.counts},
        )
        for each in reversed(prediction.detections)
        if each.score >= _MIN_DRAWN_SCORE
    ]
    return _draw_objects(objects, *prediction.panoptic.label_map.shape)


def _draw_objects(
    objects: Sequence[tuple[int, Sequence[float], dict[str, Any] | None]], height: int, width: int
) -> _CategoryMap:
    """Draw objects given as category index, box and mask, the last one on top; without a mask the border of the box."""
    label_map = np.zeros((height, width), np.int32)
    for number, (_, bbox, rle) in enumerate(objects, start=1):
        if rle is not None:
            label_map[coco.decode(rle).astype(bool)] = number
        else:
            cv2.rectangle(label_map, [round(each) for each in bbox], number, _BOX_PX)
    return label_map, {number: category for number, (category, _, _) in enumerate(objects, start=1)}


def category_rgb(index: int) -> tuple[int, int, int]:
    """Return the color of a category index, gray for -1; neighboring indices differ much in hue."""
    return _UNMAPPED_RGB if index < 0 else segment_color(index + 1, is_thing=True)


def _encode_jpeg(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encode a small version of the image."""
    scale = min(1.0, _MAX_SIDE_PX / max(image.shape))
    return encode_jpeg(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
