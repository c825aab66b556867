"""The report's page: one file that a browser shows as it is."""

import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_source import ToldSource, draw_scene, draw_set
from PIL import Image

from training.evaluation.evaluate import evaluate
from training.evaluation.evaluation_report import EvaluationReport
from training.evaluation.gallery import GalleryItem, category_rgb, pick_examples, render_gallery
from training.evaluation.html_report import render_html_report, write_html_report
from training.evaluation.matching.class_mapping import MatchingConfig

CAT, CAR, WALL, SKY = 17, 3, 171, 187


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationReport, list[GalleryItem]]:
    folder = tmp_path_factory.mktemp("drawn") / "<set> & co"
    truth = draw_set(folder, [draw_scene(CAT, WALL), draw_scene(CAT, WALL), draw_scene(CAR, SKY), draw_scene(CAR, SKY)])
    source = ToldSource(truth, [draw_scene(*each) for each in ((1, 3), (1, 3), (2, 4), (5, 3))])
    report, fit = evaluate(source, truth, MatchingConfig(is_same_set=True))
    return report, render_gallery(report.images, source, truth, fit)


class Reader(HTMLParser):
    """Collects text, open tags and addresses; fails on tags that do not close."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_needs_nothing_but_itself(made: tuple[EvaluationReport, list[GalleryItem]], tmp_path: Path) -> None:
    write_html_report(*made, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = read(html)
    assert reader.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in reader.addresses)
    assert not any(word in html for word in ("<script", "http://", "https://", "@import", "url("))


def test_names_from_outside_are_text_and_never_markup(made: tuple[EvaluationReport, list[GalleryItem]]) -> None:
    report, gallery = made
    assert "<set>" not in render_html_report(report, gallery)
    assert any("<set> & co" in each for each in read(render_html_report(report, gallery)).text)


def test_every_figure_of_the_summary_is_on_the_page(made: tuple[EvaluationReport, list[GalleryItem]]) -> None:
    report, gallery = made
    text = " ".join(read(render_html_report(report, gallery)).text)
    for figures in (report.summary.panoptic, report.summary.semantic, report.summary.semantic_things_as_one):
        assert all(f"{each.value:.1f}" in text for each in figures.values())
    for name in ("animal", "vehicle", "wall", "sky", "majority", "1.png", "4.png"):
        assert name in text


def test_a_fit_on_the_scored_set_is_said_at_the_top(made: tuple[EvaluationReport, list[GalleryItem]]) -> None:
    report, gallery = made
    assert "Fitted on what is scored" in render_html_report(report, gallery)
    honest = replace(report.summary, matching=replace(report.summary.matching, evaluated_on_fit_set=False))
    assert "Fitted on what is scored" not in render_html_report(replace(report, summary=honest), gallery)


def test_a_report_without_segments_or_objects_leaves_their_parts_out(
    made: tuple[EvaluationReport, list[GalleryItem]],
) -> None:
    report, _ = made
    html = render_html_report(replace(report, summary=replace(report.summary, panoptic={}, instance={})), [])
    read(html)
    assert "Panoptic quality" not in html
    assert "<h2>Objects</h2>" not in html
    assert "<h2>Semantic</h2>" in html


def test_best_median_and_worst_are_chosen_once_each() -> None:
    assert pick_examples([float(each) for each in range(20)]) == {
        19: "best", 18: "best", 17: "best", 11: "median", 10: "median", 9: "median", 2: "worst", 1: "worst", 0: "worst",
    }  # fmt: skip
    assert pick_examples([5.0, 9.0]) == {1: "best", 0: "best"}


def test_truth_and_answer_have_one_colour_a_category_and_grey_for_none(
    made: tuple[EvaluationReport, list[GalleryItem]],
) -> None:
    _, gallery = made
    best, worst = gallery[0], gallery[-1]
    assert best.figures.quality == 100.0
    truth, answer = (open_picture(each) for each in (best.truth, best.answer))
    # JPEG moves a colour by a few steps.
    assert np.abs(truth[5, 5] - answer[5, 5]).max() < 12
    assert [chip.name for chip in best.chips] == ["animal", "wall"]
    assert worst.figures.file == "4.png"
    assert {chip.name: chip.rgb for chip in worst.chips}["no category"] == category_rgb(-1) == (128, 128, 128)
    spread = open_picture(worst.answer)[2:18, 2:18].mean((0, 1))
    photo = open_picture(worst.photo)[2:18, 2:18].mean((0, 1))
    assert spread == pytest.approx(0.6 * photo + 0.4 * 128, abs=6)  # nameless: pale grey over the photo


def open_picture(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture).astype(float)
