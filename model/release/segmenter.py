"""An artifact asked about photos of a folder."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from model.backends.runtime import open_session
from model.backends.session import Backend, Session
from model.contract import Contract, read_contract
from model.errors import ConfigError, InputError
from model.panoptic import Segmentation, assemble
from model.pixels import place, read_photo

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 30.0


class Segmenter:
    """A contract and a session that keeps it."""

    def __init__(self, contract: Contract, session: Session) -> None:
        self.contract = contract
        self._session = session

    def segment(self, image: UInt8[np.ndarray, "H W 3"]) -> Segmentation:
        """The panoptic answer to one photo."""
        pixels, placement = place(image, self.contract.canvases, self.contract.stride_px)
        raw = self._session.run(pixels[None], np.array([placement.size]))[0]
        return assemble(raw, placement, self.contract, "panoptic", self.contract.thresholds)


def open_segmenter(artifact: Path, *, threads: int) -> Segmenter:
    """On the CPU, by whatever answers the artifact's precision there; raises what `open_session` does."""
    backend: Backend = "openvino" if read_contract(artifact).precision == "int8" else "cpu"
    return Segmenter(*open_session(artifact, backend=backend, threads=threads))


@dataclass(frozen=True, kw_only=True)
class DrawnPhoto:
    """A photo and where it lies."""

    path: Path
    image: UInt8[np.ndarray, "H W 3"]


def draw_photos(folder: Path, most: int, seed: int = 0) -> Iterator[DrawnPhoto]:
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
            yield DrawnPhoto(path=paths[index], image=read_photo(paths[index]).image)
            done += 1
        if done and (now := time.monotonic()) - told >= _LINE_EVERY_S:
            told = now
            logger.info("%d of %d photos, %.0f s left", done, total, (now - started) / done * (total - done))
    if not done:
        raise ConfigError(f"{folder} holds no photo that can be read: give --photos another folder")
