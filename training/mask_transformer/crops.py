"""Geometry of what a training sample shows: the whole photo, or an enlarged crop."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, Int32, UInt8
from torch.nn import functional

from model.contract import InputSize
from model.images import Letterbox, letterbox_image, plan_letterbox, resize_labels
from model.networks.mask_transformer import MASK_STRIDE_PX

_MIN_CROP_SIDE = 0.5
"""Smallest crop, as a fraction of the input's side."""


@dataclass(frozen=True, kw_only=True)
class CropWindow:
    """A square in the patch grid of the whole photo's input."""

    top: int
    left: int
    side: int


@dataclass(frozen=True, kw_only=True)
class CropView:
    """The network's square input, cut out of a letterboxed photo that is as large or larger."""

    letterbox: Letterbox
    """Size and position of the photo before the square is cut out."""
    side_px: int
    """Side of the square."""
    top: int = 0
    """Offset of the square in map pixels, `MASK_STRIDE_PX` photo pixels each."""
    left: int = 0
    window: CropWindow | None = None
    """The patches of the whole photo that the square shows; None: all of them."""

    @property
    def map_side(self) -> int:
        """Side of a mask or semantic map of the square."""
        return self.side_px // MASK_STRIDE_PX

    def crop_image(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "3 S S"]:
        """Return the square's pixels; outside the photo they have ImageNet's mean color."""
        pixels, _ = letterbox_image(image, [self.letterbox.input_size], MASK_STRIDE_PX)
        top, left = self.top * MASK_STRIDE_PX, self.left * MASK_STRIDE_PX
        return np.ascontiguousarray(pixels[:, top : top + self.side_px, left : left + self.side_px])

    def crop_labels(self, values: np.ndarray, fill: int) -> np.ndarray:
        """Sample per-pixel values of the photo [H W ...] at the map pixels of the square; `fill` outside the photo."""
        rows = _sample_positions(values.shape[0], self.letterbox.map_height, self.top, self.map_side)
        columns = _sample_positions(values.shape[1], self.letterbox.map_width, self.left, self.map_side)
        square = np.full((self.map_side, self.map_side, *values.shape[2:]), fill, values.dtype)
        square[: len(rows), : len(columns)] = values[np.ix_(rows, columns)]
        return square

    def crop_features(self, maps: Float16[np.ndarray, "T g g C"]) -> Float16[np.ndarray, "T g g C"]:
        """Resample the whole photo's features bilinearly; the encoder would compute others for the crop."""
        if self.window is None:
            return np.array(maps)
        window, grid = self.window, maps.shape[1]
        rows, columns = (slice(first, first + window.side) for first in (window.top, window.left))
        # T w w C -> T C w w, still channels-last in memory, which is the fast layout
        part = torch.from_numpy(maps[:, rows, columns].astype(np.float32)).permute(0, 3, 1, 2)
        large = functional.interpolate(part, size=(grid, grid), mode="bilinear", align_corners=False)
        return large.permute(0, 2, 3, 1).half().numpy()


def full_view(height: int, width: int, side_px: int) -> CropView:
    """Return the view of a whole photo of this size."""
    return CropView(
        letterbox=plan_letterbox(height, width, [InputSize.square(side_px)], MASK_STRIDE_PX), side_px=side_px
    )


def sample_crop(whole: CropView, grid: int, generator: np.random.Generator) -> CropWindow:
    """Sample a window of half to all of the input's side, with as little padding as possible."""
    side = int(generator.integers(round(_MIN_CROP_SIDE * grid), grid + 1))
    top, left = (int(generator.integers(max(0, length - side) + 1)) for length in count_photo_patches(whole, grid))
    return CropWindow(top=top, left=left, side=side)


def count_photo_patches(whole: CropView, grid: int) -> tuple[int, int]:
    """Return the rows and columns of patches that show a part of the photo, of `grid` along the input's side."""
    patch_px = whole.side_px // grid
    height, width = whole.letterbox.size
    return -(-height // patch_px), -(-width // patch_px)


def crop_view(whole: CropView, grid: int, window: CropWindow) -> CropView:
    """Return the view of a window of the whole photo's input, whose side has `grid` patches."""
    patch_px, photo = whole.side_px // grid, whole.letterbox
    enlarged_px = round(whole.side_px * grid / window.side / MASK_STRIDE_PX) * MASK_STRIDE_PX
    scale = enlarged_px / whole.side_px
    return CropView(
        letterbox=plan_letterbox(photo.height, photo.width, [InputSize.square(enlarged_px)], MASK_STRIDE_PX),
        side_px=whole.side_px,
        top=round(window.top * patch_px * scale / MASK_STRIDE_PX),
        left=round(window.left * patch_px * scale / MASK_STRIDE_PX),
        window=window,
    )


def _sample_positions(length: int, map_length: int, first: int, count: int) -> Int32[np.ndarray, "n"]:
    """Return the photo rows (or columns) at map pixels `first` to `first + count`, of `map_length` in all."""
    positions = resize_labels(np.arange(length, dtype=np.int32)[:, None], map_length, 1)[:, 0]
    return positions[first : first + count]
