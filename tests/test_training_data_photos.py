import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.errors import LabelStoreError
from training.data.photos import scan_photos


def draw(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((20, 30, 3), shade, np.uint8))


def test_photos_are_found_below_the_folder_sorted_and_once(tmp_path: Path) -> None:
    draw(tmp_path / "b.png", 10)
    draw(tmp_path / "deep" / "a.jpg", 20)
    draw(tmp_path / "copy_of_b.png", 10)
    (tmp_path / "notes.txt").write_text("no photo")
    scan = scan_photos(tmp_path)
    assert [photo.name for photo in scan.photos] == ["b.png", "deep/a.jpg"]
    assert (scan.photos[0].height, scan.photos[0].width) == (20, 30)
    assert scan.duplicates == 1


def test_a_broken_photo_is_reported_by_name_and_the_rest_is_kept(tmp_path: Path) -> None:
    draw(tmp_path / "good.png", 10)
    draw(tmp_path / "cut.png", 20)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:40])
    (tmp_path / "empty.jpg").touch()
    scan = scan_photos(tmp_path)
    assert [photo.name for photo in scan.photos] == ["good.png"]
    assert [line.split(":")[0] for line in scan.broken] == ["cut.png", "empty.jpg"]


def test_a_limit_takes_photos_evenly_spread(tmp_path: Path) -> None:
    for shade in range(10):
        draw(tmp_path / f"{shade}.png", shade)
    assert [photo.name for photo in scan_photos(tmp_path, limit=3).photos] == ["0.png", "3.png", "6.png"]


def test_a_folder_that_is_missing_or_holds_no_photo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelStoreError, match="is not a folder"):
        scan_photos(tmp_path / "nowhere")
    with pytest.raises(LabelStoreError, match="no photo that can be read"):
        scan_photos(tmp_path)


def test_a_memo_spares_photos_that_did_not_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memo, folder = tmp_path / "scan.json", tmp_path / "photos"
    for shade in (10, 20):
        draw(folder / f"{shade}.png", shade)
    first = scan_photos(folder, memo=memo)
    stamp = (folder / "10.png").stat()
    (folder / "10.png").write_bytes(b"x" * stamp.st_size)  # no photo any more, but nobody can see that
    os.utime(folder / "10.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert scan_photos(folder, memo=memo) == first
    (folder / "10.png").touch()
    assert [photo.name for photo in scan_photos(folder, memo=memo).photos] == ["20.png"]
    memo.write_text("{")
    assert [photo.name for photo in scan_photos(folder, memo=memo).photos] == ["20.png"]
    assert "scan.json cannot be read" in caplog.text
