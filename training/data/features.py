"""Patch tokens of a frozen encoder, computed once per photo and kept on disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from model.contract import InputSize
from model.errors import LabelStoreError
from model.files import atomic_write
from model.images import letterbox_image, read_image
from model.networks.interface import normalize
from model.networks.mask_transformer import MASK_STRIDE_PX, intermediate_layers
from model.networks.vit import Block, VisionTransformer
from training.data.photos import PhotoFile
from training.progress import Progress

BATCH_SIZE = 8


@dataclass(frozen=True)
class FeatureCache:
    """One `.npy` a photo, fp16 [T h w C], under a folder named after encoder and input size."""

    folder: Path

    def path(self, digest: str) -> Path:
        return self.folder / f"{digest}.npy"

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def read(self, digest: str) -> Float16[np.ndarray, "T h w C"]:
        """A read-only view of the file. Raises LabelStoreError if it is missing or cut short."""
        try:
            maps: Float16[np.ndarray, "T h w C"] = np.load(self.path(digest), mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise LabelStoreError(
                f"no features for {digest[:12]}: {error}; give the --features of `useg-train label`, or run it again"
            ) from error
        return maps

    def write(self, digest: str, maps: Float16[np.ndarray, "T h w C"]) -> None:
        with atomic_write(self.path(digest)) as sibling, sibling.open("wb") as stream:
            np.save(stream, maps)


def open_cache(folder: Path, encoder_hash: str, side_px: int) -> FeatureCache:
    """The cache of this encoder file at this input size."""
    return FeatureCache(folder / f"{encoder_hash[:16]}-{side_px}")


def fill_cache(cache: FeatureCache, photos: Sequence[PhotoFile], encoder: VisionTransformer, side_px: int) -> None:
    """Compute what the cache lacks, with progress; photos already in it are not read again."""
    with Progress("features", len(photos), unit="photo") as progress:
        for count in fill_incrementally(
            cache, photos, partial(load_padded, side_px), partial(compute_features, encoder)
        ):
            progress.advance(count)


def fill_incrementally(
    cache: FeatureCache,
    photos: Sequence[PhotoFile],
    read: Callable[[PhotoFile], UInt8[np.ndarray, "3 S S"]],
    compute: Callable[[Tensor], Iterator[Float16[np.ndarray, "T h w C"]]],
) -> Iterator[int]:
    """Compute what the cache lacks, a few photos at a time; gives how many are done."""
    missing = [photo for photo in photos if not cache.has(photo.digest)]
    if len(missing) < len(photos):
        yield len(photos) - len(missing)
    for start in range(0, len(missing), BATCH_SIZE):
        batch = missing[start : start + BATCH_SIZE]
        pixels = torch.from_numpy(np.stack([read(photo) for photo in batch]))
        for photo, maps in zip(batch, compute(pixels), strict=True):
            cache.write(photo.digest, maps)
        yield len(batch)


def load_padded(side_px: int, photo: PhotoFile) -> UInt8[np.ndarray, "3 S S"]:
    """The photo laid on a square, as the network sees it."""
    return letterbox_image(read_image(photo.path).image, [InputSize.square(side_px)], MASK_STRIDE_PX)[0]


@torch.inference_mode()
def compute_features(encoder: VisionTransformer, pixels: Tensor) -> Iterator[Float16[np.ndarray, "T h w C"]]:
    """The tapped block maps of each picture of a uint8 batch [B 3 S S]."""
    grid = encoder.config.grid_size
    maps = encoder(normalize(pixels), intermediate_layers(encoder.config.depth))
    # T B N C -> B T h w C
    maps = maps.unflatten(2, (grid, grid)).transpose(0, 1)
    yield from maps.half().numpy()


def final_tokens(encoder: VisionTransformer, maps: Float16[np.ndarray, "T h w C"]) -> Float[np.ndarray, "h w C"]:
    """The encoder's output tokens: its last block after the final norm."""
    last = torch.from_numpy(np.asarray(maps[-1], dtype=np.float32))
    normed = functional.layer_norm(last, last.shape[-1:], encoder.norm.weight, encoder.norm.bias, encoder.norm.eps)
    return normed.numpy()


def open_key_cache(folder: Path, encoder_hash: str, side_px: int) -> FeatureCache:
    """The keys of this encoder file for photos stretched to a square of this side; one map a photo."""
    return FeatureCache(folder / f"{encoder_hash[:16]}-{side_px}-keys")


def fill_keys(cache: FeatureCache, photos: Sequence[PhotoFile], encoder: VisionTransformer, side_px: int) -> None:
    """Compute what the cache lacks, with progress; photos already in it are not read again."""
    with Progress("keys", len(photos), unit="photo") as progress:
        for count in fill_incrementally(
            cache, photos, partial(load_resized, side_px), partial(compute_key_features, encoder)
        ):
            progress.advance(count)


def load_resized(side_px: int, photo: PhotoFile) -> UInt8[np.ndarray, "3 S S"]:
    """The photo on a square, as MaskCut takes it."""
    return resize_to_square(read_image(photo.path).image, side_px).transpose(2, 0, 1)


def resize_to_square(image: UInt8[np.ndarray, "H W 3"], side_px: int) -> UInt8[np.ndarray, "S S 3"]:
    """The whole picture on a square, its aspect lost, as MaskCut takes it."""
    return np.asarray(Image.fromarray(image).resize((side_px, side_px), Image.Resampling.LANCZOS))


@torch.inference_mode()
def compute_key_features(encoder: VisionTransformer, pixels: Tensor) -> Iterator[Float16[np.ndarray, "1 h w C"]]:
    """The keys of each picture of a uint8 batch [B 3 S S], all heads side by side."""
    grid, last = encoder.config.grid_size, encoder.config.depth - 1
    tokens = encoder(normalize(pixels), (last - 1,))[0]
    block = encoder.blocks[last]
    assert isinstance(block, Block)
    # queries, keys, values: B N 3C -> B N C
    keys = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[1]
    yield from keys.unflatten(1, (1, grid, grid)).half().numpy()
