"""Inputs that reproduce published systems: crops as mask embeddings, stuff maps of other programs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tokens import make_photo_features

from model.checkpoints.dino import load_encoder
from model.errors import ConfigError, LabelStoreError
from model.networks.interface import normalize
from training.data.features import PhotoFeatures
from training.data.label_config import ClusteringConfig
from training.pseudo_labels.crop_embedding import CropEmbedder
from training.pseudo_labels.maskcut import MaskProposals
from training.pseudo_labels.stuff_maps import PrecomputedStuff

CONFIG = ClusteringConfig(side_px=tiny.SIDE_PX, thing_embedding="crop", crop_px=28)
UPPER_LEFT = np.zeros((4, 4), bool)
UPPER_LEFT[:2, :2] = True
STUFF = np.array([[0, 0, 2, 2], [0, 1, 2, 255]], np.uint8)
NO_MASKS = MaskProposals(soft=np.zeros((0, 4, 4), np.float32), scores=np.zeros(0, np.float32))


def draw_photo(folder: Path, *, surround: int = 10) -> PhotoFeatures:
    """A photo of 56 x 56 whose upper left quarter is orange."""
    image = np.full((56, 56, 3), surround, np.uint8)
    image[:28, :28] = (0, 128, 255)  # BGR
    cv2.imwrite(str(folder / f"{surround}.png"), image)
    return make_photo_features(np.zeros((2, 4, 4, 64)), name=f"{surround}.png", folder=folder)


def test_a_crop_is_embedded_as_the_encoder_s_token_for_the_object_on_white(tmp_path: Path, tiny_encoder: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), CONFIG.crop_px)
    features = draw_photo(tmp_path)
    cv2.imwrite(str(features.photo.path), np.repeat(np.uint8([[[0, 128, 255]], [[10, 10, 10]]]), 28, 0).repeat(56, 1))
    upper = np.repeat([[True], [True], [False], [False]], 4, axis=1)
    (vector,) = CropEmbedder(encoder, CONFIG, tmp_path / "vectors").embed(features, upper[None])
    # The upper half, 28 x 56, is padded to 56 x 56 with white and resized to 28 x 28.
    crop = np.full((3, 28, 28), 255, np.uint8)
    crop[:, 7:21] = np.array([255, 128, 0])[:, None, None]
    with torch.inference_mode():
        patches = encoder.patch_embed(normalize(torch.from_numpy(crop[None])))
        tokens = torch.cat([encoder.cls_token, patches], 1) + encoder.pos_embed
        for block in encoder.blocks:
            tokens = block(tokens)
        expected = encoder.norm(tokens)[0, 0].numpy()
    assert vector == pytest.approx(expected, abs=1e-4)  # rounding through four blocks


def test_the_surroundings_matter_only_with_the_original_background(tmp_path: Path, tiny_encoder: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), CONFIG.crop_px)
    mask = UPPER_LEFT.copy()
    mask[1, 1] = False  # an L: its bounding box includes surroundings
    photos = [draw_photo(tmp_path, surround=shade) for shade in (10, 200)]
    for features in photos:
        image = cv2.imread(str(features.photo.path))
        image[14:28, 14:28] = int(features.photo.digest)
        cv2.imwrite(str(features.photo.path), image)
    distances = []
    for background in ("white", "original"):
        config = replace(CONFIG, crop_background=background)  # type: ignore[arg-type]
        embedder = CropEmbedder(encoder, config, tmp_path / "vectors")
        one, other = (embedder.embed(features, mask[None])[0] for features in photos)
        distances.append(float(np.abs(one - other).max()))
    assert distances[0] < distances[1] / 3


def test_crop_token_layer_and_normalization_are_options(tmp_path: Path, tiny_encoder: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), CONFIG.crop_px)
    features = draw_photo(tmp_path)
    found = {}
    for name, change in {
        "class": {},
        "patch": {"crop_token": "patch"},
        "early": {"crop_layer": 1},
        "from the end": {"crop_layer": -3},
        "unit": {"crop_l2_normalize": True},
    }.items():
        embedder = CropEmbedder(encoder, replace(CONFIG, **change), tmp_path / "vectors")  # type: ignore[arg-type]
        assert embedder.is_spherical == (name == "unit")
        found[name] = embedder.embed(features, UPPER_LEFT[None])[0]
    assert np.linalg.norm(found["unit"]) == pytest.approx(1.0, abs=1e-5)
    assert found["unit"] * np.linalg.norm(found["class"]) == pytest.approx(found["class"], abs=1e-5)
    assert (found["early"] == found["from the end"]).all()
    assert len({tuple(found[name]) for name in ("class", "patch", "early")}) == 3
    with pytest.raises(ConfigError, match=r"-4\.\.3, got 4"):
        CropEmbedder(encoder, replace(CONFIG, crop_layer=4), tmp_path)


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
        with pytest.raises(LabelStoreError, match=message):
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
