"""Figures are the same whoever made the comparisons: one process, parts, several processes, or Ray as an actor dies."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from killer import lose_an_actor

from model.errors import LabelStoreError
from training.data.executors import JobShard, LocalExecutor, MultiprocessExecutor
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluate import EvaluationWorker, compute_report, evaluate, evaluate_images
from training.evaluation.image_results import evaluate_all
from training.evaluation.matching.class_mapping import MatchingConfig
from training.evaluation.predictors import load_predictor

PICTURES = 70
"""Five groups."""


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> GroundTruthDataset:
    return DatasetSpec(folder=tiny.draw_truth(tmp_path_factory.mktemp("drawn") / "truth", PICTURES)).read()


def open_examiner(source: Path, truth: GroundTruthDataset, folder: Path) -> EvaluationWorker:
    return EvaluationWorker(source=source, threads=1, truth=replace(truth, images=()), folder=folder)


def test_comparisons_come_back_from_their_files_as_they_were(
    tmp_path: Path, tiny_artifact: Path, truth: GroundTruthDataset
) -> None:
    source = load_predictor(tiny_artifact, threads=1)
    alone = evaluate_all(source, truth)
    assert sum(len(each.detections) for each in alone)
    stored = evaluate_images(open_examiner(tiny_artifact, truth, tmp_path), truth.images, LocalExecutor())
    # pycocotools writes run lengths as bytes, JSON holds them as text, and pycocotools reads either.
    assert [repr(each) for each in stored] == [repr(each).replace("'counts': b'", "'counts': '") for each in alone]
    assert [each.image_id for each in stored[1::2]] == [each.image_id for each in alone[1::2]]
    assert (len(stored), stored[-1].image_id) == (PICTURES, PICTURES)


def test_parts_in_any_order_leave_what_one_process_would_make(
    tmp_path: Path, tiny_artifact: Path, truth: GroundTruthDataset
) -> None:
    examiner = open_examiner(tiny_artifact, truth, tmp_path)
    counts = [len(evaluate_images(examiner, truth.images, LocalExecutor(), JobShard(i, 2))) for i in (1, 0)]
    assert counts == [32, 38]
    blind = open_examiner(tiny_artifact, truth, tmp_path)
    vars(blind)["opened"] = None  # nothing is left to ask
    whole = evaluate_images(blind, truth.images, LocalExecutor())
    assert [each.image_id for each in whole] == list(range(1, PICTURES + 1))


def test_another_source_or_a_changed_label_is_compared_anew(
    tmp_path: Path, tiny_artifact: Path, tiny_run: Path, truth: GroundTruthDataset
) -> None:
    group = truth.images[:3]
    place = open_examiner(tiny_artifact, truth, tmp_path).place(group)
    assert place == open_examiner(tiny_artifact, truth, tmp_path).place(group)
    assert place != open_examiner(tiny_run, truth, tmp_path).place(group)
    assert place != open_examiner(tiny_artifact, truth, tmp_path).place(truth.images[1:4])
    assert place != open_examiner(tiny_artifact, replace(truth, crop_px=8), tmp_path).place(group)
    label = group[1].annotation.files[0]
    stat = label.stat()
    os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert place != open_examiner(tiny_artifact, truth, tmp_path).place(group)


def test_one_file_of_comparisons_is_held_at_a_time(
    tmp_path: Path, tiny_artifact: Path, truth: GroundTruthDataset
) -> None:
    stored = evaluate_images(open_examiner(tiny_artifact, truth, tmp_path), truth.images, LocalExecutor())
    for each in stored.files[:2]:
        each.write_text("{")
    assert stored[33].image_id == 34
    with pytest.raises(LabelStoreError, match="holds no comparisons"):
        _ = stored[0]


@pytest.mark.slow
def test_processes_and_ray_give_the_same_report_though_an_actor_is_killed(
    tmp_path: Path, tiny_artifact: Path, truth: GroundTruthDataset
) -> None:
    source = load_predictor(tiny_artifact, threads=1)
    alone, _ = evaluate(source, truth, MatchingConfig())
    examiner = open_examiner(tiny_artifact, truth, tmp_path / "processes")
    comparisons = evaluate_images(examiner, truth.images, MultiprocessExecutor(2, 1))
    assert compute_report(comparisons, source, truth, MatchingConfig())[0] == alone
    examiner = open_examiner(tiny_artifact, truth, tmp_path / "ray")
    with lose_an_actor(examiner.folder, "*.json") as victims:
        from training.data.ray_executor import RayExecutor

        comparisons = evaluate_images(examiner, truth.images, RayExecutor(1))
    assert len(victims) == 1
    assert compute_report(comparisons, source, truth, MatchingConfig())[0] == alone
