"""A file or directory is replaced whole or not at all, and nothing is left lying about."""

import stat
from pathlib import Path

import pytest

from model.files import atomic_directory, atomic_write, hash_file, remove_temp_files


class PowerCutError(Exception):
    """What a writer raises in the middle of its work."""


def write_half(path: Path) -> None:
    path.write_text("half of the n")
    raise PowerCutError


def list_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_takes_the_new_content_and_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_text("old")
    with atomic_write(path) as sibling:
        sibling.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list_names(tmp_path) == ["weights.bin"]


def test_a_failing_writer_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_text("old")
    with pytest.raises(PowerCutError), atomic_write(path) as sibling:
        write_half(sibling)
    assert path.read_text() == "old"
    assert list_names(tmp_path) == ["weights.bin"]


def test_a_failing_writer_creates_no_file(tmp_path: Path) -> None:
    with pytest.raises(PowerCutError), atomic_write(tmp_path / "new.bin") as sibling:
        write_half(sibling)
    assert list_names(tmp_path) == []


def test_a_writer_that_removes_its_file_fails_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(path) as sibling:
        sibling.unlink()
    assert path.read_text() == "old"


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    kept = ("a[1].json", "a[1].json.lock", ".a1.json.x", "..a[1].json.x")
    for name in (*kept, ".a[1].json.k1l2m3n4", ".a[1].json.x"):
        (tmp_path / name).touch()
    remove_temp_files(tmp_path / "a[1].json")
    assert {each.name for each in tmp_path.iterdir()} == set(kept)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "b" / "c.txt") as sibling:
        sibling.write_text("deep")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "deep"


def test_others_may_read_a_replaced_file_and_enter_a_replaced_directory(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as sibling:
        sibling.write_text("a")
    with atomic_directory(tmp_path / "folder"):
        pass
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    for name in ("old.bin", "kept.bin"):
        path.mkdir(exist_ok=True)
        (path / name).write_text("old")
    with atomic_directory(path) as sibling:
        (sibling / "kept.bin").write_text("new")
        assert list_names(path) == ["kept.bin", "old.bin"]
    assert list_names(path) == ["kept.bin"]
    assert (path / "kept.bin").read_text() == "new"
    assert list_names(tmp_path) == ["artifact"]


def test_a_failing_writer_leaves_the_old_directory_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "old.bin").write_text("old")
    with pytest.raises(PowerCutError), atomic_directory(path) as sibling:
        write_half(sibling / "new.bin")
    assert (path / "old.bin").read_text() == "old"
    assert list_names(tmp_path) == ["artifact"]


def test_a_directory_may_hold_directories(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "store") as sibling:
        (sibling / "shards" / "0").mkdir(parents=True)
        (sibling / "shards" / "0" / "a.txt").write_text("nested")
    assert (tmp_path / "store" / "shards" / "0" / "a.txt").read_text() == "nested"


def test_the_hash_of_abc_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    # FIPS 180-4, example 1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_file(tmp_path / "abc") == expected
