"""What an artifact's answers look like on photos of the kind to come, written into its contract."""

from dataclasses import replace
from pathlib import Path

from model.backends.runtime import open_session
from model.backends.session import Backend
from model.contract import Contract
from model.drift import count, measure
from model.release.segmenter import Segmenter, draw_photos


def write_reference(artifact: Path, photos: Path, most: int, backend: Backend, threads: int) -> Contract:
    """Histograms of panoptic answers to up to `most` photos, drawn from the folder, in the place of earlier ones.

    Raises ConfigError, and leaves the artifact as it was, if no photo can be read; what `open_session` raises.
    """
    segmenter = Segmenter(*open_session(artifact, backend=backend, threads=threads))
    counted = count(measure(segmenter.segment(photo.image)) for photo in draw_photos(photos, most))
    described = replace(segmenter.contract, reference={str(name): each for name, each in counted.items()})
    described.write(artifact)
    return described
