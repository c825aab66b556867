"""How true a network of coarser weights stays to the one that it was made from, where rounding alone is no measure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from model.backends.session import Session
from model.contract import Contract
from model.errors import ParityError
from model.panoptic import Segmentation, assemble
from model.release.gate import Picture, stack

_MATCH_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Panoptic answers held against those of a reference, in shares of one."""

    photos: int
    clusters_equal: float
    """Share of pixels of the same cluster, or void in both."""
    panoptic_quality: float
    """All segments of all photos counted together; 0 where there is none, as such photos judge nothing."""

    def require(self, limits: "FidelityLimits") -> None:
        """Raise ParityError, with the figures, unless they reach the limits."""
        for name, least in asdict(limits).items():
            if not getattr(self, name) >= least:
                figures = ", ".join(f"{key} {value:.4g}" for key, value in asdict(self).items())
                raise ParityError(f"int8 answers otherwise than the artifact: {name} below {least} ({figures})")


@dataclass(frozen=True, kw_only=True)
class FidelityLimits:
    """What is refused below.

    The bundled artifact in int8 measured 0.923 and 0.897 on 100 photos, and of 4,000 draws of 50 of them one in a
    thousand lay below 0.839 and 0.853; a broken network measured 0.23 and 0.002 (LOG.md).
    """

    clusters_equal: float = 0.8
    """Where the cluster of one large thing turns, most of a photo turns with it."""
    panoptic_quality: float = 0.85


@dataclass(frozen=True, kw_only=True)
class _Likeness:
    """Of two answers to one photo, as numbers that add up."""

    pixels: int
    pixels_equal: int
    segments: int
    """Of both answers."""
    iou: float
    """Of segments that match."""


def measure_fidelity(reference: Session, session: Session, pictures: Sequence[Picture], contract: Contract) -> Fidelity:
    """What two sessions' panoptic answers to the same pictures have in common."""
    likenesses = []
    for picture in pictures:
        placement = picture.place(contract)
        answers = [
            assemble(each.run(*stack([picture]))[0], placement, contract, "panoptic", contract.thresholds)
            for each in (reference, session)
        ]
        likenesses.append(_liken(*answers))
    segments = sum(each.segments for each in likenesses)
    return Fidelity(
        photos=len(likenesses),
        clusters_equal=sum(each.pixels_equal for each in likenesses) / sum(each.pixels for each in likenesses),
        panoptic_quality=2 * sum(each.iou for each in likenesses) / max(segments, 1),
    )


def _liken(expected: Segmentation, given: Segmentation) -> _Likeness:
    """Segments of the same cluster match if they share more than half of what they cover together."""
    clusters, others = (np.array([0, *(each.cluster for each in one.segments)]) for one in (expected, given))
    pairs = expected.label_map.ravel() * np.int64(len(others)) + given.label_map.ravel()
    shared = np.bincount(pairs, minlength=len(clusters) * len(others)).reshape(len(clusters), len(others))
    is_same = clusters[:, None] == others
    unions = shared.sum(1)[:, None] + shared.sum(0) - shared
    ious = np.where(is_same, shared / np.maximum(unions, 1), 0.0)[1:, 1:]
    return _Likeness(
        pixels=expected.label_map.size,
        pixels_equal=int(shared[is_same].sum()),
        segments=len(expected.segments) + len(given.segments),
        iou=float(ious[ious > _MATCH_IOU].sum()),
    )
