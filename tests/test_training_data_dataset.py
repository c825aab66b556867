import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from pycocotools.coco import COCO

from model.errors import ConfigError, DatasetError
from model.formats.image_files import decode_panoptic_png
from training.data.dataset import PseudoLabelDataset
from training.data.panoptic_labels import (
    CHUNK_SIZE,
    ImageLabel,
    PanopticLabel,
    merge_panoptic,
    plan_chunks,
    remove_overlaps,
)
from training.data.photos import PhotoFile, scan_photos

LIMIT_S = 120


def make_photo(name: str) -> PhotoFile:
    return PhotoFile(path=Path(name), name=name, digest=f"digest of {name}", height=2, width=3)


def make_label(scores: list[float] | None = None) -> ImageLabel:
    """Two thing masks that overlap in one pixel, the second on top, and a row of stuff."""
    masks = np.array([[[1, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 0, 0]]], bool)
    label_map = np.array([[1, 2, 2], [5, 5, 5]], np.int32)
    panoptic = PanopticLabel(label_map=label_map, categories={1: 4, 2: 3, 5: 9})
    return ImageLabel(panoptic=panoptic, masks=masks, things=[4, 3], scores=scores)


def test_a_chunk_stores_merged_segments_and_whole_masks(tmp_path: Path) -> None:
    (chunk,) = plan_chunks([make_photo("a/b.jpg")], {})
    chunk.write(tmp_path, iter([make_label()]))
    (record,) = chunk.read(tmp_path)
    assert record.file_name == f"{chunk.name}/a/b.jpg.png"
    label_map = decode_panoptic_png((tmp_path / record.file_name).read_bytes())
    assert label_map.tolist() == [[1, 2, 2], [5, 5, 5]]
    assert [(each["id"], each["area"], each["bbox"]) for each in record.segments] == [
        (1, 1, [0, 0, 1, 1]),
        (2, 2, [1, 0, 2, 1]),
        (5, 3, [0, 1, 3, 1]),
    ]
    assert [(each["category_id"], each["area"]) for each in record.instances] == [(4, 2), (3, 2)]
    assert "score" not in record.instances[0]


def test_photos_that_moved_are_read_from_their_new_folder(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_photos: Path
) -> None:
    labels = Path(shutil.copytree(tiny_store.folder, tmp_path / "labels"))
    moved = Path(shutil.copytree(tiny_photos, tmp_path / "moved"))
    dataset = PseudoLabelDataset(labels, moved)
    assert {photo.path.parent for photo in dataset.read_photos()} == {moved}
    PseudoLabelDataset(labels).lock_config(dataset.read_config())  # as `useg label moved --out labels` does
    assert PseudoLabelDataset(labels).read_config().photos == str(moved)


def test_other_photos_are_rejected_by_name(tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_photos: Path) -> None:
    labels = PseudoLabelDataset(Path(shutil.copytree(tiny_store.folder, tmp_path / "labels")))
    scan = scan_photos(tiny_photos)
    first, second, *rest = scan.photos
    photos = [replace(first, digest="another"), *rest, make_photo("new.jpg")]
    expected = rf"1 added \(new.jpg\); 1 removed \({second.name}\); 1 changed \({first.name}\): .*--codebook"
    with pytest.raises(ConfigError, match=expected):
        labels.lock_config(replace(labels.read_config(), photos_hash="another"), photos)


def test_the_name_of_a_chunk_depends_on_photos_and_dependencies() -> None:
    photos = [make_photo(f"{index}.jpg") for index in range(CHUNK_SIZE + 1)]
    first, second = plan_chunks(photos, {"seed": 3})
    assert (len(first.photos), len(second.photos)) == (CHUNK_SIZE, 1)
    assert plan_chunks(photos, {"seed": 3}) == [first, second]
    assert plan_chunks(photos, {"seed": 4})[0].name != first.name
    swapped = plan_chunks([make_photo("other.jpg"), *photos[1:]], {"seed": 3})
    assert [swapped[0].name == first.name, swapped[1].name == second.name] == [False, True]


