"""Training samples of the mask transformer: crops and labels of photos, batches of them, and their targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int, Int16, Int32, UInt8
from pycocotools import mask as coco
from torch import Tensor
from torch.nn import functional

from model.contract import InputSize
from model.images import Letterbox, letterbox_image, plan_letterbox, resize_labels
from model.networks.mask_transformer import MASK_STRIDE_PX
from training.data.dataset import LabeledPhoto, PseudoLabelDataset, read_label_map
from training.data.features import count_patches
from training.trainer.task import IGNORE_INDEX, make_semantic_map

_MIN_CROP_SIDE = 0.5
"""Smallest crop, as a fraction of the input's side."""
PADDING = -2
"""Value of a semantic map where there is no photo."""
_MIN_MASK_AREA = 4
"""Smaller instances, in map pixels, are no targets."""
_BAND_WIDTH = 5
"""Side of the window in which stuff next to things is ignored."""
MAX_PASTED = 3
"""Maximum number of instances that copy-paste adds to a sample."""
_MIN_PASTED_AREA, _MAX_PASTED_AREA = 0.01, 0.35
"""Fractions of the input: smaller instances cover hardly a patch, larger ones hide everything else."""


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


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Things of one sample; their masks may overlap."""

    masks: Bool[np.ndarray, "N h w"]
    clusters: Int[np.ndarray, "N"]
    """1-based."""
    weights: Float32[np.ndarray, "N"]
    """Loss weights, 0..1."""

    def __len__(self) -> int:
        return len(self.masks)

    def select(self, chosen: Int[np.ndarray, "M"] | Bool[np.ndarray, "N"]) -> "Instances":
        """Return the instances at these indices, or where a mask is set."""
        return Instances(masks=self.masks[chosen], clusters=self.clusters[chosen], weights=self.weights[chosen])

    def find_pasteable(self, clusters: frozenset[int] | None) -> Int[np.ndarray, "n"]:
        """Return the indices of instances of a suitable area and at least median weight, of these clusters if given."""
        areas = self.masks.mean((1, 2))
        is_pasteable = (areas >= _MIN_PASTED_AREA) & (areas <= _MAX_PASTED_AREA)
        if len(self):
            is_pasteable &= self.weights >= np.median(self.weights)
        if clusters is not None:
            is_pasteable &= np.isin(self.clusters, list(clusters))
        return np.flatnonzero(is_pasteable)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A photo, or a crop of it, with its labels. The sample owns its arrays."""

    pixels: UInt8[np.ndarray, "3 S S"]
    semantic: Int16[np.ndarray, "h w"]
    """0 for things, s for stuff cluster s, IGNORE_INDEX or PADDING."""
    instances: Instances


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Samples of one size, and the instances of all of them."""

    pixels: UInt8[Tensor, "B 3 S S"]
    semantic: Int[Tensor, "B h w"]
    """0 for things, s for stuff cluster s, IGNORE_INDEX or PADDING."""
    masks: Bool[Tensor, "P h w"]
    image_indices: Int[Tensor, "P"]
    """Index of the sample that each instance belongs to, ascending."""
    clusters: Int[Tensor, "P"]
    """0-based."""
    weights: Float[Tensor, "P"]
    """Loss weights, 0..1."""


@dataclass(frozen=True, kw_only=True)
class Targets(ImageBatch):
    """A batch whose semantic map has IGNORE_INDEX wherever it is no target."""

    is_labeled: Bool[Tensor, "B h w"]
    """Where an unmatched query is trained as no-object; elsewhere it may have found an unlabeled instance."""


@dataclass(frozen=True, kw_only=True)
class LabelReader:
    """Reads the labels of photos."""

    thing_clusters: int
    annotations: Mapping[str, Sequence[Mapping[str, Any]]] | None
    """COCO annotations of the instances of each photo; None: they are the segments of the panoptic maps."""

    def read(self, photo: LabeledPhoto, view: CropView) -> tuple[Int16[np.ndarray, "h w"], Instances]:
        """Return the semantic map and the instances of a photo in a view; instances outside of it have empty masks.

        The weight of an annotation is its score, at most 1; without a score it is 1.
        """
        label_map = view.crop_labels(read_label_map(photo.label), PADDING)
        semantic = make_semantic_map(photo, label_map, self.thing_clusters)
        semantic[label_map == PADDING] = PADDING
        if self.annotations is None:
            things = [segment for segment, category in photo.categories.items() if category <= self.thing_clusters]
            clusters, weights = [photo.categories[segment] for segment in things], [1.0] * len(things)
            masks = [label_map == segment for segment in things]
        else:
            found = self.annotations[photo.digest]
            clusters = [each["category_id"] for each in found]
            weights = [min(1.0, each.get("score", 1.0)) for each in found]
            masks = []
            if found:
                decoded = coco.decode([each["segmentation"] for each in found])  # H W N
                masks = list(view.crop_labels(decoded, 0).transpose(2, 0, 1))
        return semantic, Instances(
            masks=np.array(masks, bool).reshape(-1, *label_map.shape),
            clusters=np.array(clusters, np.int64),
            weights=np.array(weights, np.float32),
        )

    def clusters(self, photo: LabeledPhoto) -> frozenset[int]:
        """Return the thing clusters of a photo."""
        if self.annotations is None:
            return frozenset(each for each in photo.categories.values() if each <= self.thing_clusters)
        return frozenset(each["category_id"] for each in self.annotations[photo.digest])


def select_instances(dataset: PseudoLabelDataset, max_per_photo: int) -> dict[str, list[dict[str, Any]]]:
    """Return the annotations with the best scores of each photo, best first."""
    selected = {}
    for digest, annotations in dataset.read_instances().items():
        scored = [each for each in annotations if each.get("score", 1.0) > 0.0]
        selected[digest] = sorted(scored, key=lambda each: -float(each.get("score", 1.0)))[:max_per_photo]
    return selected


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Put samples of one size together."""
    instances = [each.instances for each in samples]
    return ImageBatch(
        pixels=torch.from_numpy(np.stack([each.pixels for each in samples])),
        semantic=torch.from_numpy(np.stack([each.semantic for each in samples]).astype(np.int64)),
        masks=torch.from_numpy(np.concatenate([each.masks for each in instances])),
        image_indices=torch.from_numpy(np.repeat(np.arange(len(samples)), [len(each) for each in instances])),
        clusters=torch.from_numpy(np.concatenate([each.clusters for each in instances]) - 1),
        weights=torch.from_numpy(np.concatenate([each.weights for each in instances])),
    )


