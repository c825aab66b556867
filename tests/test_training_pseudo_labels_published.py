"""Stuff maps of other programs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokens import make_photo_features

from model.errors import DatasetError
from training.data.features import PhotoFeatures
from training.pseudo_labels.maskcut import MaskProposals
from training.pseudo_labels.stuff_maps import PrecomputedStuff

STUFF = np.array([[0, 0, 2, 2], [0, 1, 2, 255]], np.uint8)
NO_MASKS = MaskProposals(soft=np.zeros((0, 4, 4), np.float32), scores=np.zeros(0, np.float32))


def draw_small_photo(name: str = "photo.jpg") -> PhotoFeatures:
    """A photo of 2 x 4 px, which covers the upper half of the square input."""
    return make_photo_features(np.zeros((2, 4, 4, 8)), name=name, height=2, width=4)


def write_npy(path: Path, stuff: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), stuff)


def write_png(path: Path, stuff: np.ndarray) -> None:
    Image.fromarray(stuff.astype(np.uint8)).save(path.with_suffix(".png"))


@pytest.mark.parametrize("write", [write_npy, write_png])
def test_stuff_maps_are_read_from_npy_and_png(tmp_path: Path, write: Callable[[Path, np.ndarray], None]) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "photo", STUFF)
    stuff, features = PrecomputedStuff(folder=tmp_path, clusters=3), draw_small_photo("folder/photo.jpg")
    assert stuff.segment(features, NO_MASKS).tolist() == [[1, 1, 3, 3], [1, 2, 3, 0]]
    assert stuff.segment_patches(features, NO_MASKS).tolist() == [[1, 1, 3, 3], [1, 2, 3, 0]]


def test_minus_one_in_a_stuff_map_means_none(tmp_path: Path) -> None:
    write_npy(tmp_path / "photo", np.where(STUFF == 255, -1, STUFF.astype(np.int64)))
    stuff = PrecomputedStuff(folder=tmp_path, clusters=3)
    assert stuff.segment(draw_small_photo(), NO_MASKS).tolist() == [[1, 1, 3, 3], [1, 2, 3, 0]]


def test_a_stuff_map_that_does_not_fit_is_an_error_that_names_it(tmp_path: Path) -> None:
    stuff, features = PrecomputedStuff(folder=tmp_path, clusters=3), draw_small_photo()

    def expect_error(message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            stuff.segment(features, NO_MASKS)

    expect_error(r"neither of photo\.npy and photo\.png for the photo photo\.jpg")
    write_npy(tmp_path / "photo", STUFF.T)
    expect_error(r"photo\.npy has shape \(4, 2\), its photo \(2, 4\)")
    write_npy(tmp_path / "photo", STUFF + 1)
    expect_error("clusters 0 to 3: expected 0 to 2")
    write_npy(tmp_path / "photo", STUFF.astype(np.float32))
    expect_error("expected integers")
    (tmp_path / "photo.npy").write_bytes(b"\x93NUMPY cut")
    expect_error(r"photo\.npy is not a label map")
    write_png(tmp_path / "photo", STUFF)
    expect_error("both of")
    (tmp_path / "photo.npy").unlink()
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    expect_error(r"photo\.png is not a label map")


def test_the_hash_of_a_stuff_map_depends_on_its_content(tmp_path: Path) -> None:
    stuff, photo = PrecomputedStuff(folder=tmp_path, clusters=3), draw_small_photo().photo
    write_npy(tmp_path / "photo", STUFF)
    first = stuff.hash_map(photo)
    write_npy(tmp_path / "photo", STUFF[::-1])
    assert stuff.hash_map(photo) != first
