"""What a fitted decoder says of stored photos, from their cached features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, UInt8

from model.network.mask_transformer import MaskDecoder, Prediction, normalise
from model.pixels import read_photo
from training.features import FeatureCache
from training.fitting.transformer.frame import show_all
from training.labels.store import StoredPhoto

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A square as a decoder takes it."""

    maps: Float16[np.ndarray, "T g g C"]
    square: UInt8[np.ndarray, "3 S S"]


def open_sight(photo: StoredPhoto, cache: FeatureCache, side_px: int) -> Sight:
    """The whole photo."""
    picture = read_photo(photo.path)
    frame = show_all(picture.height, picture.width, side_px)
    return Sight(maps=frame.cut_maps(cache.read(photo.digest)), square=frame.cut_pixels(picture.image))


@torch.inference_mode()
def predict(decoder: MaskDecoder, sights: Sequence[Sight]) -> Prediction:
    """The decoder's word on each."""
    features = torch.stack([torch.from_numpy(each.maps).flatten(1, 2) for each in sights], dim=1).float()
    pixels = torch.from_numpy(np.stack([each.square for each in sights]))
    prediction: Prediction = decoder(features, normalise(pixels).contiguous(memory_format=torch.channels_last))
    return prediction


def walk(
    decoder: MaskDecoder, photos: Sequence[StoredPhoto], cache: FeatureCache
) -> Iterator[tuple[Sequence[StoredPhoto], Prediction]]:
    """Some photos after the others, and the decoder's word on them."""
    for start in range(0, len(photos), BATCH):
        some = photos[start : start + BATCH]
        yield some, predict(decoder, [open_sight(photo, cache, decoder.shape.side_px) for photo in some])
