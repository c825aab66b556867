"""The teacher of self-training: a trained decoder's predictions with test-time augmentation (mirroring and crops)."""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn import functional

from model.export.export import TRANSFORMER_THRESHOLDS
from model.images import read_image
from model.networks.interface import NetworkOutput, normalize
from model.networks.mask_transformer import MASK_STRIDE_PX, DecoderOutput, MaskDecoder, to_network_output
from model.postprocessing.masks import split_components
from training.data.features import FeatureCache, count_patches
from training.data.photos import PhotoFile
from training.mask_transformer.crops import CropView, full_view

THRESHOLDS = TRANSFORMER_THRESHOLDS
"""Mask threshold and minimum component size, as in the network's panoptic output."""
MIN_SCORE = 0.1
"""Queries with a lower score are ignored."""
_CROP_SIDE = 0.75
"""Side of a crop of cached features, as a fraction of the input's."""
_BORDER = np.ones((3, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class ViewPredictions:
    """Predictions for one view, in map pixels of the whole photo's input."""

    mask_probs: Float32[np.ndarray, "N h w"]
    """Probability of each connected component of an instance; 0 outside the view."""
    scores: Float32[np.ndarray, "N"]
    cluster_probs: Float32[np.ndarray, "N K"]
    """Probabilities of the thing clusters, given an instance."""
    semantic_probs: Float32[np.ndarray, "S+1 h w"]
    """Probabilities of things and of each stuff cluster; 0 outside the view."""
    is_visible: Bool[np.ndarray, "h w"]
    """Pixels of the photo in the view, without those next to its border inside the photo."""

    @property
    def masks(self) -> Bool[np.ndarray, "N h w"]:
        return self.mask_probs > THRESHOLDS.mask_threshold


def make_tta_views(whole: CropView) -> list[CropView]:
    """Return the whole photo, the mirrored photo, and crops that together cover the photo."""
    grid = whole.grid
    # Multiples of this keep both patches and map pixels aligned.
    step = math.lcm(whole.side_px // grid, MASK_STRIDE_PX) * grid // whole.side_px
    side = int(_CROP_SIDE * grid) // step * step
    tops, lefts = (sorted({0, max(0, length - side) // step * step}) for length in count_patches(whole.letterbox, grid))
    crops = [replace(whole, top=top, left=left, side=side) for top in tops for left in lefts]
    return [whole, replace(whole, is_mirrored=True), *crops]


@torch.inference_mode()
def predict_views(decoder: MaskDecoder, photo: PhotoFile, cache: FeatureCache) -> list[ViewPredictions]:
    """Return the predictions for each of `make_tta_views`."""
    image, maps = read_image(photo.path).image, cache.read(photo.digest)
    whole = full_view(photo.height, photo.width, decoder.config.side_px, decoder.grid_size)
    views = make_tta_views(whole)
    features = torch.stack([torch.from_numpy(each.crop_features(maps)).flatten(1, 2) for each in views], dim=1).float()
    pixels = torch.from_numpy(np.stack([each.crop_image(image) for each in views]))
    output = decoder(features, normalize(pixels).contiguous(memory_format=torch.channels_last))
    raw = to_network_output(output)
    is_photo = np.zeros((whole.map_side, whole.map_side), bool)
    is_photo[: whole.letterbox.map_height, : whole.letterbox.map_width] = True
    return [_decode_view(output, raw, index, view, is_photo) for index, view in enumerate(views)]


def _decode_view(
    output: DecoderOutput, raw: NetworkOutput, index: int, view: CropView, is_photo: Bool[np.ndarray, "h w"]
) -> ViewPredictions:
    components = [
        (query, component)
        for query in (raw.scores[index] >= MIN_SCORE).nonzero().flatten().tolist()
        for component in split_components(raw.masks[index, query].numpy(), THRESHOLDS)
    ]
    queries = [query for query, _ in components]
    masks = np.array([component for _, component in components], np.float32).reshape(-1, *is_photo.shape)
    return ViewPredictions(
        mask_probs=_to_whole_map(torch.from_numpy(masks), view) * is_photo,
        scores=raw.scores[index, queries].numpy(),
        cluster_probs=output.class_logits[index, queries, :-1].softmax(1).numpy(),
        semantic_probs=_to_whole_map(output.semantic_logits[index].softmax(0), view) * is_photo,
        is_visible=_find_visible(view, is_photo),
    )


def _find_region(view: CropView) -> tuple[slice, slice]:
    """Return the rows and columns of the whole photo's map that the view shows."""
    rows, columns = (
        slice(first * view.map_side // view.grid, (first + view.side) * view.map_side // view.grid)
        for first in (view.top, view.left)
    )
    return rows, columns


def _find_visible(view: CropView, is_photo: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    shown = np.zeros_like(is_photo)
    shown[_find_region(view)] = True
    near_hidden: np.ndarray = cv2.dilate((is_photo & ~shown).astype(np.uint8), _BORDER)
    visible: Bool[np.ndarray, "h w"] = is_photo & shown & (near_hidden == 0)
    return visible


def _to_whole_map(maps: Float[Tensor, "N h w"], view: CropView) -> Float32[np.ndarray, "N h w"]:
    """Paste maps of a view into the whole photo's map."""
    rows, columns = _find_region(view)
    pasted = np.zeros(maps.shape, np.float32)
    if len(maps):
        unmirrored = maps.flip(2) if view.is_mirrored else maps
        pasted[:, rows, columns] = functional.adaptive_avg_pool2d(unmirrored, rows.stop - rows.start).numpy()
    return pasted
