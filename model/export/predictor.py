"""Predictions of an artifact for the photos of a folder."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from model.backends.loader import load_session
from model.backends.session import Session
from model.contract import Contract, Detail, Task
from model.detail import run_image
from model.errors import ConfigError, InputError
from model.files import list_files
from model.images import SUFFIXES, read_image
from model.postprocessing.panoptic import Segmentation, merge_categories, postprocess
from model.progress import Progress


@dataclass(frozen=True)
class ArtifactPredictor:
    """Segments photos with an artifact."""

    contract: Contract
    session: Session
    detail: Detail = "standard"
    merge_clusters: bool = False

    def segment(self, image: UInt8[np.ndarray, "H W 3"], task: Task = "panoptic") -> Segmentation:
        """Return the segmentation of one photo."""
        outputs, prepared = run_image(self.session, image, self.contract, self.detail)
        thresholds = prepared.override(self.contract.thresholds)
        segmentation = postprocess(outputs, prepared.letterbox, self.contract, task, thresholds)
        return merge_categories(segmentation, task) if self.merge_clusters else segmentation


def load_artifact_predictor(artifact: Path, *, threads: int) -> ArtifactPredictor:
    """Load an artifact in ONNX Runtime, whose outputs are equal everywhere. Raises what `load_session` does."""
    return ArtifactPredictor(*load_session(artifact, threads=threads))


def sample_photos(folder: Path, max_photos: int, seed: int = 0) -> Iterator[tuple[Path, UInt8[np.ndarray, "H W 3"]]]:
    """Yield paths and images of up to `max_photos` readable photos below a folder.

    Their order depends on the seed only. Raises ConfigError at the end if there was none.
    """
    paths = [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES]
    order = np.random.default_rng(seed).permutation(len(paths))
    done = 0
    with Progress("photos", min(max_photos, len(paths)), unit="photo") as progress:
        for path in (paths[index] for index in order):
            if done >= max_photos:
                return
            with contextlib.suppress(InputError):
                yield path, read_image(path).image
                done += 1
                progress.advance()
    if not done:
        raise ConfigError(f"{folder} has no readable photo: give --photos another folder")
