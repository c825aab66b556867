"""What a fitted decoder says of stored photos, from their cached features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, UInt8

from model.images import read_image
from model.networks.interface import normalize
from model.networks.mask_transformer import DecoderOutput, MaskDecoder
from training.data.dataset import LabeledPhoto
from training.data.features import FeatureCache
from training.mask_transformer.crops import full_view

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class DecoderInput:
    """A square as a decoder takes it."""

    maps: Float16[np.ndarray, "T g g C"]
    square: UInt8[np.ndarray, "3 S S"]


def load_decoder_input(photo: LabeledPhoto, cache: FeatureCache, side_px: int) -> DecoderInput:
    """The whole photo."""
    picture = read_image(photo.path)
    frame = full_view(picture.height, picture.width, side_px)
    return DecoderInput(maps=frame.cut_maps(cache.read(photo.digest)), square=frame.cut_pixels(picture.image))


@torch.inference_mode()
def predict(decoder: MaskDecoder, sights: Sequence[DecoderInput]) -> DecoderOutput:
    """The decoder's word on each."""
    features = torch.stack([torch.from_numpy(each.maps).flatten(1, 2) for each in sights], dim=1).float()
    pixels = torch.from_numpy(np.stack([each.square for each in sights]))
    prediction: DecoderOutput = decoder(features, normalize(pixels).contiguous(memory_format=torch.channels_last))
    return prediction


def walk(
    decoder: MaskDecoder, photos: Sequence[LabeledPhoto], cache: FeatureCache
) -> Iterator[tuple[Sequence[LabeledPhoto], DecoderOutput]]:
    """Some photos after the others, and the decoder's word on them."""
    for start in range(0, len(photos), BATCH):
        some = photos[start : start + BATCH]
        yield some, predict(decoder, [load_decoder_input(photo, cache, decoder.config.side_px) for photo in some])
