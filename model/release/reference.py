"""What an artifact's answers look like on photos of the kind to come, written into its contract."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from model.backends.runtime import open_session
from model.backends.session import Backend
from model.contract import Contract
from model.drift import count, measure
from model.errors import ConfigError, InputError
from model.panoptic import assemble
from model.pixels import place, read_photo


def write_reference(artifact: Path, photos: Path, most: int, backend: Backend, threads: int) -> Contract:
    """Histograms of panoptic answers to up to `most` photos, drawn from the folder, in the place of earlier ones.

    Raises ConfigError, and leaves the artifact as it was, if no photo can be read; what `open_session` raises.
    """
    contract, session = open_session(artifact, backend=backend, threads=threads)
    measured = []
    for image in _draw(photos, most):
        pixels, placement = place(image, contract.canvases, contract.stride_px)
        raw = session.run(pixels[None], np.array([placement.size]))[0]
        measured.append(measure(assemble(raw, placement, contract, "panoptic", contract.thresholds)))
    if not measured:
        raise ConfigError(f"{photos} holds no photo that can be read: give --photos another folder")
    described = replace(contract, reference={str(name): each for name, each in count(measured).items()})
    described.write(artifact)
    return described


def _draw(folder: Path, most: int) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Photos below the folder, one at a time, in an order that is the same each time."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for index in np.random.default_rng(0).permutation(len(paths)):
        if most <= 0:
            return
        with contextlib.suppress(InputError):
            yield read_photo(paths[index]).image
            most -= 1
