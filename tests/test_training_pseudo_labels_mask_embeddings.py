from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch

from model.checkpoints.state_dicts import load_encoder
from model.contract import InputSize
from model.errors import ConfigError
from model.images import plan_letterbox
from model.networks.interface import normalize
from training.data.label_config import CodebookConfig
from training.data.photos import PhotoFile
from training.pseudo_labels.mask_embeddings import CropEmbedder, MaskedAveragePoolEmbedder
from training.pseudo_labels.photo_features import PhotoFeatures

CONFIG = CodebookConfig(encoder_hash="e", side_px=tiny.SIDE_PX, things="crop", crop_px=28)
UPPER_LEFT = np.zeros((4, 4), bool)
UPPER_LEFT[:2, :2] = True


def draw_view(folder: Path, *, surround: int = 10) -> PhotoFeatures:
    """A photo of 56 x 56 whose upper left quarter is orange, seen in a cache of zeros."""
    image = np.full((56, 56, 3), surround, np.uint8)
    image[:28, :28] = (0, 128, 255)  # OpenCV's order
    path = folder / f"{surround}.png"
    cv2.imwrite(str(path), image)
    photo = PhotoFile(path=path, name=path.name, digest=path.stem, height=56, width=56)
    placement = plan_letterbox(56, 56, [InputSize.square(tiny.SIDE_PX)], 4)
    return PhotoFeatures(photo=photo, letterbox=placement, maps=np.zeros((4, 4, 4, 64), np.float16))


def test_a_region_is_the_mean_of_its_whitened_patches_at_unit_length(tmp_path: Path) -> None:
    view = replace(draw_view(tmp_path), maps=np.random.default_rng(0).normal(size=(4, 4, 4, 64)).astype(np.float16))
    describer = MaskedAveragePoolEmbedder(mean=np.zeros(128, np.float32), projection=np.eye(128, 5, dtype=np.float32))
    (vector,) = describer.embed(view, UPPER_LEFT[None])
    patches = view.join()[:2, :2, :5].reshape(4, 5)
    mean = (patches / np.linalg.norm(patches, axis=1, keepdims=True)).mean(0)
    assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)  # single precision
    assert describer.embed(view, np.zeros((0, 4, 4), bool)).shape[0] == 0


def test_a_crop_is_the_encoder_s_token_for_the_object_on_white(tmp_path: Path, tiny_encoder: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), CONFIG.crop_px)
    describer = CropEmbedder(encoder, CONFIG, tmp_path / "vectors")
    view = draw_view(tmp_path)
    cv2.imwrite(str(view.photo.path), np.repeat(np.uint8([[[0, 128, 255]], [[10, 10, 10]]]), 28, 0).repeat(56, 1))
    upper = np.repeat([[True], [True], [False], [False]], 4, axis=1)
    (vector,) = describer.embed(view, upper[None])
    # The upper half, 28 x 56, is padded to 56 x 56 with white and shrunk to 28 x 28.
    picture = np.full((3, 28, 28), 255, np.uint8)
    picture[:, 7:21] = np.array([255, 128, 0])[:, None, None]
    with torch.inference_mode():
        patches = encoder.patch_embed(normalize(torch.from_numpy(picture[None])))
        tokens = torch.cat([encoder.cls_token, patches], 1) + encoder.pos_embed
        for block in encoder.blocks:
            tokens = block(tokens)
        expected = encoder.norm(tokens)[0, 0].numpy()
    assert vector == pytest.approx(expected, abs=1e-4)  # rounding through four blocks


def test_what_lies_around_counts_only_where_it_is_kept(tmp_path: Path, tiny_encoder: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), CONFIG.crop_px)
    mask = UPPER_LEFT.copy()
    mask[1, 1] = False  # an L: its box holds what is around it
    views = [draw_view(tmp_path, surround=shade) for shade in (10, 200)]
    for view in views:
        image = cv2.imread(str(view.photo.path))
        image[14:28, 14:28] = int(view.photo.digest)
        cv2.imwrite(str(view.photo.path), image)
    distances = []
    for background in ("white", "kept"):
        config = replace(CONFIG, crop_background=background)  # type: ignore[arg-type]
        describer = CropEmbedder(encoder, config, tmp_path / "vectors")
        one, other = (describer.embed(view, mask[None])[0] for view in views)
        distances.append(float(np.abs(one - other).max()))
    assert distances[0] < distances[1] / 3


def test_token_layer_and_length_are_options(tmp_path: Path, tiny_encoder: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), CONFIG.crop_px)
    view = draw_view(tmp_path)
    found = {}
    for name, change in {
        "class": {},
        "patch": {"crop_token": "patch"},
        "early": {"crop_layer": 1},
        "from the end": {"crop_layer": -3},
        "unit": {"crop_l2_normalize": True},
    }.items():
        describer = CropEmbedder(encoder, replace(CONFIG, **change), tmp_path / "vectors")  # type: ignore[arg-type]
        assert describer.is_spherical == (name == "unit")
        found[name] = describer.embed(view, UPPER_LEFT[None])[0]
    assert np.linalg.norm(found["unit"]) == pytest.approx(1.0, abs=1e-5)
    assert found["unit"] * np.linalg.norm(found["class"]) == pytest.approx(found["class"], abs=1e-5)
    assert (found["early"] == found["from the end"]).all()
    assert len({tuple(found[name]) for name in ("class", "patch", "early")}) == 3
    with pytest.raises(ConfigError, match=r"-4\.\.3, got 4"):
        CropEmbedder(encoder, replace(CONFIG, crop_layer=4), tmp_path)
