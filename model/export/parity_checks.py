"""Checks of a network before it becomes an artifact: equal outputs on all backends, alone and in batches."""

import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt8

from model.backends.parity import FP32_TOLERANCE, Tolerance, require_equal_outputs
from model.backends.session import Session
from model.contract import Contract, InputSize, RawOutputs
from model.detail import NetworkInput
from model.errors import ParityError
from model.images import plan_letterbox
from model.postprocessing.panoptic import Segmentation, postprocess

logger = logging.getLogger(__name__)

CHECKED_BATCH_SIZES = (1, 2, 3, 5, 8)


def stack_images(images: Sequence[NetworkInput]) -> tuple[UInt8[np.ndarray, "B 3 H W"], Int64[np.ndarray, "B 2"]]:
    """Stack images of one input size to the arrays that a session takes."""
    return np.stack([each.pixels for each in images]), np.array([each.size for each in images])


def segment_input(session: Session, image: NetworkInput, contract: Contract) -> Segmentation:
    """Return the panoptic segmentation of an image, in the size that it has in the input."""
    return _to_panoptic(session.run(*stack_images([image]))[0], image, contract)


def _to_panoptic(outputs: RawOutputs, image: NetworkInput, contract: Contract) -> Segmentation:
    input_size = InputSize(height_px=image.pixels.shape[1], width_px=image.pixels.shape[2])
    letterbox = plan_letterbox(*image.size, [input_size], contract.stride_px)
    return postprocess(outputs, letterbox, contract, "panoptic", contract.thresholds)


def check_parity(
    reference: Session,
    session: Session,
    images: Sequence[NetworkInput],
    contract: Contract,
    tolerance: Tolerance = FP32_TOLERANCE,
) -> dict[str, float]:
    """Return the worst values of `require_equal_outputs`, and the smallest fraction of equal pixels of panoptic maps.

    Raises ParityError, with the values, if the outputs for an image differ too much.
    """
    values = []
    for index, image in enumerate(images):
        expected, actual = (each.run(*stack_images([image]))[0] for each in (reference, session))
        what = f"image {index} on {reference.backend} and {session.backend}"
        report = require_equal_outputs([expected], [actual], what, tolerance)
        maps = [_to_panoptic(raw, image, contract).label_map for raw in (expected, actual)]
        panoptic, minimum = float((maps[0] == maps[1]).mean()), tolerance.min_equal_pixels
        if panoptic < minimum:
            raise ParityError(f"image {index}: {panoptic:.5f} of the panoptic map is equal, expected {minimum}")
        values.append({**report, "panoptic_equal": panoptic})
    worst = {name: (max if name == "score_difference" else min)(each[name] for each in values) for name in values[0]}
    logger.info("%s and %s on %d images: %s", reference.backend, session.backend, len(images), worst)
    return worst


def check_batch_invariance(
    session: Session, images: Sequence[NetworkInput], tolerance: Tolerance = FP32_TOLERANCE
) -> None:
    """Raise ParityError unless outputs are equal alone and at every position of every batch size.

    Batches are of the images that have the first one's input size.
    """
    images = [each for each in images if each.pixels.shape == images[0].pixels.shape][: max(CHECKED_BATCH_SIZES)]
    alone = [session.run(*stack_images([image]))[0] for image in images]
    for size in CHECKED_BATCH_SIZES:
        for shift in range(size):
            order = [(shift + index) % len(images) for index in range(size)]
            together = session.run(*stack_images([images[index] for index in order]))
            for position, (index, outputs) in enumerate(zip(order, together, strict=True)):
                what = f"image {index} alone and at position {position} in a batch of {size}"
                require_equal_outputs([alone[index]], [outputs], what, tolerance)
        logger.info("equal outputs alone and in batches of %d", size)
