"""Whether two answers are the same one: across backends, batches and machines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt16

from model.errors import ParityError
from model.network_io import RawOutputs

SCORE_TOLERANCE = 1e-3
"""Rounding moves scores by less than 1e-5 between torch and ONNX Runtime; a wrong graph by far more."""
BOX_TOLERANCE_PX = 0.05
MIN_EQUAL_PIXELS = 0.999
MIN_EQUAL_DETECTIONS = 0.98
"""One near tie may fall the other way on another processor."""
_MIN_SCORE = 0.05


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far apart answers may be that count as the same; see `ParityReport`."""

    score: float = SCORE_TOLERANCE
    box_px: float = BOX_TOLERANCE_PX
    equal_detections: float = MIN_EQUAL_DETECTIONS
    equal_cells: float = MIN_EQUAL_PIXELS


FP32_TOLERANCE = Tolerance()
FP16_TOLERANCE = Tolerance(score=0.03, box_px=8.0, equal_detections=0.9, equal_cells=0.99)
"""Measured on ten images: scores within 1.4e-2, 0.959 of the detections and 0.9992 of the pixels equal
(docs/experiments). Scores depend on mask areas, so one pixel moves the score of a small mask far."""
BF16_TOLERANCE = Tolerance(score=0.06, box_px=8.0, equal_detections=0.8, equal_cells=0.97)
"""The same: scores within 2.6e-2, 0.937 of the detections, 0.9939 of the cells."""
INT8_TOLERANCE = Tolerance(score=0.02, box_px=8.0, equal_detections=0.85, equal_cells=0.985)
"""Between processors, on two golden pictures: scores within 9e-3, 0.93 of the detections and 0.9939 of the cells where
they have VNNI, AVX2's or AVX-512's; without, sums of int8 products overflow: 0.844, 0.9737, and that is refused."""


@dataclass(frozen=True, kw_only=True)
class DecodedOutputs:
    """What follows from raw answers, small enough to be kept beside a network."""

    scores: Float32[np.ndarray, "B D"]
    clusters: Int64[np.ndarray, "B D"]
    boxes: Float32[np.ndarray, "B D 4"]
    masks: UInt8[np.ndarray, "B D h bytes"]
    """Above one half, packed along the rows."""
    semantic: UInt16[np.ndarray, "B h w"]
    """The best label of every cell."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far an answer is from a reference; shares of detections are over those that it scores as more than noise."""

    score_difference: float
    """Between scores of the same rank: detections come in no order."""
    detections_equal: float
    """Those that the answer has too: of the same cluster and score, with the same box."""
    masks_equal: float
    semantic_equal: float

    def is_within(self, tolerance: Tolerance) -> bool:
        """False for figures that are not numbers, too."""
        return (
            self.score_difference <= tolerance.score
            and self.detections_equal >= tolerance.equal_detections
            and min(self.masks_equal, self.semantic_equal) >= tolerance.equal_cells
        )

    def require(self, what: str, tolerance: Tolerance = FP32_TOLERANCE) -> None:
        """Raise ParityError, with `what` was compared and the figures, unless the answers are close."""
        if not self.is_within(tolerance):
            figures = ", ".join(f"{name} {value:.5f}" for name, value in asdict(self).items())
            raise ParityError(f"{what}: answers differ ({figures})")


def decode_outputs(answers: Sequence[RawOutputs]) -> DecodedOutputs:
    """The decisions of one answer a picture."""
    return DecodedOutputs(
        scores=np.stack([answer.scores for answer in answers]),
        clusters=np.stack([answer.clusters for answer in answers]),
        boxes=np.stack([answer.boxes for answer in answers]),
        masks=np.packbits(np.stack([answer.masks > 0.5 for answer in answers]), axis=-1),
        semantic=np.stack([answer.semantic.argmax(0) for answer in answers]).astype(np.uint16),
    )


def compare_outputs(
    reference: DecodedOutputs, given: DecodedOutputs, tolerance: Tolerance = FP32_TOLERANCE
) -> ParityReport:
    """How far apart two sets of decisions on the same pictures are. Raises ParityError if their shapes differ."""
    for name, one in vars(reference).items():
        other = getattr(given, name)
        if one.shape != other.shape:
            raise ParityError(f"answers of another network: {name} have shapes {one.shape} and {other.shape}")
    ranked, given_ranked = (np.sort(each.scores, axis=1) for each in (reference, given))
    pairs = [
        (picture, *pair) for picture in range(len(ranked)) for pair in _match(reference, given, picture, tolerance)
    ]
    pictures, rows, columns = np.array(pairs, np.int64).reshape(-1, 3).T
    flipped = np.unpackbits(reference.masks[pictures, rows] ^ given.masks[pictures, columns])
    strong = int((reference.scores >= _MIN_SCORE).sum())
    return ParityReport(
        score_difference=float(np.abs(ranked - given_ranked).max()),
        detections_equal=len(pairs) / strong if strong else 1.0,
        masks_equal=_fraction(flipped == 0),
        semantic_equal=_fraction(reference.semantic == given.semantic),
    )


def _match(
    reference: DecodedOutputs, given: DecodedOutputs, picture: int, tolerance: Tolerance
) -> list[tuple[int, int]]:
    """Rows of detections that both answers hold, each in one pair, those of the reference strong."""
    scores, given_scores = reference.scores[picture], given.scores[picture]
    is_same = (
        (reference.clusters[picture][:, None] == given.clusters[picture])
        & (np.abs(reference.boxes[picture][:, None] - given.boxes[picture]).max(-1) <= tolerance.box_px)
        & (np.abs(scores[:, None] - given_scores) <= tolerance.score)
    )
    pairs = []
    for row in np.flatnonzero(scores >= _MIN_SCORE):
        if is_same[row].any():
            column = row if is_same[row, row] else int(is_same[row].argmax())
            pairs.append((int(row), int(column)))
            is_same[:, column] = False
    return pairs


def _fraction(is_equal: Bool[np.ndarray, "*N"]) -> float:
    """The share of true entries; 1 where there is nothing to compare."""
    return float(is_equal.mean()) if is_equal.size else 1.0
