"""What discovery found in one photo, as kept on disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from model.errors import LabelStoreError
from model.files import read_arrays, replace_file

_LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Masks on the patch grid, best first; they may overlap."""

    soft: Float[np.ndarray, "N h w"]
    """The share of votes for each patch, 0..1; 0 or 1 if there was no vote."""
    scores: Float[np.ndarray, "N"]
    """Higher is better; comparable between photos."""

    @property
    def hard(self) -> Bool[np.ndarray, "N h w"]:
        """Patches with most of the votes."""
        return self.soft > 0.5

    def keep(self, count: int, least_score: float) -> "Proposals":
        """The first `count` of those that score well enough."""
        kept = np.flatnonzero(self.scores >= least_score)[:count]
        return Proposals(soft=self.soft[kept], scores=self.scores[kept])

    def write(self, path: Path) -> None:
        votes = np.round(self.soft * _LEVELS).astype(np.uint8)
        with replace_file(path) as sibling, sibling.open("wb") as stream:
            np.savez_compressed(stream, votes=votes, scores=self.scores)


def rank(masks: Bool[np.ndarray, "N h w"]) -> Proposals:
    """Hard masks in the order of their finding: the second scores half of the first, the third a third."""
    scores = 1.0 / np.arange(1, 1 + len(masks), dtype=np.float32)
    return Proposals(soft=masks.astype(np.float32), scores=scores)


def separate(masks: Bool[np.ndarray, "N H W"]) -> Bool[np.ndarray, "N H W"]:
    """Masks, best first, without what belongs to a better one; empty if that is more than half of it."""
    taken = np.zeros(masks.shape[1:], bool)
    apart = np.zeros_like(masks)
    for place, mask in enumerate(masks):
        free = mask & ~taken
        if 2 * free.sum() >= mask.sum():
            apart[place] = free
            taken |= free
    return apart


def read_proposals(path: Path) -> Proposals:
    """Raises LabelStoreError if the file is missing or broken."""
    try:
        stored = read_arrays(path)
        return Proposals(soft=stored["votes"].astype(np.float32) / _LEVELS, scores=stored["scores"])
    except (ValueError, KeyError) as error:
        raise LabelStoreError(f"{path} holds no masks: {error}") from error
