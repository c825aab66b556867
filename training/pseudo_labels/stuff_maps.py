"""Stuff from label maps that another program made, one file per photo."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from jaxtyping import Int, Int32

from model.errors import DatasetError
from model.files import hash_file
from model.images import resize_labels
from training.data.features import PhotoFeatures
from training.data.photos import PhotoFile
from training.pseudo_labels.maskcut import MaskProposals

_SUFFIXES = (".npy", ".png")
_NO_CLUSTER = 255
"""Stored value for "no cluster"; so is -1."""


@dataclass(frozen=True, kw_only=True)
class PrecomputedStuff:
    """Label maps in a folder, `.npy` or single-channel `.png`, named as the photos but for the suffix.

    Values are clusters counted from 0; -1 and 255 mean none.
    """

    folder: Path
    clusters: int

    def segment(self, features: PhotoFeatures, proposals: MaskProposals) -> Int32[np.ndarray, "H W"]:
        """Raises DatasetError if the map is missing or damaged, or does not fit the photo and the clusters."""
        photo, path = features.photo, self._find(features.photo)
        stored = _read_map(path)
        if stored.shape != (photo.height, photo.width):
            raise DatasetError(
                f"{path} has shape {stored.shape}, its photo {(photo.height, photo.width)} (height, width)"
            )
        is_none = (stored == _NO_CLUSTER) | (stored == -1)
        clusters = stored[~is_none]
        if clusters.size and not 0 <= clusters.min() <= clusters.max() < self.clusters:
            raise DatasetError(
                f"{path} holds clusters {clusters.min()} to {clusters.max()}: expected 0 to {self.clusters - 1}, "
                f"and -1 or {_NO_CLUSTER} for none"
            )
        return np.where(is_none, 0, stored.astype(np.int32) + 1).astype(np.int32)

    def segment_patches(self, features: PhotoFeatures, proposals: MaskProposals) -> Int[np.ndarray, "h w"]:
        return resize_labels(self.segment(features, proposals), *features.grid_size)

    def hash_map(self, photo: PhotoFile) -> str:
        """Return the SHA-256 of the photo's map."""
        return hash_file(self._find(photo))

    def _find(self, photo: PhotoFile) -> Path:
        base = self.folder / PurePosixPath(photo.name)
        found = [path for suffix in _SUFFIXES if (path := base.with_suffix(suffix)).is_file()]
        if len(found) != 1:
            held = "both" if found else "neither"
            raise DatasetError(
                f"{self.folder} has {held} of {base.stem}.npy and {base.stem}.png for the photo {photo.name}: "
                "expected one map per photo"
            )
        return found[0]


def _read_map(path: Path) -> Int[np.ndarray, "H W"]:
    try:
        if path.suffix == ".npy":
            stored = np.load(path, allow_pickle=False)
        else:
            stored = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, ValueError, EOFError, cv2.error) as error:
        raise DatasetError(f"{path} is not a label map: {error}") from error
    if stored is None or stored.ndim != 2 or not np.issubdtype(stored.dtype, np.integer):
        raise DatasetError(f"{path} is not a label map: expected integers of shape height x width")
    return np.asarray(stored)
