"""Features of a frozen encoder: computed once per photo, cached on disk, loaded for one photo at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from model.contract import InputSize
from model.errors import ConfigError, DatasetError
from model.files import atomic_write
from model.images import Letterbox, letterbox_image, plan_letterbox, read_image
from model.networks.interface import normalize
from model.networks.mask_transformer import MASK_STRIDE_PX, intermediate_layers
from model.networks.vit import Block, VisionTransformer
from training.data.label_config import ClusteringConfig
from training.data.photos import PhotoFile

BATCH_SIZE = 8


@dataclass(frozen=True)
class FeatureCache:
    """One `.npy` file per photo, fp16 [T h w C], in a folder named after encoder and input size."""

    folder: Path

    def path(self, digest: str) -> Path:
        return self.folder / f"{digest}.npy"

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def read(self, digest: str) -> Float16[np.ndarray, "T h w C"]:
        """Return a read-only memory map. Raises DatasetError if the file is missing or truncated."""
        try:
            maps: Float16[np.ndarray, "T h w C"] = np.load(self.path(digest), mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise DatasetError(
                f"no features for {digest[:12]}: {error}; pass the --features of `useg label`, or run it again"
            ) from error
        return maps

    def write(self, digest: str, maps: Float16[np.ndarray, "T h w C"]) -> None:
        with atomic_write(self.path(digest)) as sibling, sibling.open("wb") as stream:
            np.save(stream, maps)


@dataclass(frozen=True, kw_only=True)
class PhotoFeatures:
    """Cached features of one photo and the part of the square input that shows it."""

    letterbox: Letterbox
    last_block: Float16[np.ndarray, "g g C"]
    """Output of the encoder's last block, before the final norm."""
    layers: tuple[Float16[np.ndarray, "g g C"], ...]
    """Outputs of the blocks that clustering uses."""
    norm: nn.LayerNorm
    """The encoder's final norm."""

    @property
    def patch_px(self) -> int:
        return self.letterbox.input_size.width_px // int(self.last_block.shape[1])

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches that show a part of the photo."""
        return count_patches(self.letterbox, int(self.last_block.shape[1]))

    def final_tokens(self) -> Float[np.ndarray, "h w C"]:
        """The encoder's output tokens: its last block after the final norm."""
        norm, last = self.norm, torch.from_numpy(np.asarray(self.last_block, dtype=np.float32))
        normed = functional.layer_norm(last, last.shape[-1:], norm.weight, norm.bias, norm.eps)
        return self._crop_padding(normed.numpy())

    def concat_layers(self) -> Float[np.ndarray, "h w E"]:
        """The layers side by side, each token of each layer normalized, so that no layer outweighs another."""
        blocks = torch.from_numpy(np.stack([np.asarray(layer, dtype=np.float32) for layer in self.layers]))
        normed = functional.layer_norm(blocks, blocks.shape[-1:])
        return self._crop_padding(normed.permute(1, 2, 0, 3).flatten(2).numpy())

    def _crop_padding(self, tokens: Float[np.ndarray, "g g C"]) -> Float[np.ndarray, "h w C"]:
        rows, columns = self.grid_size
        return tokens[:rows, :columns]


