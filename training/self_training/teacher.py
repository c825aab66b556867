"""The teacher of self-training: a trained decoder's predictions with test-time augmentation (mirroring and crops)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, UInt8
from torch import Tensor
from torch.nn import functional

from model.export.export import TRANSFORMER_THRESHOLDS
from model.images import read_image
from model.networks.interface import normalize
from model.networks.mask_transformer import MASK_STRIDE_PX, DecoderOutput, MaskDecoder, to_network_output
from model.postprocessing.masks import split_components
from training.data.dataset import LabeledPhoto
from training.data.features import FeatureCache
from training.mask_transformer.crops import CropView, CropWindow, count_photo_patches, crop_view, full_view

THRESHOLDS = TRANSFORMER_THRESHOLDS
"""Mask threshold and minimum component size, as in the network's panoptic output."""
MIN_SCORE = 0.1
"""Queries with a lower score are ignored."""
_CROP_SIDE = 0.75
"""Side of a crop of cached features, as a fraction of the input's."""
_BORDER = np.ones((3, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class DecoderInput:
    """The inputs of a decoder for one image."""

    features: Float16[np.ndarray, "T g g C"]
    pixels: UInt8[np.ndarray, "3 S S"]


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


@dataclass(frozen=True, kw_only=True)
class TtaView:
    """One augmentation of a photo."""

    crop: CropView
    grid: int
    """Patches along the side of the whole photo's input."""
    is_mirrored: bool = False

    @property
    def map_region(self) -> tuple[slice, slice]:
        """Rows and columns of the whole photo's map that the view shows."""
        window, side = self.crop.window, self.crop.map_side
        if window is None:
            return slice(0, side), slice(0, side)
        rows, columns = (
            slice(first * side // self.grid, (first + window.side) * side // self.grid)
            for first in (window.top, window.left)
        )
        return rows, columns


def make_tta_views(whole: CropView, grid: int) -> list[TtaView]:
    """Return the whole photo, the mirrored photo, and crops that together cover the photo."""
    # Multiples of this keep both patches and map pixels aligned.
    step = math.lcm(whole.side_px // grid, MASK_STRIDE_PX) * grid // whole.side_px
    side = int(_CROP_SIDE * grid) // step * step
    views = [TtaView(crop=whole, grid=grid), TtaView(crop=whole, grid=grid, is_mirrored=True)]
    tops, lefts = (sorted({0, max(0, length - side) // step * step}) for length in count_photo_patches(whole, grid))
    for top in tops:
        for left in lefts:
            window = CropWindow(top=top, left=left, side=side)
            views.append(TtaView(crop=crop_view(whole, grid, window), grid=grid))
    return views


def predict_views(
    decoder: MaskDecoder, photo: LabeledPhoto, cache: FeatureCache
) -> tuple[CropView, list[ViewPredictions]]:
    """Return the whole photo's view, and the predictions for each of `make_tta_views`."""
    image = read_image(photo.path)
    features = np.array(cache.read(photo.digest))
    whole = full_view(image.height, image.width, decoder.config.side_px)
    views = make_tta_views(whole, decoder.grid_size)
    output = run_decoder(decoder, [_make_input(view, image.image, features) for view in views])
    return whole, [_decode_view(output, index, view, whole) for index, view in enumerate(views)]


@torch.inference_mode()
def run_decoder(decoder: MaskDecoder, inputs: Sequence[DecoderInput]) -> DecoderOutput:
    """Run the decoder on a batch."""
    features = torch.stack([torch.from_numpy(each.features).flatten(1, 2) for each in inputs], dim=1).float()
    pixels = torch.from_numpy(np.stack([each.pixels for each in inputs]))
    output: DecoderOutput = decoder(features, normalize(pixels).contiguous(memory_format=torch.channels_last))
    return output


def _make_input(view: TtaView, image: np.ndarray, features: np.ndarray) -> DecoderInput:
    cropped = DecoderInput(features=view.crop.crop_features(features), pixels=view.crop.crop_image(image))
    if not view.is_mirrored:
        return cropped
    return DecoderInput(features=cropped.features[:, :, ::-1].copy(), pixels=cropped.pixels[:, :, ::-1].copy())


def _decode_view(output: DecoderOutput, index: int, view: TtaView, whole: CropView) -> ViewPredictions:
    single = DecoderOutput(
        class_logits=output.class_logits[index : index + 1],
        iou_logits=output.iou_logits[index : index + 1],
        mask_logits=output.mask_logits[index : index + 1],
        semantic_logits=output.semantic_logits[index : index + 1],
        aux_outputs=(),
    )
    raw = to_network_output(single)
    components = [
        (query, torch.from_numpy(component))
        for query in (raw.scores[0] >= MIN_SCORE).nonzero().flatten().tolist()
        for component in split_components(raw.masks[0][query].numpy(), THRESHOLDS)
    ]
    queries = [query for query, _ in components]
    masks = torch.stack([component for _, component in components]) if components else raw.masks[0][:0]
    is_photo = np.zeros((whole.map_side, whole.map_side), bool)
    is_photo[: whole.letterbox.map_height, : whole.letterbox.map_width] = True
    return ViewPredictions(
        mask_probs=_to_whole_map(masks, view, whole) * is_photo,
        scores=raw.scores[0][queries].numpy(),
        cluster_probs=single.class_logits[0][queries][:, :-1].softmax(1).numpy(),
        semantic_probs=_to_whole_map(single.semantic_logits[0].softmax(0), view, whole) * is_photo,
        is_visible=_find_visible(view, is_photo),
    )


def _find_visible(view: TtaView, is_photo: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    shown = np.zeros_like(is_photo)
    shown[view.map_region] = True
    near_hidden: np.ndarray = cv2.dilate((is_photo & ~shown).astype(np.uint8), _BORDER)
    visible: Bool[np.ndarray, "h w"] = is_photo & shown & (near_hidden == 0)
    return visible


def _to_whole_map(maps: Tensor, view: TtaView, whole: CropView) -> Float32[np.ndarray, "N h w"]:
    """Paste maps of a view [N h w] into the whole photo's map."""
    rows, columns = view.map_region
    pasted = np.zeros((len(maps), whole.map_side, whole.map_side), np.float32)
    if len(maps):
        unmirrored = maps.flip(2) if view.is_mirrored else maps
        pasted[:, rows, columns] = functional.adaptive_avg_pool2d(unmirrored, rows.stop - rows.start).numpy()
    return pasted
