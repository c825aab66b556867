import json
import shutil
from pathlib import Path

import pytest

from model.errors import LabelStoreError
from training.evaluate import evaluate
from training.truth import read_truth


def test_a_report_has_every_figure_inside_its_interval(tiny_artifact: Path, tiny_truth: Path) -> None:
    report = evaluate(tiny_artifact, tiny_truth, threads=1)
    assert report.pictures == 4
    assert set(report.panoptic) == {"pq", "sq", "rq", "pq_things", "pq_stuff"}
    assert set(report.semantic) == {"miou", "miou_stuff", "accuracy"}
    assert set(report.instance) == {"ap", "ap50", "ar100"}
    for figures in (report.panoptic, report.semantic, report.instance):
        for interval in figures.values():
            assert 0.0 <= interval.low <= interval.value <= interval.high <= 100.0


def test_categories_are_gathered_into_supercategories_things_first(tiny_truth: Path) -> None:
    truth = read_truth(tiny_truth)
    assert truth.names == ("animal", "wall")
    assert truth.things == 1
    assert truth.index == {17: 0, 171: 1}


def test_the_development_set_has_twelve_things_and_fifteen_stuff(shared: Path) -> None:
    truth = read_truth(shared / "coco_dev_panoptic")
    assert (len(truth.names), truth.things, len(truth.pictures)) == (27, 12, 100)


def test_a_set_without_its_pictures_is_refused_by_name(tmp_path: Path, tiny_truth: Path) -> None:
    content = json.loads((tiny_truth / "panoptic.json").read_text())
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(LabelStoreError, match=r"0\.png"):
        read_truth(tmp_path)


def test_a_truth_of_another_size_than_its_photo_is_refused_by_name(
    tmp_path: Path, tiny_artifact: Path, tiny_truth: Path
) -> None:
    folder = Path(shutil.copytree(tiny_truth, tmp_path / "set"))
    (folder / "panoptic" / "1.png").write_bytes((folder / "panoptic" / "0.png").read_bytes())
    with pytest.raises(LabelStoreError, match=r"1\.png has the shape"):
        evaluate(tiny_artifact, folder, threads=1)
    (folder / "panoptic" / "1.png").write_bytes(b"cut")
    with pytest.raises(LabelStoreError, match=r"1\.png is no panoptic label"):
        evaluate(tiny_artifact, folder, threads=1)


def test_one_picture_is_too_few_to_match_clusters_on_others(tmp_path: Path, tiny_truth: Path) -> None:
    folder = Path(shutil.copytree(tiny_truth, tmp_path / "set"))
    content = json.loads((folder / "panoptic.json").read_text())
    (folder / "panoptic.json").write_text(json.dumps({**content, "annotations": content["annotations"][:1]}))
    with pytest.raises(LabelStoreError, match="holds 1 pictures"):
        read_truth(folder)