@dataclass(frozen=True)
class FeatureStore:
    """Computes and loads the features of photos under one encoder.

    The blocks that the mask decoder reads are always cached. Blocks that only clustering uses get a second cache, and
    so do the attention keys of MaskCut.
    """

    folder: Path
    encoder: VisionTransformer
    encoder_hash: str
    config: ClusteringConfig

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Blocks for clustering, counted from 0, ascending. Raises ConfigError if the encoder lacks one of them."""
        depth = self.encoder.config.depth
        if absent := [layer for layer in self.config.layers if not -depth <= layer < depth]:
            raise ConfigError(f"layers {absent} do not exist: the encoder has blocks 0 to {depth - 1}")
        return tuple(sorted({layer % depth for layer in self.config.layers}))

    def fill(self, photos: Sequence[PhotoFile], *, with_keys: bool = False) -> Iterator[int]:
        """Compute missing features a few photos at a time; yields how many photos are done."""
        side_px = self.config.side_px
        if with_keys:
            compute_keys = partial(compute_key_features, self.encoder)
            list(fill_incrementally(self.key_cache, photos, partial(load_resized, side_px), compute_keys))
        load = partial(load_padded, side_px)
        if self._layer_cache:
            compute_layers = partial(compute_block_features, self.encoder, self.layers)
            list(fill_incrementally(self._layer_cache, photos, load, compute_layers))
        compute = partial(compute_block_features, self.encoder, self._decoder_layers)
        yield from fill_incrementally(self.cache, photos, load, compute)

    def load(self, photo: PhotoFile) -> PhotoFeatures:
        """Raises DatasetError if the photo is not cached."""
        maps = self.cache.read(photo.digest)
        by_block = dict(zip(self._decoder_layers, maps, strict=True))
        if self._layer_cache:
            by_block = dict(zip(self.layers, self._layer_cache.read(photo.digest), strict=True))
        return PhotoFeatures(
            letterbox=plan_letterbox(
                photo.height, photo.width, [InputSize.square(self.config.side_px)], MASK_STRIDE_PX
            ),
            last_block=maps[-1],
            layers=tuple(by_block[block] for block in self.layers),
            norm=self.encoder.norm,
        )

    def load_keys(self, photo: PhotoFile) -> Float16[np.ndarray, "h w C"]:
        """Return the attention keys of the photo resized to a square. Raises DatasetError if it is not cached."""
        keys: Float16[np.ndarray, "h w C"] = np.asarray(self.key_cache.read(photo.digest)[0])
        return keys

    @cached_property
    def cache(self) -> FeatureCache:
        """The blocks that the mask decoder reads."""
        return open_cache(self.folder, self.encoder_hash, self.config.side_px)

    @cached_property
    def key_cache(self) -> FeatureCache:
        return FeatureCache(self.cache.folder.with_name(f"{self.cache.folder.name}-keys"))

    @cached_property
    def _decoder_layers(self) -> tuple[int, ...]:
        return intermediate_layers(self.encoder.config.depth)

    @cached_property
    def _layer_cache(self) -> FeatureCache | None:
        """The blocks for clustering; None if the mask decoder reads them, too."""
        if set(self.layers) <= set(self._decoder_layers):
            return None
        blocks = "-".join(map(str, self.layers))
        return FeatureCache(self.cache.folder.with_name(f"{self.cache.folder.name}-blocks-{blocks}"))


def count_patches(letterbox: Letterbox, grid: int) -> tuple[int, int]:
    """Return the rows and columns of patches that show a part of the photo, of `grid` along the input's side."""
    patch_px = letterbox.input_size.width_px // grid
    return -(-letterbox.resized_height // patch_px), -(-letterbox.resized_width // patch_px)


def open_cache(folder: Path, encoder_hash: str, side_px: int) -> FeatureCache:
    """Return the cache of the encoder file with that SHA-256 at that input size."""
    return FeatureCache(folder / f"{encoder_hash[:16]}-{side_px}")


def fill_incrementally(
    cache: FeatureCache,
    photos: Sequence[PhotoFile],
    load: Callable[[PhotoFile], UInt8[np.ndarray, "3 S S"]],
    compute: Callable[[Tensor], Float16[np.ndarray, "B T h w C"]],
) -> Iterator[int]:
    """Compute missing features a few photos at a time; yields how many photos are done."""
    missing = [photo for photo in photos if not cache.has(photo.digest)]
    if len(missing) < len(photos):
        yield len(photos) - len(missing)
    for start in range(0, len(missing), BATCH_SIZE):
        batch = missing[start : start + BATCH_SIZE]
        pixels = torch.from_numpy(np.stack([load(photo) for photo in batch]))
        for photo, maps in zip(batch, compute(pixels), strict=True):
            cache.write(photo.digest, maps)
        yield len(batch)


def load_padded(side_px: int, photo: PhotoFile) -> UInt8[np.ndarray, "3 S S"]:
    """Return the photo letterboxed to a square, as the network sees it."""
    return letterbox_image(read_image(photo.path).image, [InputSize.square(side_px)], MASK_STRIDE_PX)[0]


def load_resized(side_px: int, photo: PhotoFile) -> UInt8[np.ndarray, "3 S S"]:
    """Return the photo resized to a square without keeping its aspect ratio, as MaskCut does."""
    resized = Image.fromarray(read_image(photo.path).image).resize((side_px, side_px), Image.Resampling.LANCZOS)
    return np.asarray(resized).transpose(2, 0, 1)


@torch.inference_mode()
def compute_block_features(
    encoder: VisionTransformer, blocks: tuple[int, ...], pixels: UInt8[Tensor, "B 3 S S"]
) -> Float16[np.ndarray, "B T h w C"]:
    """Return the patch outputs of these blocks."""
    maps = encoder(normalize(pixels), blocks).unflatten(2, (encoder.config.grid_size,) * 2)
    features: Float16[np.ndarray, "B T h w C"] = maps.transpose(0, 1).half().numpy()
    return features


@torch.inference_mode()
def compute_key_features(
    encoder: VisionTransformer, pixels: UInt8[Tensor, "B 3 S S"]
) -> Float16[np.ndarray, "B 1 h w C"]:
    """Return the keys of the last attention layer, heads concatenated."""
    grid, last = encoder.config.grid_size, encoder.config.depth - 1
    tokens = encoder(normalize(pixels), (last - 1,))[0]
    block = encoder.blocks[last]
    assert isinstance(block, Block)
    # queries, keys, values: B N 3C -> B N C
    keys: Tensor = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[1]
    features: Float16[np.ndarray, "B 1 h w C"] = keys.unflatten(1, (1, grid, grid)).half().numpy()
    return features
