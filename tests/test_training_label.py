import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.errors import CheckpointError, ConfigError, LabelStoreError
from training.label import label_photos
from training.store import LabelStore, read_label


def test_every_photo_gets_a_label_in_its_own_size_that_agrees_with_the_index(tiny_store: LabelStore) -> None:
    content = json.loads((tiny_store.folder / "panoptic.json").read_text())
    assert len(content["images"]) == len(content["annotations"]) == 8
    known = {category["id"]: category["isthing"] for category in content["categories"]}
    assert known == {1: 1, 2: 1, 3: 1, 4: 0, 5: 0, 6: 0, 7: 0}
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        labels = read_label(tiny_store.folder / "panoptic" / annotation["file_name"])
        assert labels.shape == (image["height"], image["width"])
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert set(np.unique(labels).tolist()) - {0} == set(segments)
        for segment_id, segment in segments.items():
            assert segment["area"] == int((labels == segment_id).sum())
            assert segment["category_id"] in known


def test_a_rerun_finishes_a_store_that_was_cut_off_and_gives_the_same(
    tmp_path: Path, tiny_store: LabelStore, tiny_photos: Path, tiny_encoder: Path
) -> None:
    store = LabelStore(tmp_path / "store")
    shutil.copytree(tiny_store.folder, store.folder)
    (store.folder / "panoptic.json").unlink()
    next((store.folder / "masks").iterdir()).unlink()
    next(store.features.rglob("*.npy")).unlink()
    with pytest.raises(LabelStoreError, match="no finished labels"):
        store.read_photos()
    label_photos(*tiny.configure(tiny_photos, tiny_encoder), store=store, features=store.features)
    assert (store.folder / "panoptic.json").read_bytes() == (tiny_store.folder / "panoptic.json").read_bytes()


def test_a_store_made_otherwise_is_left_alone(tiny_store: LabelStore, tiny_photos: Path, tiny_encoder: Path) -> None:
    _, config = tiny.configure(tiny_photos, tiny_encoder)
    with pytest.raises(ConfigError, match="thing_clusters differ"):
        tiny_store.claim(replace(config, thing_clusters=2))


def test_what_only_the_codebook_needs_may_change_until_there_is_one(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    store = LabelStore(tmp_path / "store")
    with pytest.raises(ConfigError, match="ask for fewer"):
        label_photos(scan, replace(config, thing_clusters=99), store, store.features)
    with pytest.raises(ConfigError, match="cuts differ"):
        store.claim(replace(config, cuts=1))
    assert label_photos(scan, config, store, store.features).photos == 8


def test_an_encoder_that_does_not_fit_leaves_no_store_behind(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    store = LabelStore(tmp_path / "store")
    with pytest.raises(CheckpointError, match="no multiple"):
        label_photos(scan, replace(config, side_px=60), store, store.features)
    assert not store.folder.exists()


def test_a_folder_of_other_things_is_not_taken_for_a_store(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    _, config = tiny.configure(tiny_photos, tiny_encoder)
    with pytest.raises(ConfigError, match="no label store"):
        LabelStore(tmp_path).claim(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"side_px": 54}, "multiple of 4"),
        ({"cuts": 0}, "cuts"),
        ({"threshold": 1.5}, "threshold"),
    ],
)
def test_options_out_of_range_are_refused(
    tiny_photos: Path, tiny_encoder: Path, change: dict[str, float], message: str
) -> None:
    _, config = tiny.configure(tiny_photos, tiny_encoder)
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)  # type: ignore[arg-type]
