"""The HTML report: one file that a browser shows as it is."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_predictor import CAR, CAT, SKY, WALL, draw_dataset, evaluate, predict_scenes
from PIL import Image

from training.evaluation.class_mapping import ClassMappingConfig
from training.evaluation.evaluation_report import EvaluationReport
from training.evaluation.html_report import (
    GalleryItem,
    category_rgb,
    pick_examples,
    render_gallery,
    render_html_report,
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


def test_the_report_has_no_external_resources(rendered: Rendered, tmp_path: Path) -> None:
    write_html_report(*rendered, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="(.*?)"', html)
    assert len(addresses) == 3 * 4
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not any(word in html for word in ("<script", "http://", "https://", "@import", "url("))


def test_names_of_datasets_are_escaped(rendered: Rendered) -> None:
    html = render_html_report(*rendered)
    assert "<set>" not in html
    assert "&lt;set&gt; &amp; co" in html


def test_every_metric_of_the_summary_is_in_the_report(rendered: Rendered) -> None:
    summary = rendered[0].summary
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", render_html_report(*rendered), flags=re.DOTALL)
    for metrics in (summary.panoptic, summary.semantic, summary.semantic_merged_things):
        assert all(f"{each.value:.1f}" in text for each in metrics.values())
    for metrics in summary.instance.values():
        assert all(f"{each.value:.1f}" in text for each in metrics.headline.values())
    for name in ("animal", "vehicle", "wall", "sky", "neighbors", "1.png", "4.png"):
        assert name in text


def test_a_warning_says_that_the_mapping_was_fitted_on_the_evaluated_images(rendered: Rendered) -> None:
    report, gallery = rendered
    assert "Fitted on the evaluated images" in render_html_report(report, gallery)
    cross_fitted = replace(report.summary, matching=replace(report.summary.matching, evaluated_on_fit_set=False))
    html = render_html_report(replace(report, summary=cross_fitted), gallery)
    assert "Fitted on the evaluated images" not in html


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