def test_a_chunk_whose_labeling_fails_is_absent(tmp_path: Path) -> None:
    (chunk,) = plan_chunks([make_photo("a.jpg"), make_photo("b.jpg")], {})
    with pytest.raises(ValueError, match="shorter"):
        chunk.write(tmp_path, iter([make_label()]))
    assert not chunk.is_complete(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DatasetError, match="not a valid chunk record"):
        list(chunk.read(tmp_path))


def test_pycocotools_reads_the_masks(tiny_store: PseudoLabelDataset) -> None:
    instances = COCO(tiny_store.folder / "instances.json")
    panoptic = json.loads((tiny_store.folder / "panoptic.json").read_text())
    assert instances.getImgIds() == [image["id"] for image in panoptic["images"]]
    assert instances.getCatIds() == [1, 2, 3]
    assert len(instances.anns) > 0
    for annotation in instances.anns.values():
        mask = instances.annToMask(annotation)
        image = instances.imgs[annotation["image_id"]]
        assert mask.shape == (image["height"], image["width"])
        assert annotation["area"] == mask.sum() > 0
        rows, columns = np.nonzero(mask)
        left, top, width, height = annotation["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["masks/*.npz", "panoptic/[0-9a-f]*/chunk.json"])
def test_a_killed_run_loses_at_most_one_chunk_and_the_next_run_finishes(
    tmp_path: Path, tiny_encoder: Path, moment: str
) -> None:
    photos = tiny.draw_photos(tmp_path / "photos", count=4 * CHUNK_SIZE)
    labels, whole = PseudoLabelDataset(tmp_path / "labels"), PseudoLabelDataset(tmp_path / "whole")
    command = [sys.executable, "-m", "model", "label", str(photos), "--encoder", str(tiny_encoder)]
    command += ["--side-px", "56", "--proposals", "maskcut", "--maskcut-n", "2", "--maskcut-tau", "0.6"]
    command += ["--stuff", "kmeans", "--pca-dim", "6"]
    command += ["--thing-clusters", "3", "--stuff-clusters", "4", "--features", str(tmp_path / "features")]
    subprocess.run([*command, "--out", whole.folder], check=True, capture_output=True, timeout=LIMIT_S)
    command += ["--out", str(labels.folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not any(labels.folder.glob(moment)):
            assert process.poll() is None
            time.sleep(0)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == -signal.SIGKILL
    survivors = {path: path.stat().st_mtime_ns for path in labels.folder.glob(moment)}
    assert not (labels.folder / "panoptic.json").exists()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 0, ended.stderr
    assert {path: path.stat().st_mtime_ns for path in survivors} == survivors
    assert {path.name for path in labels.chunks_dir.iterdir()} == {path.name for path in whole.chunks_dir.iterdir()}
    for name in ("panoptic.json", "instances.json"):
        assert (labels.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def draw(*boxes: tuple[slice, slice]) -> np.ndarray:
    masks = np.zeros((len(boxes), 10, 10), bool)
    for mask, box in zip(masks, boxes, strict=True):
        mask[box] = True
    return masks


def category_map(label: PanopticLabel) -> np.ndarray:
    return np.vectorize({0: 0, **label.categories}.get)(label.label_map)


def test_small_masks_are_painted_over_large_ones_in_any_order() -> None:
    masks = draw((slice(4, 6), slice(4, 6)), (slice(2, 8), slice(2, 8)))
    categories = category_map(merge_panoptic(masks, [3, 2], np.ones((10, 10), np.int32), thing_clusters=5))
    assert (categories[5, 5], categories[2, 2], categories[0, 0]) == (3, 2, 6)


def test_stuff_covered_by_more_than_70_percent_is_left_void() -> None:
    stuff = np.ones((10, 10), np.int32)
    stuff[:, 8:] = 2
    masks = draw((slice(0, 10), slice(0, 7)))  # covers 87.5 % of cluster 1, none of cluster 2
    categories = category_map(merge_panoptic(masks, [1], stuff, thing_clusters=5))
    assert (categories[:, 7] == 0).all()
    assert (categories[:, 8:] == 7).all()


def test_a_pixel_goes_to_the_first_mask_and_a_mask_that_loses_more_than_half_is_dropped() -> None:
    masks = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 1]]], bool)
    expected = [[[1, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]]]
    assert remove_overlaps(masks).astype(int).tolist() == expected
    assert remove_overlaps(masks[:0]).shape == (0, 1, 4)


