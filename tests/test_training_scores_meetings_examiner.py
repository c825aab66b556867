"""Figures are the same whoever made the comparisons: one process, parts, several processes, or Ray as an actor dies."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from killer import lose_an_actor

from model.errors import LabelStoreError
from training.engines import LocalEngine, Part
from training.process_engine import ProcessEngine
from training.scores.evaluate import evaluate, score
from training.scores.meetings.answers import open_source
from training.scores.meetings.comparison import compare_all
from training.scores.meetings.examiner import Examiner, examine
from training.scores.naming.naming import MatchPlan
from training.scores.sets.layouts import TruthSet
from training.scores.sets.truth import Truth

PICTURES = 70
"""Five groups."""


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return TruthSet(folder=tiny.draw_truth(tmp_path_factory.mktemp("drawn") / "truth", PICTURES)).read()


def open_examiner(source: Path, truth: Truth, folder: Path) -> Examiner:
    return Examiner(source=source, threads=1, truth=replace(truth, pictures=()), folder=folder)


def test_comparisons_come_back_from_their_files_as_they_were(tmp_path: Path, tiny_artifact: Path, truth: Truth) -> None:
    source = open_source(tiny_artifact, threads=1)
    alone = compare_all(source, truth)
    assert sum(len(each.detections) for each in alone)
    stored = examine(open_examiner(tiny_artifact, truth, tmp_path), truth.pictures, LocalEngine())
    # pycocotools writes run lengths as bytes, JSON holds them as text, and pycocotools reads either.
    assert [repr(each) for each in stored] == [repr(each).replace("'counts': b'", "'counts': '") for each in alone]
    assert [each.image_id for each in stored[1::2]] == [each.image_id for each in alone[1::2]]
    assert (len(stored), stored[-1].image_id) == (PICTURES, PICTURES)


def test_parts_in_any_order_leave_what_one_process_would_make(
    tmp_path: Path, tiny_artifact: Path, truth: Truth
) -> None:
    examiner = open_examiner(tiny_artifact, truth, tmp_path)
    counts = [len(examine(examiner, truth.pictures, LocalEngine(), Part(i, 2))) for i in (1, 0)]
    assert counts == [32, 38]
    blind = open_examiner(tiny_artifact, truth, tmp_path)
    vars(blind)["opened"] = None  # nothing is left to ask
    whole = examine(blind, truth.pictures, LocalEngine())
    assert [each.image_id for each in whole] == list(range(1, PICTURES + 1))


def test_another_source_or_a_changed_label_is_compared_anew(
    tmp_path: Path, tiny_artifact: Path, tiny_run: Path, truth: Truth
) -> None:
    group = truth.pictures[:3]
    place = open_examiner(tiny_artifact, truth, tmp_path).place(group)
    assert place == open_examiner(tiny_artifact, truth, tmp_path).place(group)
    assert place != open_examiner(tiny_run, truth, tmp_path).place(group)
    assert place != open_examiner(tiny_artifact, truth, tmp_path).place(truth.pictures[1:4])
    assert place != open_examiner(tiny_artifact, replace(truth, crop_px=8), tmp_path).place(group)
    label = group[1].annotation.files[0]
    stat = label.stat()
    os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert place != open_examiner(tiny_artifact, truth, tmp_path).place(group)


def test_one_file_of_comparisons_is_held_at_a_time(tmp_path: Path, tiny_artifact: Path, truth: Truth) -> None:
    stored = examine(open_examiner(tiny_artifact, truth, tmp_path), truth.pictures, LocalEngine())
    for each in stored.files[:2]:
        each.write_text("{")
    assert stored[33].image_id == 34
    with pytest.raises(LabelStoreError, match="holds no comparisons"):
        _ = stored[0]


@pytest.mark.slow
def test_processes_and_ray_give_the_same_report_though_an_actor_is_killed(
    tmp_path: Path, tiny_artifact: Path, truth: Truth
) -> None:
    source = open_source(tiny_artifact, threads=1)
    alone, _ = evaluate(source, truth, MatchPlan())
    examiner = open_examiner(tiny_artifact, truth, tmp_path / "processes")
    comparisons = examine(examiner, truth.pictures, ProcessEngine(2, 1))
    assert score(comparisons, source, truth, MatchPlan())[0] == alone
    examiner = open_examiner(tiny_artifact, truth, tmp_path / "ray")
    with lose_an_actor(examiner.folder, "*.json") as victims:
        from training.ray_engine import RayEngine

        comparisons = examine(examiner, truth.pictures, RayEngine(1))
    assert len(victims) == 1
    assert score(comparisons, source, truth, MatchPlan())[0] == alone
