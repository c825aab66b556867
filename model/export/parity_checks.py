"""What a network must pass before it becomes an artifact: the same answers everywhere, alone and in any batch."""

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
    """A picture of `size` (height, width) at the top left of a canvas."""

    pixels: UInt8[np.ndarray, "3 H W"]
    size: tuple[int, int]

    def place(self, contract: Contract) -> Letterbox:
        """The placement that changes nothing: the picture as large as it lies on the canvas."""
        height, width = self.size
        canvas = InputSize(height_px=self.pixels.shape[1], width_px=self.pixels.shape[2])
        return Letterbox(
            height=height,
            width=width,
            resized_height=height,
            resized_width=width,
            input_size=canvas,
            stride_px=contract.stride_px,
        )


def stack_images(pictures: Sequence[InputImage]) -> tuple[UInt8[np.ndarray, "B 3 H W"], Int64[np.ndarray, "B 2"]]:
    """Pictures on one canvas as a session takes them."""
    return np.stack([each.pixels for each in pictures]), np.array([each.size for each in pictures])


def check_parity(
    reference: Session,
    session: Session,
    pictures: Sequence[InputImage],
    contract: Contract,
    tolerance: Tolerance = FP32_TOLERANCE,
) -> dict[str, float]:
    """The worst figures of `Agreement` and the least share of equal pixels in panoptic maps.

    Raises ParityError, with the figures, if a picture's answers are too far apart.
    """
    figures = []
    for index, picture in enumerate(pictures):
        expected, given = (each.run(*stack_images([picture]))[0] for each in (reference, session))
        agreement = compare_outputs(decode_outputs([expected]), decode_outputs([given]), tolerance)
        agreement.require(f"picture {index} on {reference.backend} and {session.backend}", tolerance)
        panoptic, least = _compare_panoptic_maps(expected, given, picture, contract), tolerance.equal_cells
        if panoptic < least:
            raise ParityError(f"picture {index}: {panoptic:.5f} of its panoptic map equal, expected {least}")
        figures.append({**vars(agreement), "panoptic_equal": panoptic})
    worst = {name: (max if name == "score_difference" else min)(each[name] for each in figures) for name in figures[0]}
    logger.info("%s and %s on %d pictures: %s", reference.backend, session.backend, len(pictures), worst)
    return worst


def _compare_panoptic_maps(expected: RawOutputs, given: RawOutputs, picture: InputImage, contract: Contract) -> float:
    """The share of pixels of the same segment."""
    placement = picture.place(contract)
    maps = [
        postprocess(raw, placement, contract, "panoptic", contract.thresholds).label_map for raw in (expected, given)
    ]
    return float((maps[0] == maps[1]).mean())


def check_batch_invariance(
    session: Session, pictures: Sequence[InputImage], tolerance: Tolerance = FP32_TOLERANCE
) -> None:
    """Raise ParityError unless each picture has the same answer alone and at every position of every batch size.

    All pictures lie on one canvas.
    """
    alone = [session.run(*stack_images([picture]))[0] for picture in pictures]
    for size in CHECKED_BATCH_SIZES:
        for shift in range(size):
            order = [(shift + index) % len(pictures) for index in range(size)]
            together = session.run(*stack_images([pictures[index] for index in order]))
            for position, (index, answer) in enumerate(zip(order, together, strict=True)):
                agreement = compare_outputs(decode_outputs([alone[index]]), decode_outputs([answer]), tolerance)
                agreement.require(f"picture {index} alone and at position {position} in a batch of {size}", tolerance)
        logger.info("the same answers alone and in batches of %d", size)