def draw_photo(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((20, 30, 3), shade, np.uint8))


def names(folder: Path, **options: object) -> list[str]:
    return [photo.name for photo in scan_photos(folder, **options).photos]  # type: ignore[arg-type]


def test_scan_finds_photos_in_subfolders_sorted_and_without_duplicates(tmp_path: Path) -> None:
    draw_photo(tmp_path / "b.png", 10)
    draw_photo(tmp_path / "deep" / "a.jpg", 20)
    draw_photo(tmp_path / "copy_of_b.png", 10)
    for name in ("notes.txt", "film.mov", "film2.mov"):
        (tmp_path / name).write_text("not a photo")
    scan = scan_photos(tmp_path)
    assert [photo.name for photo in scan.photos] == ["b.png", "deep/a.jpg"]
    assert (scan.photos[0].height, scan.photos[0].width) == (20, 30)
    assert scan.duplicates == 1
    assert scan.other_files == {".mov": 2, ".txt": 1}


def test_unreadable_photos_are_reported_by_name_and_left_out(tmp_path: Path) -> None:
    draw_photo(tmp_path / "good.png", 10)
    draw_photo(tmp_path / "cut.png", 20)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:40])
    (tmp_path / "empty.jpg").touch()
    scan = scan_photos(tmp_path)
    assert [photo.name for photo in scan.photos] == ["good.png"]
    assert [line.split(":")[0] for line in scan.skipped] == ["cut.png", "empty.jpg"]


def test_links_to_folders_are_followed_once_and_broken_links_are_reported(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    draw_photo(folder / "a.png", 10)
    draw_photo(elsewhere / "b.png", 20)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.jpg")
    scan = scan_photos(folder)
    assert [photo.name for photo in scan.photos] == ["a.png", "linked/b.png"]
    assert [line.split(":")[0] for line in scan.skipped] == ["gone.jpg"]


def test_max_photos_takes_evenly_spread_photos(tmp_path: Path) -> None:
    for shade in range(10):
        draw_photo(tmp_path / f"{shade}.png", shade)
    assert names(tmp_path, max_photos=3) == ["0.png", "3.png", "6.png"]


def test_a_missing_folder_and_a_folder_without_photos_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a folder"):
        scan_photos(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no readable photo"):
        scan_photos(tmp_path)


def test_the_scan_cache_skips_unchanged_photos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, folder = tmp_path / "scan.json", tmp_path / "photos"
    for shade in (10, 20):
        draw_photo(folder / f"{shade}.png", shade)
    first = scan_photos(folder, cache_file=cache)
    stat = (folder / "10.png").stat()
    (folder / "10.png").write_bytes(b"x" * stat.st_size)  # damaged, but with the same size and modification time
    os.utime(folder / "10.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert scan_photos(folder, cache_file=cache) == first
    (folder / "10.png").touch()
    assert names(folder, cache_file=cache) == ["20.png"]
    for damaged in ("{", '{"format_version": 1, "photos": {"20.png": [1, 2]}}'):
        cache.write_text(damaged)
        assert names(folder, cache_file=cache) == ["20.png"]
    assert "scan.json is unreadable" in caplog.text
