"""Segmentation of many photos to files: names, ids, continuation, and outputs that are refused."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from tiny import make_contract

from model.contract import TASKS, SegmentFormat, Task
from model.errors import ConfigError
from model.export.segment import choose_format, list_inputs, segment_photos
from model.formats.image_files import decode_panoptic_png
from model.postprocessing.panoptic import Segment, Segmentation

CONTRACT = make_contract(2, 1, network="mask_transformer", stride_px=1)


class HalvesPredictor:
    """Segments each photo into its left and its right half."""

    def __init__(self) -> None:
        self.contract, self.detail, self.merge_clusters = CONTRACT, "standard", True
        self.count = 0

    def segment(self, image: np.ndarray, task: Task) -> Segmentation:
        assert task in TASKS
        self.count += 1
        label_map = np.ones(image.shape[:2], np.int32)
        label_map[:, image.shape[1] // 2 :] = 2
        segments = tuple(Segment(id=number, cluster=number, is_thing=True, score=0.5) for number in (1, 2))
        return Segmentation(label_map=label_map, segments=segments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos, a broken one and a text."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "a.jpg", "deep/c.png"):
        cv2.imwrite(str(folder / name), np.full((20, 30, 3), 100, np.uint8))
    (folder / "broken.jpg").write_bytes(b"broken")
    (folder / "notes.txt").touch()
    return folder


def run(folder: Path, out: Path, form: SegmentFormat) -> tuple[dict[str, Any], HalvesPredictor]:
    predictor: Any = HalvesPredictor()
    return segment_photos(predictor, list_inputs([folder], out)[0], out, form, "panoptic"), predictor


@pytest.mark.parametrize("form", ["coco-instances", "coco-polygons"])
def test_a_folder_becomes_one_coco_file_with_unique_ids(tmp_path: Path, folder: Path, form: SegmentFormat) -> None:
    out = tmp_path / "all.json"
    report, _ = run(folder, out, form)
    assert (report["photos"], report["segments"], list_inputs([folder], out)[1]) == (3, 6, {".txt": 1})
    assert [line.partition(":")[0] for line in report["skipped"]] == ["broken.jpg"]
    loaded = COCO(str(out))
    assert [image["file_name"] for image in loaded.imgs.values()] == ["a.jpg", "a.png", "deep/c.png"]
    assert sorted(loaded.anns) == [1, 2, 3, 4, 5, 6]
    for annotation in loaded.anns.values():
        assert loaded.annToMask(annotation).sum() == annotation["area"] == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "photos"]


def test_a_coco_panoptic_folder_has_a_png_for_each_photo(tmp_path: Path, folder: Path) -> None:
    run(folder, tmp_path / "out", "coco-panoptic")
    data = json.loads((tmp_path / "out" / "panoptic.json").read_bytes())
    assert [each["file_name"] for each in data["annotations"]] == ["a.jpg.png", "a.png.png", "deep/c.png.png"]
    assert [each["image_id"] for each in data["annotations"]] == [each["id"] for each in data["images"]]
    for annotation in data["annotations"]:
        label_map = decode_panoptic_png((tmp_path / "out" / "panoptic" / annotation["file_name"]).read_bytes())
        assert {each["id"]: each["area"] for each in annotation["segments_info"]} == {1: 300, 2: 300}
        assert np.unique(label_map).tolist() == [1, 2]


@pytest.mark.parametrize(("form", "suffix"), [("png", ".png"), ("overlay", ".overlay.jpg"), ("geojson", ".geojson")])
def test_an_interrupted_run_continues_and_changed_photos_are_segmented_again(
    tmp_path: Path, folder: Path, form: SegmentFormat, suffix: str
) -> None:
    out = tmp_path / "out"
    run(folder, out, form)
    journal = out / ".segment.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]) + lines[2][:10])  # killed while it wrote the second photo
    assert run(folder, out, form)[1].count == 2
    assert run(folder, out, form)[1].count == 0
    (out / f"a.png{suffix}").unlink()
    (folder / "deep" / "c.png").write_bytes((folder / "a.jpg").read_bytes())
    report, predictor = run(folder, out, form)
    assert (report["photos"], predictor.count) == (3, 2)
    assert (out / f"a.png{suffix}").is_file()
    with pytest.raises(ConfigError, match="of a run with another artifact, other names or other options"):
        run(folder, out, "coco-instances")


def test_the_format_follows_the_suffix_or_is_required(tmp_path: Path) -> None:
    formats = {name: choose_format(Path(name), None) for name in ("a.png", "a.JPG", "a.geojson", "a.json")}
    assert list(formats.values()) == ["png", "overlay", "geojson", "coco-instances"]
    assert choose_format(Path("a.txt"), "png") == "png"
    for name in ("a.txt", "folder"):
        with pytest.raises(ConfigError, match=r"no format has the suffix .*: give --format coco-panoptic"):
            choose_format(Path(name), None)


def test_an_output_never_replaces_an_input(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="is a photo to segment"):
        list_inputs([folder / "a.png"], folder / "deep" / ".." / "a.png")
    with pytest.raises(ConfigError, match="is inside"):
        list_inputs([folder], folder / "masks")
    with pytest.raises(ConfigError, match="must be a folder"):
        run(folder, tmp_path / "out.png", "png")
    (folder / "a.png").rename(folder / "a.jpg.png")
    predictor: Any = HalvesPredictor()
    files, _ = list_inputs([folder / "a.jpg", folder / "a.jpg.png"], folder)
    with pytest.raises(ConfigError, match=r"a\.jpg\.png is a photo to segment and would be overwritten"):
        segment_photos(predictor, files, folder, "png", "panoptic")
