"""An artifact asked about photos of a folder."""

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
from model.contract import Contract, read_contract
from model.drift import build_histograms, output_statistics
from model.errors import ConfigError, InputError
from model.images import letterbox_image, read_image
from model.postprocessing.panoptic import Segmentation, postprocess

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 30.0


class ArtifactPredictor:
    """A contract and a session that keeps it."""

    def __init__(self, contract: Contract, session: Session) -> None:
        self.contract = contract
        self._session = session

    def segment(self, image: UInt8[np.ndarray, "H W 3"]) -> Segmentation:
        """The panoptic answer to one photo."""
        pixels, placement = letterbox_image(image, self.contract.input_sizes, self.contract.stride_px)
        raw = self._session.run(pixels[None], np.array([placement.size]))[0]
        return postprocess(raw, placement, self.contract, "panoptic", self.contract.thresholds)


def load_artifact_predictor(artifact: Path, *, threads: int) -> ArtifactPredictor:
    """On the CPU, by whatever answers the artifact's precision there; raises what `load_session` does."""
    backend: Backend = "openvino" if read_contract(artifact).precision == "int8" else "cpu"
    return ArtifactPredictor(*load_session(artifact, backend=backend, threads=threads))


@dataclass(frozen=True, kw_only=True)
class SampledPhoto:
    """A photo and where it lies."""

    path: Path
    image: UInt8[np.ndarray, "H W 3"]


def sample_photos(folder: Path, most: int, seed: int = 0) -> Iterator[SampledPhoto]:
    """Photos below the folder that can be read, one at a time; with a seed, always the same in the same order.

    Where that takes long, the log tells how far it is. Raises ConfigError in the end if there was none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total, done = min(most, len(paths)), 0
    started = told = time.monotonic()
    for index in np.random.default_rng(seed).permutation(len(paths)):
        if done >= most:
            return
        with contextlib.suppress(InputError):
            yield SampledPhoto(path=paths[index], image=read_image(paths[index]).image)
            done += 1
        if done and (now := time.monotonic()) - told >= _LOG_INTERVAL_S:
            told = now
            logger.info("%d of %d photos, %.0f s left", done, total, (now - started) / done * (total - done))
    if not done:
        raise ConfigError(f"{folder} holds no photo that can be read: give --photos another folder")


def write_drift_reference(artifact: Path, photos: Path, most: int, backend: Backend, threads: int) -> Contract:
    """Histograms of panoptic answers to up to `most` photos, drawn from the folder, in the place of earlier ones.

    Raises ConfigError, and leaves the artifact as it was, if no photo can be read; what `load_session` raises.
    """
    segmenter = ArtifactPredictor(*load_session(artifact, backend=backend, threads=threads))
    counted = build_histograms(
        output_statistics(segmenter.segment(photo.image)) for photo in sample_photos(photos, most)
    )
    described = replace(segmenter.contract, drift_reference={str(name): each for name, each in counted.items()})
    described.write(artifact)
    return described
