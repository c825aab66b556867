import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.errors import DatasetError
from training.data.photos import scan_photos


def draw(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((20, 30, 3), shade, np.uint8))


def names(folder: Path, **options: object) -> list[str]:
    return [photo.name for photo in scan_photos(folder, **options).photos]  # type: ignore[arg-type]


def test_scan_finds_photos_in_subfolders_sorted_and_without_duplicates(tmp_path: Path) -> None:
    draw(tmp_path / "b.png", 10)
    draw(tmp_path / "deep" / "a.jpg", 20)
    draw(tmp_path / "copy_of_b.png", 10)
    for name in ("notes.txt", "film.mov", "film2.mov"):
        (tmp_path / name).write_text("not a photo")
    scan = scan_photos(tmp_path)
    assert [photo.name for photo in scan.photos] == ["b.png", "deep/a.jpg"]
    assert (scan.photos[0].height, scan.photos[0].width) == (20, 30)
    assert scan.duplicates == 1
    assert scan.other_files == {".mov": 2, ".txt": 1}


def test_unreadable_photos_are_reported_by_name_and_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "good.png", 10)
    draw(tmp_path / "cut.png", 20)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:40])
    (tmp_path / "empty.jpg").touch()
    scan = scan_photos(tmp_path)
    assert [photo.name for photo in scan.photos] == ["good.png"]
    assert [line.split(":")[0] for line in scan.skipped] == ["cut.png", "empty.jpg"]


def test_links_to_folders_are_followed_once_and_broken_links_are_reported(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    draw(folder / "a.png", 10)
    draw(elsewhere / "b.png", 20)
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
        draw(tmp_path / f"{shade}.png", shade)
    assert names(tmp_path, max_photos=3) == ["0.png", "3.png", "6.png"]


def test_a_missing_folder_and_a_folder_without_photos_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a folder"):
        scan_photos(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no readable photo"):
        scan_photos(tmp_path)


def test_the_scan_cache_skips_unchanged_photos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, folder = tmp_path / "scan.json", tmp_path / "photos"
    for shade in (10, 20):
        draw(folder / f"{shade}.png", shade)
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
