"""Whether two answers are the same one: across backends, batches and machines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt16

from model.errors import ParityError
from model.raw import Raw

SCORE_TOLERANCE = 1e-3
"""Rounding moves scores by less than 1e-5 between torch and ONNX Runtime; a wrong graph by far more."""
EQUAL_CELLS = 0.999
EQUAL_DETECTIONS = 0.98
"""Of clusters and boxes: one near tie may fall the other way on another processor."""
_STRONG = 0.05
_BOX_TOLERANCE_PX = 0.05


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What follows from raw answers, small enough to be kept beside a network."""

    scores: Float32[np.ndarray, "B D"]
    clusters: Int64[np.ndarray, "B D"]
    boxes: Float32[np.ndarray, "B D 4"]
    masks: UInt8[np.ndarray, "B D h bytes"]
    """Above one half, packed along the rows."""
    semantic: UInt16[np.ndarray, "B h w"]
    """The best label of every cell."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two answers are apart; shares are over detections that either scores as more than noise."""

    score_difference: float
    clusters_equal: float
    boxes_equal: float
    masks_equal: float
    semantic_equal: float

    @property
    def is_close(self) -> bool:
        """False for figures that are not numbers, too."""
        return (
            self.score_difference <= SCORE_TOLERANCE
            and min(self.clusters_equal, self.boxes_equal) >= EQUAL_DETECTIONS
            and min(self.masks_equal, self.semantic_equal) >= EQUAL_CELLS
        )

    def require(self, what: str) -> None:
        """Raise ParityError, with `what` was compared and the figures, unless the answers are close."""
        if not self.is_close:
            figures = ", ".join(f"{name} {value:.5f}" for name, value in asdict(self).items())
            raise ParityError(f"{what}: answers differ ({figures})")


def decide(answers: Sequence[Raw]) -> Decisions:
    """The decisions of one answer a picture."""
    return Decisions(
        scores=np.stack([answer.scores for answer in answers]),
        clusters=np.stack([answer.clusters for answer in answers]),
        boxes=np.stack([answer.boxes for answer in answers]),
        masks=np.packbits(np.stack([answer.masks > 0.5 for answer in answers]), axis=-1),
        semantic=np.stack([answer.semantic.argmax(0) for answer in answers]).astype(np.uint16),
    )


def compare(reference: Decisions, given: Decisions) -> Agreement:
    """How far apart two sets of decisions on the same pictures are. Raises ParityError if their shapes differ."""
    pairs = {name: (value, getattr(given, name)) for name, value in vars(reference).items()}
    for name, (one, other) in pairs.items():
        if one.shape != other.shape:
            raise ParityError(f"answers of another network: {name} have shapes {one.shape} and {other.shape}")
    is_strong = np.maximum(reference.scores, given.scores) >= _STRONG
    boxes_near = np.abs(reference.boxes - given.boxes).max(-1) <= _BOX_TOLERANCE_PX
    flipped = np.unpackbits(reference.masks ^ given.masks, axis=-1)
    return Agreement(
        score_difference=float(np.abs(reference.scores - given.scores).max()),
        clusters_equal=_share((reference.clusters == given.clusters)[is_strong]),
        boxes_equal=_share(boxes_near[is_strong]),
        masks_equal=_share(flipped[is_strong] == 0),
        semantic_equal=_share(reference.semantic == given.semantic),
    )


def _share(is_equal: Bool[np.ndarray, "*N"]) -> float:
    """The share of true entries; 1 where there is nothing to compare."""
    return float(is_equal.mean()) if is_equal.size else 1.0
