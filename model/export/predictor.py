"""Predictions of an artifact for the photos of a folder, and the drift reference made from them."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from model.backends.loader import load_session
from model.backends.session import Backend, Session
from model.contract import Contract, Detail, Task
from model.detail import run_image
from model.drift import build_histograms, output_statistics
from model.errors import ConfigError, InputError
from model.files import list_files
from model.images import SUFFIXES, read_image
from model.postprocessing.panoptic import Segmentation, merge_categories, postprocess

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 30.0


class ArtifactPredictor:
    """Segments photos with an artifact."""

    def __init__(
        self, contract: Contract, session: Session, detail: Detail = "standard", *, merge_clusters: bool = False
    ) -> None:
        self.contract = contract
        self.detail = detail
        self.merge_clusters = merge_clusters
        self._session = session

    def segment(self, image: UInt8[np.ndarray, "H W 3"], task: Task = "panoptic") -> Segmentation:
        """Return the segmentation of one photo."""
        outputs, prepared = run_image(self._session, image, self.contract, self.detail)
        thresholds = prepared.override(self.contract.thresholds)
        segmentation = postprocess(outputs, prepared.letterbox, self.contract, task, thresholds)
        return merge_categories(segmentation, task) if self.merge_clusters else segmentation


def load_artifact_predictor(artifact: Path, *, threads: int) -> ArtifactPredictor:
    """Load an artifact in ONNX Runtime, whose outputs are equal everywhere. Raises what `load_session` does."""
    return ArtifactPredictor(*load_session(artifact, threads=threads))


@dataclass(frozen=True, kw_only=True)
class SampledPhoto:
    """A photo and its path."""

    path: Path
    image: UInt8[np.ndarray, "H W 3"]


def sample_photos(folder: Path, max_photos: int, seed: int = 0) -> Iterator[SampledPhoto]:
    """Yield up to `max_photos` readable photos below a folder, in an order that depends on the seed only.

    Progress is logged if it takes long. Raises ConfigError at the end if there was none.
    """
    paths = [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES]
    total, done = min(max_photos, len(paths)), 0
    started = logged = time.monotonic()
    for index in np.random.default_rng(seed).permutation(len(paths)):
        if done >= max_photos:
            return
        with contextlib.suppress(InputError):
            yield SampledPhoto(path=paths[index], image=read_image(paths[index]).image)
            done += 1
        if done and (now := time.monotonic()) - logged >= _LOG_INTERVAL_S:
            logged = now
            logger.info("%d of %d photos, %.0f s left", done, total, (now - started) / done * (total - done))
    if not done:
        raise ConfigError(f"{folder} has no readable photo: give --photos another folder")


def write_drift_reference(artifact: Path, photos: Path, max_photos: int, backend: Backend, threads: int) -> Contract:
    """Store histograms of output statistics of up to `max_photos` photos in the contract, replacing earlier ones.

    Raises ConfigError, leaving the artifact unchanged, if no photo can be read, and what `load_session` raises.
    """
    predictor = ArtifactPredictor(*load_session(artifact, backend=backend, threads=threads))
    histograms = build_histograms(
        output_statistics(predictor.segment(photo.image)) for photo in sample_photos(photos, max_photos)
    )
    described = replace(predictor.contract, drift_reference={str(name): each for name, each in histograms.items()})
    described.write(artifact)
    return described
