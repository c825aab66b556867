"""Runs a trained decoder on labeled photos with cached features."""

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

BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class DecoderInput:
    """The inputs of a decoder for one image."""

    features: Float16[np.ndarray, "T g g C"]
    pixels: UInt8[np.ndarray, "3 S S"]


def load_decoder_input(photo: LabeledPhoto, cache: FeatureCache, side_px: int) -> DecoderInput:
    """Load a whole photo and its features."""
    image = read_image(photo.path)
    view = full_view(image.height, image.width, side_px)
    return DecoderInput(features=view.crop_features(cache.read(photo.digest)), pixels=view.crop_image(image.image))


@torch.inference_mode()
def run_decoder(decoder: MaskDecoder, inputs: Sequence[DecoderInput]) -> DecoderOutput:
    """Run the decoder on a batch."""
    features = torch.stack([torch.from_numpy(each.features).flatten(1, 2) for each in inputs], dim=1).float()
    pixels = torch.from_numpy(np.stack([each.pixels for each in inputs]))
    output: DecoderOutput = decoder(features, normalize(pixels).contiguous(memory_format=torch.channels_last))
    return output


def predict_photos(
    decoder: MaskDecoder, photos: Sequence[LabeledPhoto], cache: FeatureCache
) -> Iterator[tuple[Sequence[LabeledPhoto], DecoderOutput]]:
    """Yield batches of photos with the decoder's output."""
    for start in range(0, len(photos), BATCH_SIZE):
        batch = photos[start : start + BATCH_SIZE]
        yield batch, run_decoder(decoder, [load_decoder_input(photo, cache, decoder.config.side_px) for photo in batch])
