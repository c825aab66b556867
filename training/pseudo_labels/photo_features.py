"""A photo as the encoder saw it."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float16

from model.contract import InputSize
from model.images import Letterbox, plan_letterbox
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.features import FeatureCache
from training.data.photos import PhotoFile
from training.pseudo_labels.kmeans import concat_layers

_HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class PhotoFeatures:
    """The cached maps of a photo and where on them it lies."""

    photo: PhotoFile
    letterbox: Letterbox
    maps: Float16[np.ndarray, "T g g C"]

    @property
    def patch_px(self) -> int:
        return self.letterbox.input_size.width_px // int(self.maps.shape[2])

    def cut(self, tokens: Float[np.ndarray, "g g C"]) -> Float[np.ndarray, "h w C"]:
        """The tokens that show a part of the photo."""
        rows, columns = (-(-length // self.patch_px) for length in self.letterbox.size)
        return tokens[:rows, :columns]

    def cover(self, mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "h w"]:
        """The patches of which a mask of the photo covers half, or those that it covers most."""
        rows, columns = self.cut(self.maps[0]).shape[:2]
        # Means, where pixels.resize_map would look between pixels: a small mask lies between them.
        shares = cv2.resize(mask.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
        return shares >= min(_HALF, float(shares.max()))

    def join(self) -> Float[np.ndarray, "h w E"]:
        """The semantic blocks side by side, where they show the photo."""
        return self.cut(concat_layers(self.maps))


def load_photo_features(cache: FeatureCache, photo: PhotoFile, side_px: int) -> PhotoFeatures:
    """Raises LabelStoreError if the cache lacks the photo."""
    placement = plan_letterbox(photo.height, photo.width, [InputSize.square(side_px)], MASK_STRIDE_PX)
    return PhotoFeatures(photo=photo, letterbox=placement, maps=cache.read(photo.digest))
