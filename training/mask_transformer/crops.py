"""Geometry of what a training sample shows: the whole photo, or an enlarged crop; mirrored or not."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float16, Int32, UInt8
from torch.nn import functional

from model.contract import InputSize
from model.images import Letterbox, letterbox_image, plan_letterbox, resize_labels
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.features import count_patches

_MIN_CROP_SIDE = 0.5
"""Smallest crop, as a fraction of the input's side."""


@dataclass(frozen=True, kw_only=True)
class CropView:
    """The network's square input: the patches of a letterboxed photo, or a square of them, enlarged."""

    height: int
    """Height of the photo."""
    width: int
    """Width of the photo."""
    side_px: int
    """Side of the input."""
    grid: int
    """Patches along the side of the whole photo's input."""
    side: int
    """Patches along the side of the crop; `grid` for the whole photo."""
    top: int = 0
    """First row of patches."""
    left: int = 0
    """First column of patches."""
    is_mirrored: bool = False

    @cached_property
    def letterbox(self) -> Letterbox:
        """The whole photo at the scale of the crop."""
        enlarged_px = round(self.side_px * self.grid / self.side / MASK_STRIDE_PX) * MASK_STRIDE_PX
        return plan_letterbox(self.height, self.width, [InputSize.square(enlarged_px)], MASK_STRIDE_PX)

    @property
    def map_side(self) -> int:
        """Side of a mask or semantic map of the crop."""
        return self.side_px // MASK_STRIDE_PX

    def crop_image(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "3 S S"]:
        """Return the crop's pixels; outside the photo they have ImageNet's mean color."""
        pixels, _ = letterbox_image(image, [self.letterbox.input_size], MASK_STRIDE_PX)
        top, left = (first * MASK_STRIDE_PX for first in self._map_offsets())
        square = pixels[:, top : top + self.side_px, left : left + self.side_px]
        return np.ascontiguousarray(self._orient(square, 2))

    def crop_labels(self, values: np.ndarray, fill: int) -> np.ndarray:
        """Sample per-pixel values of the photo [H W ...] at the map pixels of the crop; `fill` outside the photo."""
        top, left = self._map_offsets()
        rows = _sample_positions(self.height, self.letterbox.map_height, top, self.map_side)
        columns = _sample_positions(self.width, self.letterbox.map_width, left, self.map_side)
        square = np.full((self.map_side, self.map_side, *values.shape[2:]), fill, values.dtype)
        square[: len(rows), : len(columns)] = values[np.ix_(rows, columns)]
        return np.ascontiguousarray(self._orient(square, 1))

    def crop_features(self, maps: Float16[np.ndarray, "T g g C"]) -> Float16[np.ndarray, "T g g C"]:
        """Resample the whole photo's features bilinearly; the encoder would compute others for the crop."""
        if self.side < self.grid:
            rows, columns = (slice(first, first + self.side) for first in (self.top, self.left))
            # T w w C -> T C w w, still channels-last in memory, which is the fast layout
            part = torch.from_numpy(maps[:, rows, columns].astype(np.float32)).permute(0, 3, 1, 2)
            large = functional.interpolate(part, size=(self.grid,) * 2, mode="bilinear", align_corners=False)
            maps = large.permute(0, 2, 3, 1).half().numpy()
        return np.array(self._orient(maps, 2), order="C")

    def _map_offsets(self) -> tuple[int, int]:
        """Return the first row and column of the crop in map pixels of the enlarged photo."""
        scale = self.letterbox.input_size.width_px / self.side_px
        patch_px = self.side_px // self.grid
        top, left = (round(first * patch_px * scale / MASK_STRIDE_PX) for first in (self.top, self.left))
        return top, left

    def _orient(self, array: np.ndarray, columns_axis: int) -> np.ndarray:
        return np.flip(array, columns_axis) if self.is_mirrored else array


def full_view(height: int, width: int, side_px: int, grid: int = 1) -> CropView:
    """Return the view of a whole photo of this size."""
    return CropView(height=height, width=width, side_px=side_px, grid=grid, side=grid)


def sample_crop(whole: CropView, generator: np.random.Generator) -> CropView:
    """Sample a crop of half to all of the input's side, with as little padding as possible."""
    side = int(generator.integers(round(_MIN_CROP_SIDE * whole.grid), whole.grid + 1))
    patches = count_patches(whole.letterbox, whole.grid)
    top, left = (int(generator.integers(max(0, length - side) + 1)) for length in patches)
    return replace(whole, top=top, left=left, side=side)


def _sample_positions(length: int, map_length: int, first: int, count: int) -> Int32[np.ndarray, "n"]:
    """Return the photo rows (or columns) at map pixels `first` to `first + count`, of `map_length` in all."""
    positions = resize_labels(np.arange(length, dtype=np.int32)[:, None], map_length, 1)[:, 0]
    return positions[first : first + count]
