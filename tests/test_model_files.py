"""Files and folders are replaced completely or not at all, without leftovers."""

import errno
import resource
import stat
from pathlib import Path
from typing import Any

import pytest

from model.files import append_text, atomic_directory, atomic_write, remove_temp_files


class PowerCutError(Exception):
    """Raised by a writer in the middle of its work."""


def write_half(path: Path) -> None:
    path.write_text("half of the")
    raise PowerCutError


def list_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_without_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "weights.bin"
    for content in ("old", "new"):
        with atomic_write(path) as temporary:
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list_names(path.parent) == ["weights.bin"]


each_writer = pytest.mark.parametrize("write", [atomic_write, atomic_directory])


@each_writer
def test_a_failing_writer_keeps_what_was_there_without_leftovers(tmp_path: Path, write: Any) -> None:
    def find_file(path: Path) -> Path:
        return path / "weights.bin" if path.is_dir() else path

    path = tmp_path / "artifact"
    with write(path) as temporary:
        find_file(temporary).write_text("old")
    with pytest.raises(PowerCutError), write(path) as temporary:
        write_half(find_file(temporary))
    assert find_file(path).read_text() == "old"
    assert list_names(tmp_path) == ["artifact"]


@each_writer
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),  # a write to an open file names no file
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_a_full_disk_is_reported_with_the_file(tmp_path: Path, write: Any, error: Exception) -> None:
    with pytest.raises(OSError, match=r"no space left on the disk.*weights\.bin"), write(tmp_path / "weights.bin"):
        raise error
    assert list_names(tmp_path) == []


def test_text_is_appended_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    append_text(path, "step\n")
    append_text(path, "é\n")
    assert path.read_text(encoding="utf-8") == "step\né\n"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # a write beyond is short, as on a full disk
    try:
        with pytest.raises(OSError, match=r"no space left on the disk.*losses\.csv"):
            append_text(path, "0.12345,0.12345,0.12345\n")
        with pytest.raises(OSError, match=r"no space left on the disk.*new\.csv"):
            append_text(tmp_path / "new.csv", "a header that is longer than that\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text(encoding="utf-8") == "step\né\n"
    assert list_names(tmp_path) == ["losses.csv"]


def test_only_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    kept = ("a[1].json", "a[1].json.lock", ".a1.json.x", "..a[1].json.x")
    for name in (*kept, ".a[1].json.k1l2m3n4", ".a[1].json.x"):
        (tmp_path / name).touch()
    remove_temp_files(tmp_path / "a[1].json")
    assert {each.name for each in tmp_path.iterdir()} == set(kept)


def test_a_directory_is_replaced_completely(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    for name in ("old.bin", "kept.bin"):
        path.mkdir(exist_ok=True)
        (path / name).write_text("old")
    with atomic_directory(path) as temporary:
        (temporary / "kept.bin").write_text("new")
        (temporary / "shards" / "0").mkdir(parents=True)
        (temporary / "shards" / "0" / "a.txt").write_text("nested")
        assert list_names(path) == ["kept.bin", "old.bin"]
    assert list_names(path) == ["kept.bin", "shards"]
    assert (path / "shards" / "0" / "a.txt").read_text() == "nested"
    assert (path / "kept.bin").read_text() == "new"
    assert list_names(tmp_path) == ["artifact"]
