from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from model.checkpoints.state_dicts import load_encoder
from model.contract import InputSize
from model.images import plan_letterbox
from model.networks.interface import normalize
from training.data.features import FeatureCache, compute_key_features, fill_keys, open_key_cache, resize_to_square
from training.data.photos import PhotoFile, scan_photos
from training.pseudo_labels.photo_features import PhotoFeatures


def test_keys_are_those_of_the_last_attention(tiny_encoder: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    pixels = tiny.draw_noise(2, tiny.SIDE_PX, tiny.SIDE_PX)
    heard = []
    hook = encoder.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, made: heard.append(made))
    with torch.inference_mode():
        encoder(normalize(pixels), (encoder.config.depth - 1,))
    hook.remove()
    width = encoder.config.embed_dim
    expected = heard[0][:, 1:, width : 2 * width].unflatten(1, (4, 4))  # without the class token
    keys = np.stack(list(compute_key_features(encoder, pixels)))
    assert keys.shape == (2, 1, 4, 4, width)
    assert keys[:, 0].astype(np.float32) == pytest.approx(expected.numpy(), abs=5e-3)  # half precision


def test_a_photo_is_stretched_whole() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 200
    square = resize_to_square(image, 56)
    assert square.shape == (56, 56, 3)
    assert (square[:, :24] == 0).all()
    assert (square[:, 32:] == 200).all()


def test_keys_that_are_there_are_not_computed_again(tmp_path: Path, tiny_encoder: Path, tiny_photos: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    photos = scan_photos(tiny_photos).photos
    cache: FeatureCache = open_key_cache(tmp_path, "0123456789abcdef" * 4, tiny.SIDE_PX)
    cache.write(photos[0].digest, np.zeros((1, 4, 4, 64), np.float16))
    fill_keys(cache, photos, encoder, tiny.SIDE_PX)
    assert not cache.read(photos[0].digest).any()
    assert all(cache.read(photo.digest).any() for photo in photos[1:])


def make_view() -> PhotoFeatures:
    """A photo of 28 by 56 px on a square of 56 px: two rows of four patches show it."""
    photo = PhotoFile(path=Path("a.png"), name="a.png", digest="a", height=28, width=56)
    placement = plan_letterbox(28, 56, [InputSize.square(56)], 4)
    return PhotoFeatures(photo=photo, letterbox=placement, maps=np.zeros((4, 4, 4, 1), np.float16))


def test_a_mask_covers_patches_by_half_and_a_small_one_the_patch_that_it_lies_on() -> None:
    large = np.zeros((28, 56), bool)
    large[:, :35] = True  # two patches and a half
    assert make_view().cover(large).tolist() == [[True, True, True, False]] * 2
    small = np.zeros((28, 56), bool)
    small[20:24, 44:47] = True
    assert np.argwhere(make_view().cover(small)).tolist() == [[1, 3]]
