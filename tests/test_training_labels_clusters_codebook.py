from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.errors import ConfigError, LabelStoreError
from training.labels.clusters.codebook import Codebook, adopt, read_codebook, select_config
from training.labels.clusters.codebook_recipe import CodebookConfig
from training.labels.store import LabelConfig

CONFIG = CodebookConfig(encoder_hash="e", components=2, thing_clusters=2, stuff_clusters=1, stego_steps=7)
BOOK = Codebook(
    config=CONFIG,
    mean=np.arange(3.0),
    projection=np.ones((3, 2)),
    things=np.eye(2),
    stuff=np.zeros((1, 2)),
    inside=np.array([0.25]),
    head={"linear.weight": np.full((2, 3), 0.5, np.float32)},
)


def test_a_codebook_comes_back_as_it_was_written(tmp_path: Path) -> None:
    BOOK.write(tmp_path / "codebook.npz")
    read = read_codebook(tmp_path / "codebook.npz")
    assert read.config == CONFIG
    assert (read.things == np.eye(2)).all()
    assert (read.inside == [0.25]).all()
    assert (read.head["linear.weight"] == 0.5).all()
    assert read.digest == BOOK.digest


def test_what_tells_things_comes_along_and_without_it_the_digest_stays(tmp_path: Path) -> None:
    judged = replace(BOOK, parts=np.eye(2), salient=np.array([0.5, 0.125]), least_scores=np.array([0.75]))
    judged.write(tmp_path / "codebook.npz")
    read = read_codebook(tmp_path / "codebook.npz")
    assert (read.parts.tolist(), read.salient.tolist()) == ([[1, 0], [0, 1]], [0.5, 0.125])
    assert read.least_scores.tolist() == [0.75]
    assert read.digest == judged.digest != BOOK.digest == replace(judged, parts=np.zeros((0, 2))).digest


def test_the_digest_tells_numbers_and_settings_apart() -> None:
    seeded = replace(BOOK, config=replace(CONFIG, seed=1))
    others = [replace(BOOK, things=2 * np.eye(2)), seeded, replace(BOOK, head={})]
    assert len({BOOK.digest, *(other.digest for other in others)}) == 4


def test_a_broken_one_and_one_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "codebook.npz"
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(LabelStoreError, match=r"codebook\.npz"):
        read_codebook(path)
    np.savez(path, mean=BOOK.mean, projection=BOOK.projection, things=BOOK.things, stuff=BOOK.stuff)
    with pytest.raises(LabelStoreError, match="no codebook that can be read"):
        read_codebook(path)


def test_a_codebook_brings_its_settings_and_suffers_no_others() -> None:
    adopted = adopt(BOOK, {"encoder_hash": "e", "cuts": 5})
    assert (adopted["thing_clusters"], adopted["stego_steps"], adopted["cuts"]) == (2, 7, 5)
    assert adopted["codebook"] == BOOK.digest
    with pytest.raises(ConfigError, match="encoder_hash e, thing_clusters 2"):
        adopt(BOOK, {"encoder_hash": "other", "thing_clusters": 3})


def test_the_codebook_s_part_is_taken_out_of_a_label_configuration() -> None:
    config = LabelConfig(photos="p", photos_hash="h", encoder="f", encoder_hash="e", thing_clusters=5)
    assert select_config(config) == CodebookConfig(encoder_hash="e", thing_clusters=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thing_clusters": 0}, "thing_clusters"),
        ({"stuff": "crf"}, "kmeans, regions, stego, maps"),
        ({"stego": "huge"}, "small"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, str | int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)  # type: ignore[arg-type]
