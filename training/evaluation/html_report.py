"""The evaluation report as one HTML file without scripts or external resources."""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image
from pycocotools import mask as coco

from model.arrays import ids_to_positions
from model.files import atomic_write
from model.formats.overlay import segment_color
from model.formats.rle import decode_rle
from model.images import read_image
from training.evaluation.class_mapping import ClassMapping, CrossFittedMapping
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage, GroundTruthLabels
from training.evaluation.evaluation_report import ClassMetrics, EvaluationReport, EvaluationSummary, ImageMetrics
from training.evaluation.image_results import hash_photo
from training.evaluation.metrics.bootstrap import ConfidenceInterval
from training.evaluation.predictors import ImagePrediction, Predictor

HTML_REPORT_FILE = "report.html"
EXAMPLES_PER_RANK = 3
_RANKS = ("Best", "Median", "Worst")
_UNMAPPED_RGB = (128, 128, 128)
_BORDER_RGB = (245, 245, 245)
_BOX_PX = 3
_MIN_DRAWN_SCORE = 0.3
"""Minimum score of a detection that is drawn if only objects are labeled."""
_MAX_SIDE_PX = 420
_JPEG_QUALITY = 82
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
class LegendEntry:
    """A color and its category."""

    name: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """One image of the gallery, as JPEG files."""

    rank: str
    metrics: ImageMetrics
    image: bytes
    ground_truth: bytes
    prediction: bytes
    legend: tuple[LegendEntry, ...]


@dataclass(frozen=True, kw_only=True)
class _CategoryMap:
    """A label map and the category index of each segment, -1 for none."""

    label_map: Int32[np.ndarray, "H W"]
    categories: dict[int, int]


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
    class_keys = [key for key in _CLASS_TITLES if any(getattr(metrics, key) is not None for metrics in report.classes)][
        :2
    ]
    by_rank = [(rank, [item for item in gallery if item.rank == rank]) for rank in _RANKS]
    return environment.get_template(HTML_REPORT_FILE).render(
        summary=report.summary,
        headlines=_list_headlines(report.summary),
        instance_rows=_INSTANCE_ROWS,
        instance_columns=_INSTANCE_COLUMNS,
        class_titles=[_CLASS_TITLES[key] for key in class_keys],
        class_groups=_group_classes(report.classes, class_keys),
        gallery=[(rank, items) for rank, items in by_rank if items],
        clusters=sorted(report.clusters, key=lambda each: (-each.support, each.cluster)),
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
    metrics: Sequence[ImageMetrics], predictor: Predictor, dataset: GroundTruthDataset, mapping: CrossFittedMapping
) -> list[GalleryItem]:
    """Draw example images; runs the predictor on them again, since results keep no pixel arrays."""
    examples = pick_examples([each.quality for each in metrics])
    return [
        _draw_example(
            dataset.images[position], rank, metrics[position], predictor, dataset, mapping.for_image(position)
        )
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
    ground_truth = _map_ground_truth(labels, decoded.height, decoded.width)
    prediction = _map_prediction(predictor.predict(decoded.image, hash_photo(image)), dataset, mapping)
    present = sorted({index for each in (ground_truth, prediction) for index in each.categories.values()})
    names = {-1: "no category", **dict(enumerate(dataset.taxonomy.names))}
    return GalleryItem(
        rank=rank,
        metrics=metrics,
        image=_encode_jpeg(decoded.image),
        ground_truth=_encode_jpeg(_draw_categories(decoded.image, ground_truth, dataset)),
        prediction=_encode_jpeg(_draw_categories(decoded.image, prediction, dataset)),
        legend=tuple(LegendEntry(name=names[index], rgb=category_rgb(index)) for index in present),
    )


def _map_ground_truth(labels: GroundTruthLabels, height: int, width: int) -> _CategoryMap:
    if labels.label_map is not None:
        return _CategoryMap(label_map=labels.label_map, categories=labels.segments)
    label_map = np.zeros((height, width), np.int32)
    for number, labeled in enumerate(labels.objects, start=1):
        if labeled.rle is not None:
            label_map[coco.decode(labeled.rle).astype(bool)] = number
        else:
            _draw_box(label_map, labeled.bbox, number)
    categories = {number: labeled.category for number, labeled in enumerate(labels.objects, start=1)}
    return _CategoryMap(label_map=label_map, categories=categories)


def _map_prediction(prediction: ImagePrediction, dataset: GroundTruthDataset, mapping: ClassMapping) -> _CategoryMap:
    if dataset.kind in ("panoptic", "semantic"):
        is_panoptic = dataset.kind == "panoptic"
        cluster_map = prediction.panoptic if is_panoptic else prediction.semantic
        table = mapping.panoptic if is_panoptic else mapping.semantic
        clusters = np.array(list(cluster_map.clusters.values()), np.int64)
        found = mapping.categorize(clusters, cluster_map.embeddings, table)
        categories = dict(zip(cluster_map.clusters, found.tolist(), strict=True))
        return _CategoryMap(label_map=cluster_map.label_map, categories=categories)
    label_map = np.zeros_like(prediction.panoptic.label_map)
    kept = [detection for detection in prediction.detections if detection.score >= _MIN_DRAWN_SCORE]
    for number, detection in reversed(list(enumerate(kept, start=1))):
        if dataset.kind == "boxes":
            _draw_box(label_map, detection.rle.bbox, number)
        else:
            label_map[decode_rle(detection.rle)] = number
    categories = {number: int(mapping.panoptic[detection.cluster]) for number, detection in enumerate(kept, start=1)}
    return _CategoryMap(label_map=label_map, categories=categories)


def _draw_categories(
    image: UInt8[np.ndarray, "H W 3"], category_map: _CategoryMap, dataset: GroundTruthDataset
) -> UInt8[np.ndarray, "H W 3"]:
    """Blend the color of each category over the image, things more strongly, with a line between segments."""
    positions = ids_to_positions(category_map.label_map, category_map.categories)
    categories = list(category_map.categories.values())
    colors = np.array([(0, 0, 0), *(category_rgb(index) for index in categories)], np.float32)
    opacities = [0.0, *(0.62 if dataset.taxonomy.is_thing(index) else 0.4 for index in categories)]
    drawn = image + np.array(opacities, np.float32)[positions][..., None] * (colors[positions] - image)
    drawn[:, 1:][positions[:, 1:] != positions[:, :-1]] = _BORDER_RGB
    drawn[1:][positions[1:] != positions[:-1]] = _BORDER_RGB
    rounded: UInt8[np.ndarray, "H W 3"] = drawn.round().astype(np.uint8)
    return rounded


def _draw_box(label_map: Int32[np.ndarray, "H W"], bbox: Sequence[float], number: int) -> None:
    left, top, width, height = (round(each) for each in bbox)
    window = label_map[max(top, 0) : top + height, max(left, 0) : left + width]
    for edge in (window[:_BOX_PX], window[-_BOX_PX:], window[:, :_BOX_PX], window[:, -_BOX_PX:]):
        edge[:] = number


def category_rgb(index: int) -> tuple[int, int, int]:
    """Return the color of a category index, gray for -1; neighboring indices differ much in hue."""
    return _UNMAPPED_RGB if index < 0 else segment_color(index + 1, is_thing=True)


def _encode_jpeg(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encode a small version of the image."""
    preview = Image.fromarray(image)
    preview.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX))
    stream = io.BytesIO()
    preview.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()
