"""Checks of a network before it becomes an artifact: equal outputs on all backends, alone and in batches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from model.backends.parity import FP32_TOLERANCE, Tolerance, compare_outputs, decode_outputs
from model.backends.session import Session
from model.contract import Contract, InputSize
from model.errors import ParityError
from model.images import Letterbox
from model.network_io import RawOutputs
from model.postprocessing.panoptic import postprocess

logger = logging.getLogger(__name__)

CHECKED_BATCH_SIZES = (1, 2, 3, 5, 8)


@dataclass(frozen=True, kw_only=True)
class InputImage:
    """An image of `size` (height, width) at the top left of the network's input."""

    pixels: UInt8[np.ndarray, "3 H W"]
    size: tuple[int, int]

    def letterbox(self, contract: Contract) -> Letterbox:
        """The letterbox that does not resize: outputs have the size of the image in the input."""
        height, width = self.size
        input_size = InputSize(height_px=self.pixels.shape[1], width_px=self.pixels.shape[2])
        return Letterbox(
            height=height,
            width=width,
            resized_height=height,
            resized_width=width,
            input_size=input_size,
            stride_px=contract.stride_px,
        )


def stack_images(images: Sequence[InputImage]) -> tuple[UInt8[np.ndarray, "B 3 H W"], Int64[np.ndarray, "B 2"]]:
    """Stack images of one input size to the arrays that a session takes."""
    return np.stack([each.pixels for each in images]), np.array([each.size for each in images])


def check_parity(
    reference: Session,
    session: Session,
    images: Sequence[InputImage],
    contract: Contract,
    tolerance: Tolerance = FP32_TOLERANCE,
) -> dict[str, float]:
    """Return the worst values of `ParityReport`, and the smallest fraction of equal pixels of panoptic maps.

    Raises ParityError, with the values, if the outputs for an image differ too much.
    """
    values = []
    for index, image in enumerate(images):
        expected, actual = (each.run(*stack_images([image]))[0] for each in (reference, session))
        report = compare_outputs(decode_outputs([expected]), decode_outputs([actual]), tolerance)
        report.require(f"image {index} on {reference.backend} and {session.backend}", tolerance)
        panoptic, minimum = _compare_panoptic_maps(expected, actual, image, contract), tolerance.min_equal_pixels
        if panoptic < minimum:
            raise ParityError(f"image {index}: {panoptic:.5f} of the panoptic map is equal, expected {minimum}")
        values.append({**vars(report), "panoptic_equal": panoptic})
    worst = {name: (max if name == "score_difference" else min)(each[name] for each in values) for name in values[0]}
    logger.info("%s and %s on %d images: %s", reference.backend, session.backend, len(images), worst)
    return worst


def _compare_panoptic_maps(expected: RawOutputs, actual: RawOutputs, image: InputImage, contract: Contract) -> float:
    """Fraction of pixels of the same segment."""
    letterbox = image.letterbox(contract)
    maps = [
        postprocess(raw, letterbox, contract, "panoptic", contract.thresholds).label_map for raw in (expected, actual)
    ]
    return float((maps[0] == maps[1]).mean())


def check_batch_invariance(
    session: Session, images: Sequence[InputImage], tolerance: Tolerance = FP32_TOLERANCE
) -> None:
    """Raise ParityError unless outputs are equal alone and at every position of every batch size.

    All images have one input size.
    """
    alone = [session.run(*stack_images([image]))[0] for image in images]
    for size in CHECKED_BATCH_SIZES:
        for shift in range(size):
            order = [(shift + index) % len(images) for index in range(size)]
            together = session.run(*stack_images([images[index] for index in order]))
            for position, (index, outputs) in enumerate(zip(order, together, strict=True)):
                report = compare_outputs(decode_outputs([alone[index]]), decode_outputs([outputs]), tolerance)
                report.require(f"image {index} alone and at position {position} in a batch of {size}", tolerance)
        logger.info("equal outputs alone and in batches of %d", size)
