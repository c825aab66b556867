"""What a network sees of an image at each detail, and one set of outputs from all of it.

Detail "high" finds smaller objects: next to the whole image the network sees overlapping windows of it at a larger
scale, as in SAHI (Akyon et al., 2022). Windows only add objects; stuff comes from the whole image.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from model.backends.session import Session
from model.contract import Contract, Detail, InputSize, RawOutputs, Thresholds
from model.errors import InvalidParameter
from model.images import Letterbox, letterbox_image, pad_image, resize_image

WINDOW_SCALE = 16 / 9
"""Scale of windows relative to the whole image: two of them cover a side and share an eighth of it."""
_WINDOW_WEIGHT = 0.8
"""Factor on scores in windows, where parts of large objects look like objects."""
_DUPLICATE_IOU = 0.7
"""Objects that overlap more than this are one object that was found twice; at 0.5, AR100 is lower by one."""
_MIN_SCORE = 0.01
"""Weaker objects in windows are left out."""


@dataclass(frozen=True, kw_only=True)
class NetworkInput:
    """One run of the network: (part of) an image of `size` (height, width) at the top left of `pixels`."""

    pixels: UInt8[np.ndarray, "3 H W"]
    size: tuple[int, int]
    top: int = 0
    left: int = 0
    """Position in the enlarged image, in pixels; multiples of the stride."""


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """The network's inputs for an image, the whole image first, and the geometry of the merged outputs."""

    inputs: tuple[NetworkInput, ...]
    letterbox: Letterbox
    contract: Contract

    def override(self, thresholds: Thresholds) -> Thresholds:
        """Return thresholds that also drop objects which were found in several inputs."""
        if len(self.inputs) == 1:
            return thresholds
        duplicates = min(thresholds.duplicate_iou_threshold, _DUPLICATE_IOU)
        return replace(thresholds, duplicate_iou_threshold=duplicates)

    def merge(self, outputs: Sequence[RawOutputs]) -> RawOutputs:
        """Merge the outputs for `inputs`, in the geometry of `letterbox`.

        An object that a window cuts is left out: the whole image or another window shows more of it.
        """
        if len(outputs) == 1:
            return outputs[0]
        stride, size = self.letterbox.stride_px, self.letterbox.size
        rows, columns = self.letterbox.map_height, self.letterbox.map_width
        height, width = (length // stride for length in self.inputs[0].size)
        whole, parts = outputs[0], []
        for given, raw in zip(self.inputs[1:], outputs[1:], strict=True):
            kept = np.flatnonzero((raw.scores >= _MIN_SCORE) & ~_is_cut(raw.boxes, given, size, stride))
            masks = raw.masks[kept]
            if not self.contract.box_mask_size:
                top, left, (down, across) = given.top // stride, given.left // stride, given.size
                masks = np.zeros((len(kept), rows, columns), np.float32)
                masks[:, top : top + down // stride, left : left + across // stride] = raw.masks[
                    kept, : down // stride, : across // stride
                ]
            boxes = raw.boxes[kept] + np.array([given.left, given.top] * 2, np.float32)
            parts.append((raw.scores[kept] * np.float32(_WINDOW_WEIGHT), raw.clusters[kept], boxes, masks))
        scale = np.array([size[1] / self.inputs[0].size[1], size[0] / self.inputs[0].size[0]] * 2, np.float32)
        masks = whole.masks
        if not self.contract.box_mask_size:
            masks = _resize_maps(whole.masks[:, :height, :width], rows, columns)
        parts.insert(0, (whole.scores, whole.clusters, whole.boxes * scale, masks))
        scores, clusters, boxes, masks = (np.concatenate(part) for part in zip(*parts, strict=True))
        semantic = _resize_maps(whole.semantic[:, :height, :width], rows, columns)
        return RawOutputs(
            scores=scores,
            clusters=clusters,
            boxes=boxes,
            masks=masks,
            semantic=semantic,
            embeddings=whole.embeddings,
        )


def prepare_image(image: UInt8[np.ndarray, "H W 3"], contract: Contract, detail: Detail = "standard") -> PreparedImage:
    """Return what the network sees of an image.

    Raises InvalidParameter for detail "low" if the contract has no input sizes for it.
    """
    if detail == "low" and not contract.low_input_sizes:
        raise InvalidParameter(f"{contract.name} {contract.version} has no detail 'low': send 'standard' or 'high'")
    sizes = contract.low_input_sizes if detail == "low" else contract.input_sizes
    pixels, letterbox = letterbox_image(image, sizes, contract.stride_px)
    inputs = [NetworkInput(pixels=pixels, size=letterbox.size)]
    if detail == "high":
        height, width = (
            max(1, round(length * WINDOW_SCALE / contract.stride_px)) * contract.stride_px for length in letterbox.size
        )
        size = letterbox.input_size
        inputs += _cut_windows(resize_image(image, height, width), size, contract.stride_px)
        enlarged = InputSize(  # with the padding of the whole image, whose patches have the embeddings
            height_px=round(size.height_px * height / letterbox.resized_height),
            width_px=round(size.width_px * width / letterbox.resized_width),
        )
        letterbox = replace(letterbox, resized_height=height, resized_width=width, input_size=enlarged)
    return PreparedImage(inputs=tuple(inputs), letterbox=letterbox, contract=contract)


def run_image(
    session: Session, image: UInt8[np.ndarray, "H W 3"], contract: Contract, detail: Detail = "standard"
) -> tuple[RawOutputs, PreparedImage]:
    """Run the network on an image, one input at a time. Raises what `prepare_image` does."""
    prepared = prepare_image(image, contract, detail)
    outputs = [session.run(each.pixels[None], np.array([each.size]))[0] for each in prepared.inputs]
    return prepared.merge(outputs), prepared


def _cut_windows(enlarged: UInt8[np.ndarray, "H W 3"], size: InputSize, stride_px: int) -> Iterator[NetworkInput]:
    """Yield windows of the input size, or as large as the image, evenly spaced and overlapping."""
    height, width = min(size.height_px, enlarged.shape[0]), min(size.width_px, enlarged.shape[1])
    for top in _spread(enlarged.shape[0], height, stride_px):
        for left in _spread(enlarged.shape[1], width, stride_px):
            pixels = pad_image(enlarged[top : top + height, left : left + width], size)
            yield NetworkInput(pixels=pixels, size=(height, width), top=top, left=left)


def _spread(length: int, window: int, stride_px: int) -> list[int]:
    """Return the starts of the fewest windows that cover a length, multiples of the stride."""
    count = math.ceil(length / window)
    last = (length - window) // stride_px
    return [round(last * index / max(1, count - 1)) * stride_px for index in range(count)]


def _is_cut(
    boxes: Float32[np.ndarray, "D 4"], given: NetworkInput, size: tuple[int, int], stride_px: int
) -> Bool[np.ndarray, "D"]:
    """Whether each box reaches a border of its window that is not one of the image."""
    (height, width), (image_height, image_width) = given.size, size
    left, top, right, bottom = boxes.T
    is_cut: Bool[np.ndarray, "D"] = (
        ((left < stride_px) & (given.left > 0))
        | ((top < stride_px) & (given.top > 0))
        | ((right > width - stride_px) & (given.left + width < image_width))
        | ((bottom > height - stride_px) & (given.top + height < image_height))
    )
    return is_cut


def _resize_maps(maps: Float32[np.ndarray, "N h w"], rows: int, columns: int) -> Float32[np.ndarray, "N H W"]:
    return np.stack([cv2.resize(each, (columns, rows), interpolation=cv2.INTER_LINEAR) for each in maps])
