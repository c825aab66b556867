"""A fitted decoder as a teacher: what it finds in a photo shown whole, mirrored and in windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor
from torch.nn import functional

from model.export.export import TRANSFORMER_THRESHOLDS
from model.images import read_image
from model.networks.mask_transformer import MASK_STRIDE_PX, DecoderOutput, MaskDecoder, to_network_output
from model.networks.vit import VisionTransformer
from model.postprocessing.detections import split_components
from training.data.dataset import LabeledPhoto
from training.data.features import FeatureCache, compute_features
from training.mask_transformer.crops import CropView, CropWindow, count_patches, crop_view, full_view
from training.mask_transformer.inference import DecoderInput, predict

THRESHOLDS = TRANSFORMER_THRESHOLDS
"""Where a teacher's masks end, and which parts of them are objects of their own: as in its answers."""
LEAST_SCORE = 0.1
"""Of a query's object: surer ones are looked at."""
_WINDOW_SHARE = 0.75
"""Of the square's side, where a window is cut from the whole photo's features."""
_ZOOM_SHARE = 0.5625
"""Where the encoder looks at it anew, and sees what is small: four windows show a photo of 4:3."""
_RIM = np.ones((3, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class ViewPredictions:
    """What was found in one view, in the cells of the whole photo's square."""

    soft: Float32[np.ndarray, "N h w"]
    """Chances of belonging to each object, a connected part being one; 0 outside the view."""
    scores: Float32[np.ndarray, "N"]
    chances: Float32[np.ndarray, "N K"]
    """Of each thing cluster, if there is an object."""
    semantic: Float32[np.ndarray, "S+1 h w"]
    """Chances of things, and of each stuff cluster; 0 outside the view."""
    inside: Bool[np.ndarray, "h w"]
    """Cells of the photo that the view shows, but for a rim where it cuts the photo off."""

    @property
    def hard(self) -> Bool[np.ndarray, "N h w"]:
        return self.soft > THRESHOLDS.mask_threshold


@dataclass(frozen=True, kw_only=True)
class View:
    """One way of showing a photo."""

    frame: CropView
    grid: int
    """Patches along the side of the whole photo's square."""
    is_mirrored: bool = False

    @property
    def cells(self) -> tuple[slice, slice]:
        """Rows and columns of the whole photo's square that are shown."""
        window, cells = self.frame.window, self.frame.cells
        if window is None:
            return slice(0, cells), slice(0, cells)
        ends = ((first * cells // self.grid, (first + window.side) * cells // self.grid)
                for first in (window.top, window.left))  # fmt: skip
        rows, columns = (slice(*each) for each in ends)
        return rows, columns


def make_tta_views(whole: CropView, grid: int, share: float = _WINDOW_SHARE) -> list[View]:
    """The photo whole, mirrored, and in windows of that share of the square's side that together show all of it."""
    step = (
        math.lcm(whole.side_px // grid, MASK_STRIDE_PX) * grid // whole.side_px
    )  # keeps patches on patches, cells on cells
    side = int(share * grid) // step * step
    views = [View(frame=whole, grid=grid), View(frame=whole, grid=grid, is_mirrored=True)]
    places = [sorted({0, max(0, length - side) // step * step}) for length in count_patches(whole, grid)]
    for top in places[0]:
        for left in places[1]:
            window = CropWindow(top=top, left=left, side=side)
            views.append(View(frame=crop_view(whole, grid, window), grid=grid))
    return views


def predict_views(
    decoder: MaskDecoder, photo: LabeledPhoto, cache: FeatureCache, encoder: VisionTransformer | None = None
) -> tuple[CropView, list[ViewPredictions]]:
    """The whole photo's frame, and what is found in each view of `make_tta_views`.

    With an encoder, windows are smaller and have features of their own.
    """
    picture = read_image(photo.path)
    maps = np.array(cache.read(photo.digest))
    whole = full_view(picture.height, picture.width, decoder.config.side_px)
    views = make_tta_views(whole, decoder.grid_size, _ZOOM_SHARE if encoder else _WINDOW_SHARE)
    sights = [_show(view, picture.image, maps) for view in views]
    if encoder:
        sights = [*sights[:2], *_zoom(encoder, sights[2:])]
    prediction = predict(decoder, sights)
    return whole, [_read(prediction, index, view, whole) for index, view in enumerate(views)]


def _show(view: View, image: np.ndarray, maps: np.ndarray) -> DecoderInput:
    sight = DecoderInput(maps=view.frame.cut_maps(maps), square=view.frame.cut_pixels(image))
    if not view.is_mirrored:
        return sight
    return DecoderInput(maps=sight.maps[:, :, ::-1].copy(), square=sight.square[:, :, ::-1].copy())


def _zoom(encoder: VisionTransformer, windows: Sequence[DecoderInput]) -> list[DecoderInput]:
    """The same with what the encoder finds in them."""
    pixels = torch.from_numpy(np.stack([each.square for each in windows]))
    maps = compute_features(encoder, pixels)
    return [replace(each, maps=found) for each, found in zip(windows, maps, strict=True)]


def _read(prediction: DecoderOutput, index: int, view: View, whole: CropView) -> ViewPredictions:
    one = DecoderOutput(
        class_logits=prediction.class_logits[index : index + 1],
        iou_logits=prediction.iou_logits[index : index + 1],
        mask_logits=prediction.mask_logits[index : index + 1],
        semantic_logits=prediction.semantic_logits[index : index + 1],
        aux_outputs=(),
    )
    raw = to_network_output(one)
    parts = [
        (query, torch.from_numpy(part))
        for query in (raw.scores[0] >= LEAST_SCORE).nonzero().flatten().tolist()
        for part in split_components(raw.masks[0][query].numpy(), THRESHOLDS)
    ]
    kept = [query for query, _ in parts]
    drawn = torch.stack([part for _, part in parts]) if parts else raw.masks[0][:0]
    photo = np.zeros((whole.cells, whole.cells), bool)
    photo[: whole.letterbox.map_height, : whole.letterbox.map_width] = True
    soft = _lift(drawn, view, whole)
    semantic = _lift(one.semantic_logits[0].softmax(0), view, whole)
    return ViewPredictions(
        soft=soft * photo,
        scores=raw.scores[0][kept].numpy(),
        chances=one.class_logits[0][kept][:, :-1].softmax(1).numpy(),
        semantic=semantic * photo,
        inside=_find_inside(view, photo),
    )


def _find_inside(view: View, photo: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    shown = np.zeros_like(photo)
    shown[view.cells] = True
    beyond: np.ndarray = cv2.dilate((photo & ~shown).astype(np.uint8), _RIM)
    inside: Bool[np.ndarray, "h w"] = photo & shown & (beyond == 0)
    return inside


def _lift(maps: Tensor, view: View, whole: CropView) -> Float32[np.ndarray, "N h w"]:
    """Maps of a view [N h w] in the cells of the whole square."""
    rows, columns = view.cells
    lifted = np.zeros((len(maps), whole.cells, whole.cells), np.float32)
    if len(maps):
        turned = maps.flip(2) if view.is_mirrored else maps
        lifted[:, rows, columns] = functional.adaptive_avg_pool2d(turned, rows.stop - rows.start).numpy()
    return lifted
