"""The HTML report: one file that a browser shows as it is."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_predictor import CAR, CAT, SKY, WALL, draw_dataset, evaluate, label_objects_only, predict_scenes
from PIL import Image

from training.evaluation.class_mapping import ClassMappingConfig
from training.evaluation.datasets.ground_truth import AnnotationKind
from training.evaluation.evaluation_report import EvaluationReport
from training.evaluation.html_report import (
    GalleryItem,
    category_rgb,
    pick_examples,
    render_gallery,
    write_html_report,
)

Rendered = tuple[EvaluationReport, list[GalleryItem]]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    folder = tmp_path_factory.mktemp("drawn") / "<set> & co"
    dataset = draw_dataset(folder, [(CAT, WALL), (CAT, WALL), (CAR, SKY), (CAR, SKY)])
    predictor = predict_scenes(dataset, [(1, 3), (1, 3), (2, 4), (5, 3)])
    report, mappings = evaluate(predictor, dataset, ClassMappingConfig(allow_overlap=True))
    return report, render_gallery(report.images, predictor, dataset, mappings)


def render(report: EvaluationReport, gallery: list[GalleryItem], folder: Path) -> str:
    write_html_report(report, gallery, folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_report_has_no_external_resources_and_names_are_escaped(rendered: Rendered, tmp_path: Path) -> None:
    html = render(*rendered, tmp_path)
    addresses = re.findall(r'(?:src|href)="(.*?)"', html)
    assert len(addresses) == 3 * 4
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not any(word in html for word in ("<script", "http://", "https://", "@import", "url("))
    assert "<set>" not in html
    assert "&lt;set&gt; &amp; co" in html


def test_every_metric_of_the_summary_is_in_the_report(rendered: Rendered, tmp_path: Path) -> None:
    summary = rendered[0].summary
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", render(*rendered, tmp_path), flags=re.DOTALL)
    for metrics in (summary.panoptic, summary.semantic, summary.semantic_merged_things):
        assert all(f"{each.value:.1f}" in text for each in metrics.values())
    for metrics in summary.instance.values():
        assert all(f"{each.value:.1f}" in text for each in metrics.headline.values())
    for name in ("animal", "vehicle", "wall", "sky", "neighbors", "1.png", "4.png"):
        assert name in text


def test_a_warning_says_that_the_mapping_was_fitted_on_the_evaluated_images(rendered: Rendered, tmp_path: Path) -> None:
    report, gallery = rendered
    assert "Fitted on the evaluated images" in render(report, gallery, tmp_path)
    cross_fitted = replace(report.summary, matching=replace(report.summary.matching, evaluated_on_fit_set=False))
    html = render(replace(report, summary=cross_fitted), gallery, tmp_path)
    assert "Fitted on the evaluated images" not in html


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_labeled_objects_are_drawn_with_what_is_labeled(tmp_path: Path, kind: AnnotationKind) -> None:
    dataset = label_objects_only(draw_dataset(tmp_path, [(CAT, WALL)] * 2), kind)
    predictor = predict_scenes(dataset, [(1, 3)] * 2)
    report, mappings = evaluate(predictor, dataset, ClassMappingConfig())
    gallery = render_gallery(report.images, predictor, dataset, mappings)
    assert list(gallery[0].legend) == ["animal"]
    image, ground_truth, prediction = map(decode, (gallery[0].image, gallery[0].ground_truth, gallery[0].prediction))
    inside, outside = (slice(8, 12), slice(8, 12)), (slice(30, 36), slice(30, 36))
    for drawn in (ground_truth, prediction):
        assert drawn[outside].mean() < 0.5 * image[outside].mean()  # not labeled: dark
    assert (ground_truth[inside].mean() < 0.5 * image[inside].mean()) == (kind == "boxes")
    assert "AP" in render(report, gallery, tmp_path)


def test_best_median_and_worst_images_are_picked_once_each() -> None:
    assert pick_examples([float(each) for each in range(20)]) == {
        19: "Best", 18: "Best", 17: "Best", 11: "Median", 10: "Median", 9: "Median", 2: "Worst", 1: "Worst", 0: "Worst",
    }  # fmt: skip
    assert pick_examples([5.0, 9.0]) == {1: "Best", 0: "Best"}


def test_ground_truth_and_prediction_have_the_same_colors_and_gray_for_no_category(rendered: Rendered) -> None:
    _, gallery = rendered
    best, worst = gallery[0], gallery[-1]
    assert (best.metrics.quality, worst.metrics.quality) == (100.0, 0.0)
    ground_truth, prediction = (decode(each) for each in (best.ground_truth, best.prediction))
    # JPEG changes a color by a few steps.
    assert np.abs(ground_truth[5, 5] - prediction[5, 5]).max() < 12
    assert list(best.legend) == ["animal", "wall"]
    assert worst.metrics.file == "4.png"
    assert worst.legend["no category"] == category_rgb(-1) == (128, 128, 128)
    drawn = decode(worst.prediction)[2:18, 2:18].mean((0, 1))
    image = decode(worst.image)[2:18, 2:18].mean((0, 1))
    assert drawn == pytest.approx(0.55 * image + 0.45 * 128, abs=6)  # unmapped: 45 % gray over the image


def decode(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image).astype(float)
