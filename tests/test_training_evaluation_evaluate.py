"""Predictors, evaluation of whole datasets, and paired comparison of two predictors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_predictor import (
    CAR,
    CAT,
    SKY,
    WALL,
    draw_dataset,
    predict_scenes,
)

from model.errors import ConfigError, DatasetError
from model.images import read_image
from training.data.dataset import PseudoLabelDataset, read_label_map
from training.evaluation.class_mapping import ClassMappingConfig
from training.evaluation.cluster_matching import (
    MatchingConfig,
    MatchingMethod,
)
from training.evaluation.dataset_metrics import compare_predictors
from training.evaluation.datasets.ground_truth import AnnotationKind, GroundTruthDataset, GroundTruthLabels
from training.evaluation.evaluate import evaluate, fit_mapping
from training.evaluation.predictors import load_predictor

CORRECT = [(1, 3), (1, 3), (2, 4), (2, 4)]
"""One cluster for each category of the dataset."""
CROSS_FIT = ClassMappingConfig()
FIT_ON_ALL = ClassMappingConfig(allow_overlap=True)


@pytest.fixture
def dataset(tmp_path: Path) -> GroundTruthDataset:
    """Four images; each category is in both halves."""
    return draw_dataset(tmp_path / "set", [(CAT, WALL), (CAT, WALL), (CAR, SKY), (CAR, SKY)])


def test_a_run_and_the_artifact_exported_from_it_predict_the_same(
    tiny_run: Path, tiny_artifact: Path, tiny_photos: Path
) -> None:
    run, artifact = load_predictor(tiny_run, threads=1), load_predictor(tiny_artifact, threads=1)
    assert (run.thing_clusters, run.stuff_clusters) == (artifact.thing_clusters, artifact.stuff_clusters) == (3, 4)
    assert run.digest != artifact.digest
    image = read_image(tiny_photos / "3.png").image
    first, second = run.predict(image, ""), artifact.predict(image, "")
    assert first.semantic.label_map.shape == second.semantic.label_map.shape == image.shape[:2]
    # Export changes the thresholds, which the best detection exceeds, and stores the weights in fp16.
    assert first.detections[0].score == pytest.approx(second.detections[0].score, abs=1e-2)
    assert first.detections[0].cluster == second.detections[0].cluster


def test_pseudo_labels_are_predicted_with_their_complete_masks(tiny_store: PseudoLabelDataset, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_store.folder, tmp_path / "labels"))
    photo = tiny_store.read_photos()[2]
    content = json.loads((folder / "instances.json").read_text())
    (number,) = (image["id"] for image in content["images"] if image["sha256"] == photo.digest)
    masks = [mask for mask in content["annotations"] if mask["image_id"] == number]
    content["annotations"] += [{**mask, "id": 1000 + index, "score": 0.25} for index, mask in enumerate(masks)]
    (folder / "instances.json").write_text(json.dumps(content))

    prediction = load_predictor(folder, threads=1).predict(read_image(photo.path).image, photo.digest)
    assert np.array_equal(prediction.panoptic.label_map, read_label_map(photo.label))
    assert prediction.panoptic.clusters == photo.categories
    assert masks
    scores = [mask["score"] for mask in masks]
    assert [each.score for each in prediction.detections] == scores + [0.25] * len(masks)
    assert [each.cluster for each in prediction.detections] == [mask["category_id"] for mask in masks] * 2
    counts = [mask["segmentation"]["counts"] for mask in masks]
    assert [each.rle.counts for each in prediction.detections] == counts * 2


def test_a_photo_without_pseudo_label_is_rejected(tiny_store: PseudoLabelDataset) -> None:
    predictor = load_predictor(tiny_store.folder, threads=1)
    with pytest.raises(DatasetError, match="has no label for the photo eeeeeeeeeeee"):
        predictor.predict(np.zeros((4, 4, 3), np.uint8), "e" * 64)


def test_a_folder_that_is_not_exactly_one_predictor_is_rejected(
    tmp_path: Path, tiny_run: Path, tiny_store: PseudoLabelDataset
) -> None:
    with pytest.raises(ConfigError, match=r"contains none of contract\.json, run\.json, label\.json"):
        load_predictor(tmp_path, threads=1)
    for file in (tiny_run / "run.json", tiny_store.folder / "label.json"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ConfigError, match=r"contains run\.json and label\.json"):
        load_predictor(tmp_path, threads=1)


def test_correct_predictions_score_100_whatever_the_cluster_numbers(dataset: GroundTruthDataset) -> None:
    report, mapping = evaluate(predict_scenes(dataset, CORRECT), dataset, CROSS_FIT)
    summary = report.summary
    for metrics in (summary.panoptic, summary.semantic, summary.semantic_merged_things):
        assert {(each.value, each.low, each.high) for each in metrics.values()} == {(100.0, 100.0, 100.0)}
    for instance in summary.instance.values():
        assert instance.headline["ap"].value == 100.0
    assert set(summary.instance) == {"agnostic_box", "agnostic_mask", "named_box", "named_mask"}
    assert not mapping.evaluated_on_fit_set
    assert "even images" in summary.matching.fitted_on


def test_an_image_is_not_evaluated_with_the_mapping_it_was_fitted_on(tmp_path: Path) -> None:
    scenes = [(CAT, WALL), (CAT, WALL), (CAR, SKY), (CAR, SKY), (CAT, WALL), (CAT, WALL)]
    dataset = draw_dataset(tmp_path / "set", scenes)
    # Cluster 5 occurs in image 1 only. The half of image 1 would map it, the other half, which is applied, cannot.
    predictor = predict_scenes(dataset, [(1, 5), (1, 3), (2, 4), (2, 4), (1, 3), (1, 3)])
    report, _ = evaluate(predictor, dataset, CROSS_FIT)
    assert report.summary.matching.unmatched_clusters == 1
    # Wall: three of four segments are matched, one is a false negative, and the unmapped segment a false positive.
    wall = next(each for each in report.classes if each.name == "wall")
    assert (wall.pq, wall.iou) == (75.0, 75.0)
    assert report.summary.panoptic["pq"].value == pytest.approx((3 + 3 / 4) / 4 * 100, abs=0.01)
    assert report.summary.panoptic["pq_ignore_unmapped"].value == pytest.approx((3 + 3 / 3.5) / 4 * 100, abs=0.01)
    assert report.summary.semantic["accuracy"].value == pytest.approx(100 * (9600 - 1200) / 9600, abs=0.01)
    assert report.summary.semantic["accuracy_ignore_unmapped"].value == 100.0


def test_a_mapping_fitted_on_one_dataset_is_applied_to_another(dataset: GroundTruthDataset, tmp_path: Path) -> None:
    mapping = fit_mapping(predict_scenes(dataset, CORRECT), dataset, MatchingConfig())
    other = draw_dataset(tmp_path / "other", [(CAR, SKY)], seed=90)
    report, _ = evaluate(predict_scenes(other, [(1, 4)]), other, ClassMappingConfig(mapping=mapping))
    assert "4 images of set" in report.summary.matching.fitted_on
    # The car is predicted as cluster 1, which the mapping calls an animal: the sky is correct and the car is not.
    assert report.summary.panoptic["pq_things"].value == 0.0
    assert report.summary.panoptic["pq_stuff"].value == 100.0


def test_evaluation_on_fitted_images_is_rejected_before_inference(dataset: GroundTruthDataset) -> None:
    predictor = predict_scenes(dataset, CORRECT)
    mapping = fit_mapping(predictor, dataset, MatchingConfig())
    predictor.calls = 0
    part = replace(dataset, images=dataset.images[1:3])
    with pytest.raises(ConfigError, match="fitted on 2 of the 2 images"):
        evaluate(predictor, part, ClassMappingConfig(mapping=mapping))
    assert predictor.calls == 0
    report, _ = evaluate(predictor, part, ClassMappingConfig(mapping=mapping, allow_overlap=True))
    assert report.summary.matching.evaluated_on_fit_set
    assert "2 of the evaluated images are among them" in report.summary.matching.fitted_on


def test_a_mapping_for_other_clusters_or_categories_is_rejected(dataset: GroundTruthDataset) -> None:
    predictor = predict_scenes(dataset, CORRECT)
    mapping = fit_mapping(predictor, dataset, MatchingConfig())
    with pytest.raises(ConfigError, match="for 7 thing and 3 stuff clusters, expected 2 and 3"):
        evaluate(predictor, dataset, ClassMappingConfig(mapping=replace(mapping, thing_clusters=7)))
    renamed = replace(dataset, taxonomy=replace(dataset.taxonomy, names=("animal", "vehicle", "sky")))
    with pytest.raises(ConfigError, match="4 categories, the dataset has 3"):
        evaluate(predictor, renamed, ClassMappingConfig(mapping=mapping))


@pytest.mark.parametrize("method", ["majority", "hungarian", "cups", "votes"])
def test_every_method_finds_the_obvious_mapping(dataset: GroundTruthDataset, method: MatchingMethod) -> None:
    config = ClassMappingConfig(matching=MatchingConfig(method=method))
    report, _ = evaluate(predict_scenes(dataset, CORRECT), dataset, config)
    assert report.summary.panoptic["pq"].value == 100.0
    assert report.summary.matching.method == method


def test_one_to_one_matching_leaves_the_second_cluster_of_a_category_unmatched(dataset: GroundTruthDataset) -> None:
    predictor = predict_scenes(dataset, [(1, 3), (1, 5), (2, 4), (2, 4)])
    one_to_one, many_to_one = (
        evaluate(predictor, dataset, replace(FIT_ON_ALL, matching=MatchingConfig(method=method)))[0].summary
        for method in ("hungarian", "cups")
    )
    assert (one_to_one.matching.unmatched_clusters, many_to_one.matching.unmatched_clusters) == (1, 0)
    assert one_to_one.panoptic["pq"].value < many_to_one.panoptic["pq"].value == 100.0


def test_cross_fitting_needs_two_images(dataset: GroundTruthDataset) -> None:
    predictor = predict_scenes(dataset, CORRECT)
    with pytest.raises(DatasetError, match="needs at least 2 images, the dataset has 1"):
        evaluate(predictor, replace(dataset, images=dataset.images[:1]), CROSS_FIT)


def test_each_image_has_a_quality_of_its_own(dataset: GroundTruthDataset) -> None:
    report, _ = evaluate(predict_scenes(dataset, [(1, 3), (1, 3), (2, 4), (1, 3)]), dataset, FIT_ON_ALL)
    assert [each.quality for each in report.images] == [100.0, 100.0, 100.0, 0.0]
    assert report.images[0].file == "1.png"


class ObjectsOnly:
    """The label of an image without its label map."""

    files = ()

    def __init__(self, image: object) -> None:
        self._annotation = image.annotation  # type: ignore[attr-defined]

    def read(self, height: int, width: int) -> GroundTruthLabels:
        return replace(self._annotation.read(height, width), label_map=None)


@pytest.mark.parametrize(("kind", "groups"), [("semantic", 0), ("masks", 4), ("boxes", 2)])
def test_a_dataset_gets_the_metrics_that_its_labels_allow(
    dataset: GroundTruthDataset, kind: AnnotationKind, groups: int
) -> None:
    limited = replace(dataset, kind=kind)
    if kind != "semantic":
        limited = replace(
            limited, images=tuple(replace(image, annotation=ObjectsOnly(image)) for image in dataset.images)
        )
    report, _ = evaluate(predict_scenes(dataset, CORRECT), limited, CROSS_FIT)
    assert report.summary.panoptic == {}
    assert len(report.summary.instance) == groups
    if kind == "semantic":
        assert report.summary.semantic["miou"].value == 100.0
    else:
        assert report.summary.semantic == {}
        assert report.summary.instance["named_box"].headline["ap"].value == 100.0
        assert {each.name: each.ap for each in report.classes if each.ap is not None} == {
            "animal": 100.0, "vehicle": 100.0,
        }  # fmt: skip


def test_a_predictor_does_not_differ_from_itself(dataset: GroundTruthDataset) -> None:
    correct = predict_scenes(dataset, CORRECT)
    differences = compare_predictors(correct, correct, dataset, MatchingConfig())
    assert set(differences) == {"PQ", "PQ things", "PQ stuff", "mIoU", "accuracy", "AP", "AP50", "AP75", "AR100"}
    for each in differences.values():
        assert (each.new, each.baseline) == (100.0, 100.0)
        assert (each.difference.value, each.difference.low, each.difference.high) == (0.0, 0.0, 0.0)


def test_the_difference_is_what_only_one_predictor_finds(dataset: GroundTruthDataset) -> None:
    # The baseline predicts stuff only, also where the things are.
    correct = predict_scenes(dataset, CORRECT)
    stuff_only = predict_scenes(dataset, [(3, 3), (3, 3), (4, 4), (4, 4)])
    differences = compare_predictors(correct, stuff_only, dataset, MatchingConfig())
    things = differences["PQ things"]
    assert (things.new, things.baseline, things.difference.value) == (100.0, 0.0, 100.0)
    assert differences["AP"].difference.low == 100.0
    assert differences["accuracy"].baseline == 75.0  # a thing covers a quarter of each image
    assert differences["PQ stuff"].baseline == 75.0  # three quarters of the predicted stuff is stuff


def test_the_interval_is_of_the_difference_and_not_of_the_metrics(dataset: GroundTruthDataset) -> None:
    # Both call the wall of the first image sky: each metric varies over resamples, the difference does not.
    wrong = predict_scenes(dataset, [(1, 4), (1, 3), (2, 4), (2, 4)])
    found = compare_predictors(wrong, wrong, dataset, MatchingConfig())["PQ"]
    assert found.new < 100.0
    assert (found.difference.low, found.difference.high) == (0.0, 0.0)
