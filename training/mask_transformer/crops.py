"""What a sample shows of a photo: all of it, or a window made as large."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, Int32, UInt8
from torch.nn import functional

from model.contract import InputSize
from model.images import Letterbox, letterbox_image, plan_letterbox, resize_labels
from model.networks.mask_transformer import MASK_STRIDE_PX

_LEAST_SHARE = 0.5
"""Of the square's side."""


@dataclass(frozen=True, kw_only=True)
class CropWindow:
    """A square of patches."""

    top: int
    left: int
    side: int


@dataclass(frozen=True, kw_only=True)
class CropView:
    """A square cut out of a photo that lies on a canvas at least as large."""

    letterbox: Letterbox
    """Of the photo on that canvas."""
    side_px: int
    """Of the square."""
    top: int = 0
    """Cells of the canvas above the square."""
    left: int = 0
    window: CropWindow | None = None
    """The patches of the whole photo's square that the frame shows, if not all."""

    @property
    def cells(self) -> int:
        """Of the square, along a side."""
        return self.side_px // MASK_STRIDE_PX

    def cut_pixels(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "3 S S"]:
        """The picture in the square; beside it ImageNet's mean colour."""
        laid, _ = letterbox_image(image, [self.letterbox.input_size], MASK_STRIDE_PX)
        top, left = self.top * MASK_STRIDE_PX, self.left * MASK_STRIDE_PX
        return np.ascontiguousarray(laid[:, top : top + self.side_px, left : left + self.side_px])

    def cut_cells(self, values: np.ndarray, outside: int) -> np.ndarray:
        """The nearest of the photo's values [H W ...] in each cell; `outside` where the square shows no photo."""
        rows = _sample(values.shape[0], self.letterbox.map_height, self.top, self.cells)
        columns = _sample(values.shape[1], self.letterbox.map_width, self.left, self.cells)
        square = np.full((self.cells, self.cells, *values.shape[2:]), outside, values.dtype)
        square[: len(rows), : len(columns)] = values[np.ix_(rows, columns)]
        return square

    def cut_maps(self, maps: Float16[np.ndarray, "T g g C"]) -> Float16[np.ndarray, "T g g C"]:
        """The whole photo's features in the frame, bilinear: not those that the encoder would find there."""
        if self.window is None:
            return np.array(maps)
        window, grid = self.window, maps.shape[1]
        rows, columns = (slice(first, first + window.side) for first in (window.top, window.left))
        # T w w C -> T C w w, still with channels last in memory: the quick way
        part = torch.from_numpy(maps[:, rows, columns].astype(np.float32)).permute(0, 3, 1, 2)
        large = functional.interpolate(part, size=(grid, grid), mode="bilinear", align_corners=False)
        return large.permute(0, 2, 3, 1).half().numpy()


def full_view(height: int, width: int, side_px: int) -> CropView:
    """A whole photo of this size."""
    return CropView(
        letterbox=plan_letterbox(height, width, [InputSize.square(side_px)], MASK_STRIDE_PX), side_px=side_px
    )


def sample_crop(whole: CropView, grid: int, generator: np.random.Generator) -> CropWindow:
    """Half to all of the square's side, drawn uniformly, with as much photo in it as there is."""
    side = int(generator.integers(round(_LEAST_SHARE * grid), grid + 1))
    top, left = (int(generator.integers(max(0, length - side) + 1)) for length in count_patches(whole, grid))
    return CropWindow(top=top, left=left, side=side)


def count_patches(whole: CropView, grid: int) -> tuple[int, int]:
    """Rows and columns of patches, of `grid` along the square's side, that show a part of the photo."""
    patch_px = whole.side_px // grid
    height, width = whole.letterbox.size
    return -(-height // patch_px), -(-width // patch_px)


def crop_view(whole: CropView, grid: int, window: CropWindow) -> CropView:
    """What of the photo lies in the window, the patches being `grid` along the square's side."""
    patch_px, photo = whole.side_px // grid, whole.letterbox
    canvas_px = round(whole.side_px * grid / window.side / MASK_STRIDE_PX) * MASK_STRIDE_PX
    scale = canvas_px / whole.side_px
    return CropView(
        letterbox=plan_letterbox(photo.height, photo.width, [InputSize.square(canvas_px)], MASK_STRIDE_PX),
        side_px=whole.side_px,
        top=round(window.top * patch_px * scale / MASK_STRIDE_PX),
        left=round(window.left * patch_px * scale / MASK_STRIDE_PX),
        window=window,
    )


def _sample(length: int, mapped: int, first: int, count: int) -> Int32[np.ndarray, "n"]:
    """Places along `length` that the cells from `first` on show, as many as there are, of `mapped` in all."""
    places = resize_labels(np.arange(length, dtype=np.int32)[:, None], mapped, 1)[:, 0]
    return places[first : first + count]
