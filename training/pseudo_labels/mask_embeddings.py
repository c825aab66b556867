"""One vector a mask: what thing clusters are made of."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

from model.contract import InputSize
from model.errors import ConfigError
from model.files import atomic_write, load_npz
from model.images import letterbox_image, read_image, resize_map
from model.networks.interface import normalize
from model.networks.mask_transformer import MASK_STRIDE_PX
from model.networks.vit import VisionTransformer
from training.data.label_config import CodebookConfig
from training.pseudo_labels.kmeans import whiten
from training.pseudo_labels.photo_features import PhotoFeatures

_BATCH_SIZE = 8
_WHITE = 255


class MaskEmbedder(Protocol):
    """Whatever turns the masks of a photo into vectors."""

    @property
    def is_spherical(self) -> bool:
        """Whether only the vectors' directions count."""
        ...

    def embed(self, view: PhotoFeatures, masks: Bool[np.ndarray, "N h w"]) -> Float[np.ndarray, "N D"]: ...


@dataclass(frozen=True, kw_only=True)
class MaskedAveragePoolEmbedder:
    """The mean of the whitened patches in a mask, of unit length: no further pass through the encoder."""

    mean: Float[np.ndarray, "E"]
    projection: Float[np.ndarray, "E P"]
    is_spherical: bool = True

    def embed(self, view: PhotoFeatures, masks: Bool[np.ndarray, "N h w"]) -> Float[np.ndarray, "N D"]:
        whitened = whiten(view.join(), self.mean, self.projection)
        means = np.zeros((len(masks), whitened.shape[-1]), np.float32)
        for index, mask in enumerate(masks):
            means[index] = whitened[mask].mean(0)
        unit: Float[np.ndarray, "N D"] = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return unit


class CropEmbedder:
    """A token of the encoder for the mask's own picture, as U2Seg has it: box cut out, all else white.

    Unlike there (short side to 480 and the middle cut out) the box is padded to a square: long objects keep their ends.
    Vectors are kept in a subfolder of `folder`: labelling asks for them after the codebook did.
    """

    def __init__(self, encoder: VisionTransformer, config: CodebookConfig, folder: Path) -> None:
        """Raises ConfigError if the encoder has no such layer."""
        depth = encoder.config.depth
        if not -depth <= config.crop_layer < depth:
            raise ConfigError(f"crop_layer must lie in {-depth}..{depth - 1}, got {config.crop_layer}")
        self.is_spherical = config.crop_l2_normalize
        self._encoder = encoder
        self._config = config
        settings = sorted((name, value) for name, value in asdict(config).items() if name.startswith("crop_"))
        self._folder = folder / hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def embed(self, view: PhotoFeatures, masks: Bool[np.ndarray, "N h w"]) -> Float[np.ndarray, "N D"]:
        path = self._folder / f"{view.photo.digest}.npz"
        if path.is_file():
            return load_npz(path)["vectors"]
        square, _ = letterbox_image(
            read_image(view.photo.path).image, [InputSize.square(self._config.side_px)], MASK_STRIDE_PX
        )
        height, width = view.letterbox.size
        image = np.ascontiguousarray(square[:, :height, :width].transpose(1, 2, 0))
        pictures = [self._draw(image, mask, view.patch_px) for mask in masks]
        vectors = np.zeros((0, self._encoder.config.embed_dim), np.float32)
        for start in range(0, len(pictures), _BATCH_SIZE):
            vectors = np.concatenate([vectors, self._embed(np.stack(pictures[start : start + _BATCH_SIZE]))])
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, vectors=vectors)
        return vectors

    def _draw(
        self, image: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "h w"], patch_px: int
    ) -> UInt8[np.ndarray, "3 s s"]:
        rows, columns = mask.shape
        inside = resize_map(mask.astype(np.float32), rows * patch_px, columns * patch_px)[
            : len(image), : image.shape[1]
        ]
        is_inside = inside > 0.5 if (inside > 0.5).any() else np.ones(image.shape[:2], bool)
        shown = image.copy()
        if self._config.crop_background == "white":
            shown[~is_inside] = _WHITE
        left, top, width, height = cv2.boundingRect(is_inside.view(np.uint8))
        side = max(width, height)
        picture = np.full((side, side, 3), _WHITE, np.uint8)
        above, before = (side - height) // 2, (side - width) // 2
        picture[above : above + height, before : before + width] = shown[top : top + height, left : left + width]
        target = self._config.crop_px
        method = cv2.INTER_AREA if side > target else cv2.INTER_LINEAR
        return np.ascontiguousarray(cv2.resize(picture, (target, target), interpolation=method).transpose(2, 0, 1))

    @torch.inference_mode()
    def _embed(self, pixels: UInt8[np.ndarray, "B 3 s s"]) -> Float[np.ndarray, "B C"]:
        encoder, config = self._encoder, self._config
        layer = config.crop_layer % encoder.config.depth
        kept: list[Tensor] = []
        hook = encoder.blocks[layer].register_forward_hook(lambda *passed: kept.append(passed[2]))
        encoder(normalize(torch.from_numpy(pixels)), (layer,))
        hook.remove()
        tokens = kept[0]
        if layer == encoder.config.depth - 1:
            tokens = encoder.norm(tokens)
        chosen = tokens[:, 0] if config.crop_token == "class" else tokens[:, 1 + encoder.config.num_registers :].mean(1)
        if config.crop_l2_normalize:
            chosen = functional.normalize(chosen, dim=1)
        vectors: Float[np.ndarray, "B C"] = chosen.numpy()
        return vectors
