"""One photo's features seen several ways; what one way of looking loses, another keeps."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from model.errors import LabelStoreError
from model.files import read_arrays, replace_file
from training.labels.clusters.cluster import fit_whitening

_WHITE = 64
_HALF_WHITE = 128


@dataclass(frozen=True, kw_only=True)
class TokenViews:
    """Mean and principal axes of the tokens of all photos."""

    mean: Float[np.ndarray, "C"]
    projection: Float[np.ndarray, "C P"]
    """The first axes, each divided by its deviation."""

    def look(self, tokens: Float[np.ndarray, "h w C"]) -> list[Float[np.ndarray, "h w V"]]:
        """Unit tokens without the mean; whitened on 64 axes; divided by the root of the deviation on 128."""
        centred = tokens - self.mean
        deviations = 1.0 / np.linalg.norm(self.projection, axis=0)
        white = centred @ self.projection
        return [_normalise(view) for view in (centred, white[..., :_WHITE], white * np.sqrt(deviations))]

    def write(self, path: Path) -> None:
        with replace_file(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, **asdict(self))


def fit_views(sample: Float[np.ndarray, "N C"]) -> TokenViews:
    """Raises ConfigError if there are too few tokens to tell axes."""
    mean, projection = fit_whitening(sample, min(_HALF_WHITE, sample.shape[1]))
    return TokenViews(mean=mean, projection=projection.astype(np.float32))


def read_views(path: Path) -> TokenViews:
    """Raises LabelStoreError if the file is missing or holds something else."""
    try:
        return TokenViews(**read_arrays(path))
    except (ValueError, TypeError) as error:
        raise LabelStoreError(f"{path} holds no views: {error}") from error


def _normalise(view: Float[np.ndarray, "h w V"]) -> Float[np.ndarray, "h w V"]:
    unit: Float[np.ndarray, "h w V"] = view / np.maximum(np.linalg.norm(view, axis=-1, keepdims=True), 1e-12)
    return unit
