"""What a teacher found in one photo, as kept on disk between the passes of a round."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.errors import LabelStoreError
from model.files import read_arrays, replace_file
from training.fitting.rounds.agreement import Found, Steadiness

MOST_OBJECTS = 40
"""Kept of one photo, best first."""
_LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Objects, stuff and how steady the views were."""

    found: Found
    steadiness: Steadiness
    height: int
    """Of the photo, as the next."""
    width: int

    def write(self, path: Path) -> None:
        """Chances are rounded to 255ths."""
        found, steadiness = self.found, self.steadiness
        with replace_file(path) as sibling, sibling.open("wb") as stream:
            np.savez_compressed(
                stream,
                soft=_pack(found.soft[:MOST_OBJECTS]),
                scores=found.scores[:MOST_OBJECTS],
                clusters=found.clusters[:MOST_OBJECTS],
                semantic=found.semantic,
                certainty=_pack(found.certainty),
                steadiness=np.array([steadiness.flip, steadiness.scale, steadiness.covered]),
                size=np.array([self.height, self.width]),
            )


def read_findings(path: Path) -> Findings:
    """Raises LabelStoreError if the file is missing or broken."""
    try:
        stored = read_arrays(path)
        found = Found(
            soft=stored["soft"].astype(np.float32) / _LEVELS,
            scores=stored["scores"],
            clusters=stored["clusters"],
            semantic=stored["semantic"],
            certainty=stored["certainty"].astype(np.float32) / _LEVELS,
        )
        flip, scale, covered = stored["steadiness"].tolist()
        height, width = stored["size"].tolist()
        steadiness = Steadiness(flip=flip, scale=scale, covered=covered)
        return Findings(found=found, steadiness=steadiness, height=height, width=width)
    except (ValueError, KeyError) as error:
        raise LabelStoreError(f"{path} holds nothing that a teacher found: {error}") from error


def _pack(chances: np.ndarray) -> np.ndarray:
    packed: np.ndarray = np.round(chances * _LEVELS).astype(np.uint8)
    return packed