def make_targets(images: ImageBatch, *, droploss: bool) -> Targets:
    """Convert the labels of a batch to targets, without tiny instances.

    Void, padding and a band of stuff around things are ignored: patches next to an instance have features like its
    own, and stuff labels there are unreliable. With `droploss`, only stuff, instances and padding count as labeled.
    """
    is_kept = images.masks.flatten(1).sum(1) >= _MIN_MASK_AREA
    masks, image_indices = images.masks[is_kept], images.image_indices[is_kept]
    semantic, is_thing = images.semantic, images.semantic == 0
    near_thing = functional.max_pool2d(is_thing[:, None].float(), _BAND_WIDTH, 1, _BAND_WIDTH // 2)[:, 0] > 0
    is_labeled = torch.ones_like(is_thing)
    if droploss:
        is_labeled = (semantic > 0) | (semantic == PADDING) | union_by_image(masks, image_indices, len(is_thing))
    return Targets(
        pixels=images.pixels,
        masks=masks,
        image_indices=image_indices,
        clusters=images.clusters[is_kept],
        weights=images.weights[is_kept],
        semantic=semantic.masked_fill((semantic < 0) | (near_thing & ~is_thing), IGNORE_INDEX),
        is_labeled=is_labeled,
    )


def union_by_image(masks: Bool[Tensor, "P h w"], image_indices: Int[Tensor, "P"], count: int) -> Bool[Tensor, "B h w"]:
    """Return the union of the masks of each image."""
    summed = torch.zeros(count, *masks.shape[1:], device=masks.device)
    return summed.index_add_(0, image_indices, masks.float()) > 0
