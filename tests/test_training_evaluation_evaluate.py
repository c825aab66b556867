"""Predictors, evaluation of whole datasets, and paired comparison of two predictors."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fake_predictor import (
    CAR,
    CAT,
    SKY,
    WALL,
    FakePredictor,
    draw_dataset,
    draw_scene,
    evaluate,
    label_objects_only,
    predict_scenes,
)
from tiny import make_contract

from model.drift import build_histograms
from model.errors import ConfigError, DatasetError
from model.images import read_image
from model.postprocessing.panoptic import Segment, Segmentation, output_statistics
from training.data.dataset import PseudoLabelDataset, read_label_map
from training.data.executors import LocalExecutor, MultiprocessExecutor
from training.evaluation.class_mapping import ClassMappingConfig, fit_mapping
from training.evaluation.cluster_matching import MatchingConfig, MatchingMethod
from training.evaluation.dataset_metrics import compare_predictors
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import AnnotationKind, GroundTruthDataset, GroundTruthImage
from training.evaluation.evaluation_report import compute_report
from training.evaluation.image_results import EvaluationWorker, evaluate_all, evaluate_in_parallel, read_image_results
from training.evaluation.predictors import load_predictor
from training.evaluation.promotion_gate import (
    MIN_DRIFT_PHOTOS,
    GateCheck,
    PromotionThresholds,
    check_drift,
    check_scores,
    check_similarity,
    segmentation_covering,
)

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


def test_pseudo_labels_are_predicted_with_their_complete_masks(tiny_store: PseudoLabelDataset) -> None:
    photo = tiny_store.read_photos()[2]
    predictor = load_predictor(tiny_store.folder, threads=1)
    prediction = predictor.predict(read_image(photo.path).image, photo.digest)
    assert np.array_equal(prediction.panoptic.label_map, read_label_map(photo.label))
    assert prediction.panoptic.clusters == photo.categories
    masks = [
        (mask["category_id"], mask["score"], mask["segmentation"]["counts"])
        for mask in tiny_store.read_instances()[photo.digest]
    ]
    assert [(each.cluster, each.score, each.rle.counts) for each in prediction.detections] == masks != []
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
    report, _ = evaluate(predict_scenes(dataset, CORRECT), dataset, CROSS_FIT)
    summary = report.summary
    for metrics in (summary.panoptic, summary.semantic, summary.semantic_merged_things):
        assert {(each.value, each.low, each.high) for each in metrics.values()} == {(100.0, 100.0, 100.0)}
    for instance in summary.instance.values():
        assert instance.headline["ap"].value == 100.0
    assert set(summary.instance) == {"agnostic_box", "agnostic_mask", "named_box", "named_mask"}
    assert not summary.matching.evaluated_on_fit_set
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
    mapping = fit_mapping(predict_scenes(dataset, CORRECT), dataset, CROSS_FIT)
    other = draw_dataset(tmp_path / "other", [(CAR, SKY)], seed=90)
    report, _ = evaluate(predict_scenes(other, [(1, 4)]), other, ClassMappingConfig(mapping=mapping))
    assert "4 images of set" in report.summary.matching.fitted_on
    # The car is predicted as cluster 1, which the mapping calls an animal: the sky is correct and the car is not.
    assert report.summary.panoptic["pq_things"].value == 0.0
    assert report.summary.panoptic["pq_stuff"].value == 100.0


def test_evaluation_on_fitted_images_is_rejected_before_inference(dataset: GroundTruthDataset) -> None:
    predictor = predict_scenes(dataset, CORRECT)
    mapping = fit_mapping(predictor, dataset, CROSS_FIT)
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
    mapping = fit_mapping(predictor, dataset, CROSS_FIT)
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


def test_a_detection_inside_a_labeled_crowd_is_ignored(tmp_path: Path) -> None:
    draw_dataset(tmp_path, [(CAT, WALL), (CAT, WALL), (WALL, CAT), (WALL, CAT)])
    content = json.loads((tmp_path / "panoptic.json").read_text())
    for annotation in content["annotations"][2:]:
        annotation["segments_info"][0]["iscrowd"] = 1  # cats over three quarters; one of them is detected
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    dataset, square = DatasetSpec(folder=tmp_path).read(), draw_scene(1, 3)
    predictor = FakePredictor(dataset, [square] * 2 + [square[::-1, ::-1]] * 2, [0.5, 0.5, 0.9, 0.9])
    assert evaluate(predictor, dataset, FIT_ON_ALL)[0].summary.instance["agnostic_mask"].headline["ap"].value == 100.0


@pytest.mark.parametrize(("kind", "groups"), [("semantic", 0), ("masks", 4), ("boxes", 2)])
def test_a_dataset_gets_the_metrics_that_its_labels_allow(
    dataset: GroundTruthDataset, kind: AnnotationKind, groups: int
) -> None:
    limited = replace(dataset, kind=kind) if kind == "semantic" else label_objects_only(dataset, kind)
    report, _ = evaluate(predict_scenes(dataset, CORRECT), limited, CROSS_FIT)
    assert report.summary.panoptic == {}
    assert len(report.summary.instance) == groups
    if kind == "semantic":
        assert report.summary.semantic["miou"].value == 100.0
    else:
        assert report.summary.semantic == {}
        assert report.summary.instance["named_box"].headline["ap"].value == 100.0
        assert [each.ap for each in report.classes] == [100.0, 100.0, None, None]


def test_the_difference_is_what_only_one_predictor_finds(dataset: GroundTruthDataset) -> None:
    # The baseline predicts stuff only, also where the things are.
    correct = predict_scenes(dataset, CORRECT)
    stuff_only = predict_scenes(dataset, [(3, 3), (3, 3), (4, 4), (4, 4)])
    differences = compare_predictors(correct, stuff_only, dataset, CROSS_FIT)
    things = differences["PQ things"]
    assert (things.new, things.baseline, things.difference.value) == (100.0, 0.0, 100.0)
    assert differences["AP"].difference.low == 100.0
    assert differences["accuracy"].baseline == 75.0  # a thing covers a quarter of each image
    assert differences["PQ stuff"].baseline == 75.0  # three quarters of the predicted stuff is stuff


NUM_IMAGES = 70
"""Five groups."""


@pytest.fixture(scope="module")
def large_dataset(tmp_path_factory: pytest.TempPathFactory) -> GroundTruthDataset:
    return DatasetSpec(folder=tiny.draw_truth(tmp_path_factory.mktemp("drawn") / "set", NUM_IMAGES)).read()


def make_worker(predictor: Path, dataset: GroundTruthDataset, folder: Path) -> EvaluationWorker:
    dataset = replace(dataset, images=())
    return EvaluationWorker(predictor_folder=predictor, threads=1, dataset=dataset, results_folder=folder)


def test_image_results_are_read_from_their_files_as_they_were(
    tmp_path: Path, tiny_artifact: Path, large_dataset: GroundTruthDataset
) -> None:
    results = evaluate_all(load_predictor(tiny_artifact, threads=1), large_dataset)
    assert sum(len(each.detections) for each in results)
    worker = make_worker(tiny_artifact, large_dataset, tmp_path)
    stored = evaluate_in_parallel(worker, large_dataset.images, LocalExecutor())
    # pycocotools returns run lengths as bytes, JSON has them as text, and pycocotools reads both.
    assert [repr(each) for each in stored] == [repr(each).replace("'counts': b'", "'counts': '") for each in results]


def test_results_are_not_reused_for_another_predictor_or_a_changed_label(
    tmp_path: Path, tiny_artifact: Path, tiny_run: Path, large_dataset: GroundTruthDataset
) -> None:
    group = large_dataset.images[:3]

    def name(predictor: Path = tiny_artifact, images: Sequence[GroundTruthImage] = group, **changed: Any) -> Path:
        return make_worker(predictor, replace(large_dataset, **changed), tmp_path).result_path(images)

    path = name()
    assert path == name()
    assert path not in (name(tiny_run), name(images=large_dataset.images[1:4]), name(crop_px=8))
    label = group[1].annotation.files[0]
    stat = label.stat()
    os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert path != name()


def test_a_broken_file_of_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text("{")
    with pytest.raises(DatasetError, match=r"1\.json contains no image results"):
        read_image_results(tmp_path / "1.json")


@pytest.mark.slow
def test_processes_give_the_report_of_one(
    tmp_path: Path, tiny_artifact: Path, large_dataset: GroundTruthDataset
) -> None:
    predictor, config = load_predictor(tiny_artifact, threads=1), ClassMappingConfig()
    expected, _ = evaluate(predictor, large_dataset, config)
    results = evaluate_in_parallel(
        make_worker(tiny_artifact, large_dataset, tmp_path), large_dataset.images, MultiprocessExecutor(2, 1)
    )
    assert compute_report(results, predictor, large_dataset, config)[0] == expected


CONTRACT = make_contract(9, 0, 64, name="small", version="2", max_detections=1)
DEFAULT = PromotionThresholds()


def draw(*rows: list[int]) -> Segmentation:
    label_map = np.array(rows, np.uint8)
    ids = [int(each) for each in np.unique(label_map) if each]
    segments = tuple(Segment(id=each, cluster=1, is_thing=True, score=0.5) for each in ids)
    return Segmentation(label_map=label_map, segments=segments)


@pytest.mark.parametrize(
    ("first", "second", "covering"),
    [
        ([1, 1, 2, 2], [2, 2, 1, 1], 1.0),
        # the whole covers each half to 1/2, and is covered by each half to 1/2
        ([1, 1, 2, 2], [1, 1, 1, 1], 0.5),
        # of two halves, one is found and one is missing; the one that is found is right
        ([1, 1, 2, 2], [0, 0, 5, 5], (0.5 + 1.0) / 2),
        ([0, 0], [0, 0], 1.0),
        ([0, 0], [1, 1], 0.0),
    ],
)
def test_covering_is_the_mean_of_both_directions(first: list[int], second: list[int], covering: float) -> None:
    assert segmentation_covering(draw(first), draw(second)) == covering


def test_a_version_that_finds_little_is_rejected_with_the_values() -> None:
    pairs = [(draw([1, 2, 3, 4]), draw([1, 0, 0, 0]))]
    covering, segments, void = check_similarity(pairs, PromotionThresholds(min_covering=0.9))
    assert [each.is_passed for each in (covering, segments, void)] == [False, False, False]
    assert covering.reason == "segmentation covering is 0.62, minimum 0.9"
    assert segments.reason == "4.0 segments per photo became 1.0, maximum ratio 2"
    assert void.reason == "void fraction changed by +0.75, maximum 0.15"
    assert [each.is_passed for each in check_similarity(pairs, DEFAULT)] == [True, False, False]


def test_drift_is_checked_against_the_reference_of_the_version_on_enough_photos() -> None:
    same, other = draw([1, 2, 3, 0]), draw([1, 2, 3, 4])
    contract = replace(CONTRACT, drift_reference=dict(build_histograms([output_statistics(same)] * 9)))
    for segmentation, is_passed in ((same, True), (other, False)):
        checks = check_drift([segmentation] * MIN_DRIFT_PHOTOS, contract, DEFAULT)
        (void,) = (each for each in checks if each.name == "drift of void")
        assert (void.is_passed, void.value == 0.0) == (is_passed, is_passed)
        assert void.reason.endswith("maximum 0.25")
    with pytest.raises(ConfigError, match="needs at least 200 readable photos, got 199"):
        check_drift([same] * (MIN_DRIFT_PHOTOS - 1), contract, DEFAULT)
    with pytest.raises(ConfigError, match="small 2 has no drift reference"):
        check_drift([], CONTRACT, DEFAULT)


def compare(
    dataset: GroundTruthDataset, scenes: list[tuple[int, int]], thresholds: PromotionThresholds = DEFAULT
) -> dict[str, GateCheck]:
    checks = check_scores(predict_scenes(dataset, scenes), predict_scenes(dataset, CORRECT), dataset, thresholds)
    return {each.name: each for each in checks}


def test_renumbered_clusters_pass_and_lower_scores_are_rejected(dataset: GroundTruthDataset) -> None:
    # Clusters 1 and 2, 3 and 4 are exchanged: the mapping follows.
    assert compare(dataset, [(2, 4), (2, 4), (1, 3), (1, 3)])["PQ"].is_passed
    # No object is found any more: AP drops from 100 to 0.
    checks = compare(dataset, [(3, 3), (3, 3), (4, 4), (4, 4)])
    assert (checks["AP"].value, checks["AP"].is_passed, checks["PQ"].is_passed) == (-100.0, False, False)
    assert checks["AP"].reason == "AP differs by -100.00 (-100.00 to -100.00), minimum -1.00"


def test_a_difference_that_is_uncertain_is_rejected_with_a_hint(dataset: GroundTruthDataset) -> None:
    check = compare(dataset, [(1, 3), (3, 3), (2, 4), (2, 4)], PromotionThresholds(max_score_drop=60.0))["AP"]
    assert (check.value < -60.0, check.is_passed) == (True, False)
    assert check.reason.endswith(": 4 images are too few to be certain")
