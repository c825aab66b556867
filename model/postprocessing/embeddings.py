"""Mean embeddings of regions of an image, from those of the patches of the network's input."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Integer

from model.arrays import ids_to_positions, l2_normalize
from model.images import Letterbox
from model.postprocessing.masks import PackedMask

_POINTS_PER_SIDE = 4
"""Points along each side of a patch at which regions are sampled."""


@dataclass(frozen=True, kw_only=True)
class PatchEmbeddings:
    """Embeddings of the patches of an input, and where the image lies in it."""

    values: Float32[np.ndarray, "E rows columns"]
    """Unit vectors."""
    letterbox: Letterbox

    def pool_segments(
        self, label_map: Integer[np.ndarray, "H W"], ids: Sequence[int], min_patches: float = 0.0
    ) -> Float32[np.ndarray, "S E"]:
        """Return the mean embedding, of unit length, of each segment.

        It is zeros for a segment that covers fewer patches than `min_patches`, or no sampled point.
        """
        ys, xs, patches = self._sample_points(*label_map.shape)
        sampled = label_map[ys[:, None], xs[None]].ravel()
        positions = ids_to_positions(sampled, ids)
        is_listed = positions > 0
        rows = positions[is_listed] - 1
        pooled = self._average(rows, patches.ravel()[is_listed], len(ids))
        is_small = np.bincount(rows, minlength=len(ids)) < min_patches * _POINTS_PER_SIDE**2
        return np.where(is_small[:, None], np.float32(0.0), pooled)

    def pool_masks(self, masks: Sequence[PackedMask], image_size: tuple[int, int]) -> Float32[np.ndarray, "S E"]:
        """Return the mean embedding of each mask of an image of this size, as `pool_segments` does."""
        ys, xs, patches = self._sample_points(*image_size)
        rows, cells = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for number, mask in enumerate(masks):
            inside_y, inside_x = ys - mask.top, xs - mask.left
            at_y = np.flatnonzero((inside_y >= 0) & (inside_y < mask.height))
            at_x = np.flatnonzero((inside_x >= 0) & (inside_x < mask.width))
            covered = mask.bits[inside_y[at_y][:, None], inside_x[at_x][None]]
            cells.append(patches[at_y[:, None], at_x[None]][covered])
            rows.append(np.full(len(cells[-1]), number))
        return self._average(np.concatenate(rows), np.concatenate(cells), len(masks))

    def _sample_points(
        self, height: int, width: int
    ) -> tuple[Int[np.ndarray, "Y"], Int[np.ndarray, "X"], Int[np.ndarray, "Y X"]]:
        """Return the rows and columns of points of an image of this size, and the patch of each point."""
        box = self.letterbox
        _, rows, columns = self.values.shape
        ys, patch_rows = _spread_points(rows, box.resized_height / box.input_size.height_px, height)
        xs, patch_columns = _spread_points(columns, box.resized_width / box.input_size.width_px, width)
        return ys, xs, patch_rows[:, None] * columns + patch_columns[None]

    def _average(
        self, rows: Int[np.ndarray, "P"], patches: Int[np.ndarray, "P"], count: int
    ) -> Float32[np.ndarray, "S E"]:
        """Return the mean embedding of the patches of each row."""
        flat = self.values.reshape(len(self.values), -1).T
        weights = np.bincount(rows * len(flat) + patches, minlength=count * len(flat)).reshape(count, len(flat))
        return l2_normalize(weights.astype(np.float32) @ flat)


def _spread_points(patches: int, covered: float, length: int) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Return the pixels of points along one side of an image, and their patches; the image covers a part of them."""
    centers = (np.arange(patches * _POINTS_PER_SIDE) + 0.5) / (patches * _POINTS_PER_SIDE)
    inside = np.flatnonzero(centers < covered)
    return (centers[inside] / covered * length).astype(np.int64).clip(max=length - 1), inside // _POINTS_PER_SIDE
