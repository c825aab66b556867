from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.contract import InputSize
from model.errors import LabelStoreError
from model.images import plan_letterbox
from training.data.photos import PhotoFile
from training.pseudo_labels.codebook import ClusterStuffSegmenter, PrecomputedStuff
from training.pseudo_labels.photo_features import PhotoFeatures

LABELS = np.array([[0, 0, 2, 2], [0, 1, 2, 255]], np.uint8)


def make_view(name: str = "folder/photo.jpg", height: int = 2, width: int = 4) -> PhotoFeatures:
    """On a 56 px canvas of 14 px patches: a photo of 2 x 4 covers the upper half."""
    photo = PhotoFile(path=Path(name), name=name, digest="d", height=height, width=width)
    placement = plan_letterbox(height, width, [InputSize.square(56)], 4)
    return PhotoFeatures(photo=photo, letterbox=placement, maps=np.zeros((4, 4, 4, 8), np.float16))


def write_npy(path: Path, labels: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), labels)


def write_png(path: Path, labels: np.ndarray) -> None:
    Image.fromarray(labels.astype(np.uint8)).save(path.with_suffix(".png"))


@pytest.mark.parametrize("write", [write_npy, write_png])
def test_any_map_plugs_in_by_file(tmp_path: Path, write: Callable[[Path, np.ndarray], None]) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "photo", LABELS)
    source = PrecomputedStuff(folder=tmp_path, clusters=3)
    assert source.label_pixels(make_view()).tolist() == [[1, 1, 3, 3], [1, 2, 3, 0]]
    assert source.label_patches(make_view()).tolist() == [[1, 1, 3, 3], [1, 2, 3, 0]]


def test_minus_one_is_none(tmp_path: Path) -> None:
    write_npy(tmp_path / "photo", np.where(LABELS == 255, -1, LABELS.astype(np.int64)))
    source = PrecomputedStuff(folder=tmp_path, clusters=3)
    assert source.label_pixels(make_view("photo.jpg")).tolist() == [[1, 1, 3, 3], [1, 2, 3, 0]]


def test_a_map_that_does_not_fit_is_told_by_its_name(tmp_path: Path) -> None:
    source, view = PrecomputedStuff(folder=tmp_path, clusters=3), make_view("photo.jpg")

    def refuse(message: str) -> None:
        with pytest.raises(LabelStoreError, match=message):
            source.label_pixels(view)

    refuse(r"neither of photo\.npy and photo\.png for the photo photo\.jpg")
    write_npy(tmp_path / "photo", LABELS.T)
    refuse(r"photo\.npy is \(4, 2\), its photo \(2, 4\)")
    write_npy(tmp_path / "photo", LABELS + 1)
    refuse("clusters 0 to 3: of 3 stuff clusters, 0 to 2")
    write_npy(tmp_path / "photo", LABELS.astype(np.float32))
    refuse("expected whole numbers")
    (tmp_path / "photo.npy").write_bytes(b"\x93NUMPY cut")
    refuse(r"photo\.npy is no label map")
    write_png(tmp_path / "photo", LABELS)
    refuse("both of")
    (tmp_path / "photo.npy").unlink()
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    refuse(r"photo\.png is no label map")


def test_another_map_has_another_hash(tmp_path: Path) -> None:
    source, photo = PrecomputedStuff(folder=tmp_path, clusters=3), make_view("photo.jpg").photo
    write_npy(tmp_path / "photo", LABELS)
    first = source.hash_map(photo)
    write_npy(tmp_path / "photo", LABELS[::-1])
    assert source.hash_map(photo) != first


def test_a_patch_takes_the_centroid_it_is_most_similar_to_and_borders_run_between_patches() -> None:
    tokens = np.zeros((2, 4, 2), np.float32)
    tokens[:, :1, 0] = tokens[:, 1:, 1] = 1.0
    source = ClusterStuffSegmenter(embed=lambda view: tokens, centroids=np.eye(2, dtype=np.float32))
    view = make_view(height=28, width=56)
    assert source.label_patches(view).tolist() == [[1, 2, 2, 2], [1, 2, 2, 2]]
    labels = source.label_pixels(view)
    assert labels.shape == (28, 56)
    assert (labels[:, :13] == 1).all()
    assert (labels[:, 15:] == 2).all()
