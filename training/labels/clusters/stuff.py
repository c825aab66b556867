"""Dense maps of stuff clusters: from clusters of patches, or from files of anyone's making."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import cv2
import numpy as np
from jaxtyping import Float, Int, Int32

from model.errors import LabelStoreError
from model.files import hash_file
from model.pixels import Placement, read_photo, resize_labels, resize_map
from training.labels.clusters.photo_view import PhotoView
from training.labels.clusters.stuff_crf import settle
from training.photos import PhotoFile

_SUFFIXES = (".npy", ".png")
_NONE = 255
"""In a file: no cluster here; so is -1."""


class StuffSource(Protocol):
    """Whatever says which stuff cluster lies where; clusters count from 1, 0 is none."""

    def label_pixels(self, view: PhotoView) -> Int32[np.ndarray, "H W"]:
        """In the photo's own size."""
        ...

    def label_patches(self, view: PhotoView) -> Int[np.ndarray, "h w"]:
        """One a patch that shows the photo."""
        ...


@dataclass(frozen=True, kw_only=True)
class PatchStuff:
    """The centroid that a patch's token is most similar to."""

    embed: Callable[[PhotoView], Float[np.ndarray, "h w D"]]
    centroids: Float[np.ndarray, "S D"]
    """Of unit length."""
    has_crf: bool = False
    """Move borders by a dense CRF."""

    def label_pixels(self, view: PhotoView) -> Int32[np.ndarray, "H W"]:
        tokens = self.embed(view)
        if not self.has_crf:
            return label_stuff(tokens, self.centroids, view.patch_px, view.placement)
        cosines = (tokens / np.linalg.norm(tokens, axis=-1, keepdims=True).clip(1e-12)) @ self.centroids.T
        return settle(read_photo(view.photo.path).image, cosines, view.patch_px, view.placement)

    def label_patches(self, view: PhotoView) -> Int[np.ndarray, "h w"]:
        nearest: Int[np.ndarray, "h w"] = (self.embed(view) @ self.centroids.T).argmax(-1) + 1
        return nearest


@dataclass(frozen=True, kw_only=True)
class MapStuff:
    """Maps of one folder, `.npy` or one-channel `.png`, a photo's under its name but for the suffix.

    Values are clusters counted from 0; -1 and 255 are none.
    """

    folder: Path
    clusters: int

    def label_pixels(self, view: PhotoView) -> Int32[np.ndarray, "H W"]:
        """Raises LabelStoreError if the map is missing, broken, of another size or has other clusters."""
        photo, path = view.photo, self._find(view.photo)
        stored = _read_map(path)
        if stored.shape != (photo.height, photo.width):
            raise LabelStoreError(f"{path} is {stored.shape}, its photo {(photo.height, photo.width)}: (height, width)")
        is_none = (stored == _NONE) | (stored == -1)
        clusters = stored[~is_none]
        if clusters.size and not 0 <= clusters.min() <= clusters.max() < self.clusters:
            raise LabelStoreError(
                f"{path} holds clusters {clusters.min()} to {clusters.max()}: of {self.clusters} stuff clusters, "
                f"0 to {self.clusters - 1} were expected (and -1 or {_NONE} for none)"
            )
        return np.where(is_none, 0, stored.astype(np.int32) + 1).astype(np.int32)

    def label_patches(self, view: PhotoView) -> Int[np.ndarray, "h w"]:
        rows, columns = (-(-length // view.patch_px) for length in view.placement.size)
        return resize_labels(self.label_pixels(view), rows, columns)

    def hash_map(self, photo: PhotoFile) -> str:
        """Over the bytes of the photo's map."""
        return hash_file(self._find(photo))

    def _find(self, photo: PhotoFile) -> Path:
        base = self.folder / PurePosixPath(photo.name)
        found = [path for suffix in _SUFFIXES if (path := base.with_suffix(suffix)).is_file()]
        if len(found) != 1:
            held = "both" if found else "neither"
            raise LabelStoreError(
                f"{self.folder} has {held} of {base.stem}.npy and {base.stem}.png for the photo {photo.name}: "
                "give one map a photo"
            )
        return found[0]


def label_stuff(
    tokens: Float[np.ndarray, "h w P"], centroids: Float[np.ndarray, "S P"], patch_px: int, placement: Placement
) -> Int32[np.ndarray, "H W"]:
    """The stuff cluster of every pixel of the photo, counted from 1.

    Similarities are enlarged before the best is taken: borders run between patches and not along them.
    """
    similarities = tokens @ centroids.T
    height, width = tokens.shape[0] * patch_px, tokens.shape[1] * patch_px
    best = np.full((placement.height, placement.width), -np.inf, np.float32)
    winners = np.zeros(best.shape, np.int32)
    for index in np.unique(similarities.argmax(-1)):
        plane = np.ascontiguousarray(similarities[..., index], dtype=np.float32)
        placed = resize_map(plane, height, width)[: placement.placed_height, : placement.placed_width]
        challenger = resize_map(placed, placement.height, placement.width)
        winners[challenger > best] = index + 1
        np.maximum(best, challenger, out=best)
    return winners


def _read_map(path: Path) -> Int[np.ndarray, "H W"]:
    try:
        if path.suffix == ".npy":
            stored = np.load(path, allow_pickle=False)
        else:
            stored = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, ValueError, EOFError, cv2.error) as error:
        raise LabelStoreError(f"{path} is no label map: {error}") from error
    if stored is None or stored.ndim != 2 or not np.issubdtype(stored.dtype, np.integer):
        raise LabelStoreError(f"{path} is no label map: expected whole numbers, height x width")
    return np.asarray(stored)
