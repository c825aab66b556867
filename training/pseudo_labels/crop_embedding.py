"""Mask embeddings from crops, as published in U2Seg: the encoder sees each object as an image of its own."""

import hashlib
from dataclasses import asdict
from pathlib import Path

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
from training.data.features import PhotoFeatures
from training.data.label_config import ClusteringConfig

_BATCH_SIZE = 8
_WHITE = 255


class CropEmbedder:
    """A token of the encoder for the mask's bounding box on a white background.

    Difference to U2Seg (short side to 480, then center crop): the box is padded to a square, so that long objects keep
    their ends. Vectors are cached in a subfolder of `folder`, because labeling needs them again after the codebook was
    fitted.
    """

    def __init__(self, encoder: VisionTransformer, config: ClusteringConfig, folder: Path) -> None:
        """Raises ConfigError if the encoder has no such layer."""
        depth = encoder.config.depth
        if not -depth <= config.crop_layer < depth:
            raise ConfigError(f"crop_layer must lie in {-depth}..{depth - 1}, got {config.crop_layer}")
        self.is_spherical = config.crop_l2_normalize
        self._encoder = encoder
        self._config = config
        settings = sorted((name, value) for name, value in asdict(config).items() if name.startswith("crop_"))
        self._folder = folder / hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def embed(self, features: PhotoFeatures, masks: Bool[np.ndarray, "N h w"]) -> Float[np.ndarray, "N D"]:
        path = self._folder / f"{features.photo.digest}.npz"
        if path.is_file():
            return load_npz(path)["vectors"]
        square, _ = letterbox_image(
            read_image(features.photo.path).image, [InputSize.square(self._config.side_px)], MASK_STRIDE_PX
        )
        height, width = features.letterbox.size
        image = np.ascontiguousarray(square[:, :height, :width].transpose(1, 2, 0))
        crops = [self._crop(image, mask, features.patch_px) for mask in masks]
        vectors = np.zeros((0, self._encoder.config.embed_dim), np.float32)
        for start in range(0, len(crops), _BATCH_SIZE):
            vectors = np.concatenate([vectors, self._encode(np.stack(crops[start : start + _BATCH_SIZE]))])
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, vectors=vectors)
        return vectors

    def _crop(
        self, image: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "h w"], patch_px: int
    ) -> UInt8[np.ndarray, "3 s s"]:
        rows, columns = mask.shape
        large = resize_map(mask.astype(np.float32), rows * patch_px, columns * patch_px)
        soft = large[: len(image), : image.shape[1]]
        is_inside = soft > 0.5 if (soft > 0.5).any() else np.ones(image.shape[:2], bool)
        shown = image.copy()
        if self._config.crop_background == "white":
            shown[~is_inside] = _WHITE
        left, top, width, height = cv2.boundingRect(is_inside.view(np.uint8))
        side = max(width, height)
        crop = np.full((side, side, 3), _WHITE, np.uint8)
        y, x = (side - height) // 2, (side - width) // 2
        crop[y : y + height, x : x + width] = shown[top : top + height, left : left + width]
        target = self._config.crop_px
        method = cv2.INTER_AREA if side > target else cv2.INTER_LINEAR
        return np.ascontiguousarray(cv2.resize(crop, (target, target), interpolation=method).transpose(2, 0, 1))

    @torch.inference_mode()
    def _encode(self, pixels: UInt8[np.ndarray, "B 3 s s"]) -> Float[np.ndarray, "B C"]:
        encoder, config = self._encoder, self._config
        layer = config.crop_layer % encoder.config.depth
        outputs: list[Tensor] = []
        hook = encoder.blocks[layer].register_forward_hook(lambda *arguments: outputs.append(arguments[2]))
        encoder(normalize(torch.from_numpy(pixels)), (layer,))
        hook.remove()
        tokens = outputs[0]
        if layer == encoder.config.depth - 1:
            tokens = encoder.norm(tokens)
        chosen = tokens[:, 0] if config.crop_token == "class" else tokens[:, 1 + encoder.config.num_registers :].mean(1)
        if config.crop_l2_normalize:
            chosen = functional.normalize(chosen, dim=1)
        vectors: Float[np.ndarray, "B C"] = chosen.numpy()
        return vectors
