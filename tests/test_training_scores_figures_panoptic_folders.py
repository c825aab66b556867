import json
from pathlib import Path

import labelled_sets as drawn
import numpy as np
import pytest

from model.errors import LabelStoreError
from training.labels.store import read_label
from training.scores.figures.intervals import weigh
from training.scores.figures.panoptic_folders import IdReader, count_pairs, read_pairs, score_folders
from training.scores.figures.scores import score_panoptic


def lay_out(folder: Path, stored: Path, name: str) -> tuple[Path, Path]:
    """Links to golden files in the layout that COCO's server takes: a JSON beside a folder of its name."""
    folder.mkdir()
    paths = []
    for side in ("gt", "pred"):
        (folder / f"{side}.json").symlink_to(stored / name / f"{side}.json")
        (folder / side).symlink_to(stored / name / side)
        paths.append(folder / f"{side}.json")
    return paths[0], paths[1]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["synthetic", "coco"])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_folders_have_panopticapis_quality_in_any_number_of_processes(
    golden: Path, tmp_path: Path, name: str, processes: int
) -> None:
    pairs = read_pairs(*lay_out(tmp_path / "sets", golden / "panoptic_pq", name))
    counts = count_pairs(pairs, processes=processes)
    summed = weigh(counts, np.ones(len(counts.iou)))
    expected = json.loads((golden / "panoptic_pq" / name / "expected.json").read_text())
    for key, chosen in (("all", slice(None)), ("things", slice(0, pairs.things)), ("stuff", slice(pairs.things, None))):
        wanted = {figure: expected[key][figure] for figure in ("pq", "sq", "rq")}
        assert score_panoptic(summed, chosen) == pytest.approx(wanted, abs=1e-9)
    # Pictures stay in their order, whoever counted them.
    alone = count_pairs(pairs, processes=1)
    assert all(np.array_equal(vars(alone)[each], vars(counts)[each]) for each in vars(alone))


def draw_sides(folder: Path) -> tuple[Path, Path]:
    categories = [{"id": 1, "isthing": 1}, {"id": 9, "isthing": 0}]
    for side, plane in (("truth", drawn.quarter(70_000, 2, fill=0)), ("answer", drawn.quarter(5, 0, fill=0))):
        drawn.write_panoptic_png(folder / side / "a.png", plane)
        segments = [{"id": int(each), "category_id": 9 if each == 2 else 1} for each in np.unique(plane) if each]
        annotations = [{"image_id": 1, "file_name": "a.png", "segments_info": segments}]
        drawn.write_json(folder / f"{side}.json", {"categories": categories, "annotations": annotations})
    return folder / "truth.json", folder / "answer.json"


def test_one_found_and_one_missed_segment_are_half_the_quality(tmp_path: Path) -> None:
    figures = score_folders(*draw_sides(tmp_path), processes=1)
    assert {key: figures[key].value for key in ("pq", "pq_things", "pq_stuff")} == {
        "pq": 50.0, "pq_things": 100.0, "pq_stuff": 0.0,
    }  # fmt: skip


def test_ids_are_read_as_everywhere_else_and_into_the_same_memory(tmp_path: Path) -> None:
    planes = [drawn.quarter(16_777_215, 256, fill=65_535), drawn.quarter(1, 2)]
    reader = IdReader()
    for number, plane in enumerate(planes):
        drawn.write_panoptic_png(tmp_path / f"{number}.png", plane)
        assert reader.read(tmp_path / f"{number}.png").tolist() == plane.tolist()
        assert reader.read(tmp_path / f"{number}.png").dtype == read_label(tmp_path / f"{number}.png").dtype
    assert np.shares_memory(reader.read(tmp_path / "0.png"), reader.read(tmp_path / "1.png"))


def test_a_missing_or_broken_png_and_a_missing_answer_are_refused_by_name(tmp_path: Path) -> None:
    truth, answer = draw_sides(tmp_path)
    pairs = read_pairs(truth, answer)
    (tmp_path / "answer" / "a.png").write_bytes(b"cut")
    with pytest.raises(LabelStoreError, match=r"a\.png is no panoptic label"):
        count_pairs(pairs, processes=1)
    drawn.write_panoptic_png(tmp_path / "answer" / "a.png", np.ones((2, 2), int))
    with pytest.raises(LabelStoreError, match=r"a\.png has the shape \(2, 2\), its truth \(4, 6\)"):
        count_pairs(pairs, processes=1)
    answer.write_text(json.dumps({"annotations": []}))
    with pytest.raises(LabelStoreError, match="no pair in COCO's panoptic format"):
        read_pairs(truth, answer)
