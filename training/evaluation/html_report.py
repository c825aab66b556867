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

from model.files import hash_file, replace_file
from model.formats.image_files import encode_jpeg, segment_color
from model.images import read_image
from training.evaluation.class_mapping import ClassMapping
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage
from training.evaluation.evaluation_report import ClassMetrics, EvaluationReport, ImageMetrics
from training.evaluation.predictors import ImagePrediction, Predictor
from training.pseudo_labels.visualize import draw_overlay

HTML_REPORT_FILE = "report.html"
EXAMPLES_PER_RANK = 3
_RANKS = ("Best", "Median", "Worst")
_UNMAPPED_RGB = (128, 128, 128)
_BOX_PX = 3
_MAX_SIDE_PX = 420
_CLASS_TITLES = {"pq": "PQ", "iou": "IoU", "ap": "AP"}


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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.ChainableUndefined,  # metrics that a dataset does not have
    )
    environment.filters["base64"] = lambda content: b64encode(content).decode("ascii")
    class_keys = [key for key in _CLASS_TITLES if any(getattr(each, key) is not None for each in report.classes)][:2]
    html = environment.get_template(HTML_REPORT_FILE).render(
        summary=report.summary,
        class_titles=[_CLASS_TITLES[key] for key in class_keys],
        classes=_rank_classes(report.classes, class_keys),
        gallery=gallery,
    )
    replace_file(folder / HTML_REPORT_FILE, html)


def _rank_classes(classes: Sequence[ClassMetrics], keys: list[str]) -> list[dict[str, Any]]:
    """Return the classes that occur, best first, with a color and the values of `keys`."""
    rows = [
        {
            "name": metrics.name,
            "is_thing": metrics.is_thing,
            "rgb": category_rgb(index),
            "values": [getattr(metrics, key) for key in keys],
        }
        for index, metrics in enumerate(classes)
        if any(getattr(metrics, key) is not None for key in keys)
    ]
    return sorted(rows, key=lambda row: (-(row["values"][0] or 0.0), row["name"]))


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
    names = {-1: "no category", **dict(enumerate(dataset.taxonomy.names))}
    gallery = []
    for position, rank in pick_examples([each.quality for each in metrics]).items():
        photo = dataset.images[position]
        image = read_image(photo.path).image
        ground_truth = _map_labels(photo, *image.shape[:2])
        prediction = _map_prediction(predictor.predict(image, hash_file(photo.path)), dataset, mappings[position])
        present = sorted({*ground_truth[1].values(), *prediction[1].values()})
        gallery.append(
            GalleryItem(
                rank=rank,
                metrics=metrics[position],
                image=_encode_jpeg(image),
                ground_truth=_draw(image, ground_truth, dataset.taxonomy.num_things),
                prediction=_draw(image, prediction, dataset.taxonomy.num_things),
                legend={names[index]: category_rgb(index) for index in present},
            )
        )
    return gallery


def _draw(image: UInt8[np.ndarray, "H W 3"], category_map: _CategoryMap, num_things: int) -> bytes:
    label_map, categories = category_map
    things = [segment for segment, index in categories.items() if 0 <= index < num_things]
    colors = {segment: category_rgb(index) for segment, index in categories.items()}
    return _encode_jpeg(draw_overlay(image, label_map, colors, things))


def _map_labels(image: GroundTruthImage, height: int, width: int) -> _CategoryMap:
    """Return the labeled segments; of objects that have only boxes, the borders."""
    labels = image.annotation.read(height, width).draw_segments(height, width)
    assert labels.label_map is not None
    categories = dict(labels.segments)
    for number, each in enumerate(labels.objects, start=1):
        if each.rle is None:
            cv2.rectangle(labels.label_map, [round(value) for value in each.bbox], number, _BOX_PX)
            categories[number] = each.category
    return labels.label_map, categories


def _map_prediction(prediction: ImagePrediction, dataset: GroundTruthDataset, mapping: ClassMapping) -> _CategoryMap:
    """Return the segments of the map that is evaluated; if only objects are labeled, the things of the panoptic map."""
    is_semantic = dataset.kind == "semantic"
    cluster_map = prediction.semantic if is_semantic else prediction.panoptic
    table = mapping.semantic if is_semantic else mapping.panoptic
    clusters = np.array(list(cluster_map.clusters.values()), np.int64)
    found = mapping.categorize(table, clusters, cluster_map.embeddings).tolist()
    has_stuff = dataset.kind in ("panoptic", "semantic")
    return cluster_map.label_map, {
        segment: category
        for (segment, cluster), category in zip(cluster_map.clusters.items(), found, strict=True)
        if has_stuff or cluster <= mapping.thing_clusters
    }


def category_rgb(index: int) -> tuple[int, int, int]:
    """Return the color of a category index, gray for -1; neighboring indices differ much in hue."""
    return _UNMAPPED_RGB if index < 0 else segment_color(index + 1, is_thing=True)


def _encode_jpeg(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encode a small version of the image."""
    scale = min(1.0, _MAX_SIDE_PX / max(image.shape))
    return encode_jpeg(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
