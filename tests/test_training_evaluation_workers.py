"""Results of images in files: metrics do not depend on the processes that evaluate."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from model.errors import DatasetError
from training.data.executors import LocalExecutor, MultiprocessExecutor
from training.evaluation.class_mapping import ClassMappingConfig
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.datasets.ground_truth import GroundTruthDataset
from training.evaluation.evaluate import EvaluationWorker, compute_report, evaluate, evaluate_in_parallel
from training.evaluation.image_results import evaluate_all, read_image_results
from training.evaluation.predictors import load_predictor

NUM_IMAGES = 70
"""Five groups."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> GroundTruthDataset:
    return DatasetSpec(folder=tiny.draw_truth(tmp_path_factory.mktemp("drawn") / "set", NUM_IMAGES)).read()


def make_worker(predictor: Path, dataset: GroundTruthDataset, folder: Path) -> EvaluationWorker:
    return EvaluationWorker(
        predictor_folder=predictor, threads=1, dataset=replace(dataset, images=()), results_folder=folder
    )


def test_image_results_are_read_from_their_files_as_they_were(
    tmp_path: Path, tiny_artifact: Path, dataset: GroundTruthDataset
) -> None:
    results = evaluate_all(load_predictor(tiny_artifact, threads=1), dataset)
    assert sum(len(each.detections) for each in results)
    worker = make_worker(tiny_artifact, dataset, tmp_path)
    stored = evaluate_in_parallel(worker, dataset.images, LocalExecutor())
    # pycocotools returns run lengths as bytes, JSON has them as text, and pycocotools reads both.
    assert [repr(each) for each in stored] == [repr(each).replace("'counts': b'", "'counts': '") for each in results]


def test_results_are_not_reused_for_another_predictor_or_a_changed_label(
    tmp_path: Path, tiny_artifact: Path, tiny_run: Path, dataset: GroundTruthDataset
) -> None:
    group = dataset.images[:3]
    path = make_worker(tiny_artifact, dataset, tmp_path).result_path(group)
    assert path == make_worker(tiny_artifact, dataset, tmp_path).result_path(group)
    assert path != make_worker(tiny_run, dataset, tmp_path).result_path(group)
    assert path != make_worker(tiny_artifact, dataset, tmp_path).result_path(dataset.images[1:4])
    assert path != make_worker(tiny_artifact, replace(dataset, crop_px=8), tmp_path).result_path(group)
    label = group[1].annotation.files[0]
    stat = label.stat()
    os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert path != make_worker(tiny_artifact, dataset, tmp_path).result_path(group)


def test_a_broken_file_of_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text("{")
    with pytest.raises(DatasetError, match=r"1\.json contains no image results"):
        read_image_results(tmp_path / "1.json")


@pytest.mark.slow
def test_processes_give_the_report_of_one(tmp_path: Path, tiny_artifact: Path, dataset: GroundTruthDataset) -> None:
    predictor, config = load_predictor(tiny_artifact, threads=1), ClassMappingConfig()
    expected, _ = evaluate(predictor, dataset, config)
    results = evaluate_in_parallel(
        make_worker(tiny_artifact, dataset, tmp_path), dataset.images, MultiprocessExecutor(2, 1)
    )
    assert compute_report(results, predictor, dataset, config)[0] == expected
