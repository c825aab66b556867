"""Keys of the encoder's last attention, the features that MaskCut was published on."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, UInt8
from PIL import Image
from torch import Tensor

from model.network.mask_transformer import normalise
from model.network.vit import Block, VisionTransformer
from model.pixels import read_photo
from training.features import FeatureCache, fill
from training.photos import PhotoFile
from training.progress import Progress


def open_key_cache(folder: Path, encoder_hash: str, side_px: int) -> FeatureCache:
    """The keys of this encoder file for photos stretched to a square of this side; one map a photo."""
    return FeatureCache(folder / f"{encoder_hash[:16]}-{side_px}-keys")


def fill_keys(cache: FeatureCache, photos: Sequence[PhotoFile], encoder: VisionTransformer, side_px: int) -> None:
    """Compute what the cache lacks, with progress; photos already in it are not read again."""
    with Progress("keys", len(photos), unit="photo") as progress:
        for count in fill(cache, photos, partial(read_stretched, side_px), partial(compute_keys, encoder)):
            progress.advance(count)


def read_stretched(side_px: int, photo: PhotoFile) -> UInt8[np.ndarray, "3 S S"]:
    """The photo on a square, as MaskCut takes it."""
    return stretch(read_photo(photo.path).image, side_px).transpose(2, 0, 1)


def stretch(image: UInt8[np.ndarray, "H W 3"], side_px: int) -> UInt8[np.ndarray, "S S 3"]:
    """The whole picture on a square, its aspect lost, as MaskCut takes it."""
    return np.asarray(Image.fromarray(image).resize((side_px, side_px), Image.Resampling.LANCZOS))


@torch.inference_mode()
def compute_keys(encoder: VisionTransformer, pixels: Tensor) -> Iterator[Float16[np.ndarray, "1 h w C"]]:
    """The keys of each picture of a uint8 batch [B 3 S S], all heads side by side."""
    grid, last = encoder.shape.grid, encoder.shape.depth - 1
    tokens = encoder(normalise(pixels), (last - 1,))[0]
    block = encoder.blocks[last]
    assert isinstance(block, Block)
    # queries, keys, values: B N 3C -> B N C
    keys = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[1]
    yield from keys.unflatten(1, (1, grid, grid)).half().numpy()
