import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.errors import CheckpointError, ConfigError, LabelStoreError
from training.labels.clusters.codebook import read_codebook
from training.labels.label import label_photos
from training.labels.store import LabelStore, read_label


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


def test_a_vote_gives_masks_with_scores_and_a_rerun_takes_them_as_they_are(
    tmp_path: Path, tiny_store: LabelStore, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    config = replace(config, proposals="vote", objects=2)
    store = LabelStore(tmp_path / "store")
    report = label_photos(scan, config, store, tiny_store.features)
    masks = json.loads((store.folder / "instances.json").read_text())["annotations"]
    assert report.photos_without_mask < 8 <= len(masks) <= 8 * 12
    assert all(0.0 <= each["score"] <= 1.0 for each in masks)
    painted = sum(segment["category_id"] <= 3 for photo in json.loads((store.folder / "panoptic.json").read_text())
                  ["annotations"] for segment in photo["segments_info"])  # fmt: skip
    assert 0 < painted == sum(each["painted"] for each in masks) < len(masks)
    views = store.views.read_bytes()
    (store.folder / "panoptic.json").unlink()
    label_photos(scan, config, store, tiny_store.features)
    assert store.views.read_bytes() == views
    assert json.loads((store.folder / "instances.json").read_text())["annotations"] == masks
    with pytest.raises(ConfigError, match="proposals differ"):
        store.claim(replace(config, proposals="maskcut"))


def test_a_vote_needs_a_codebook_of_a_vote_while_maskcut_takes_any(
    tmp_path: Path, tiny_store: LabelStore, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    book, store = read_codebook(tiny_store.codebook), LabelStore(tmp_path / "store")
    with pytest.raises(ConfigError, match="not fitted on a vote"):
        label_photos(scan, replace(config, proposals="vote"), store, tiny_store.features, book)
    assert not store.folder.exists()
    judged = replace(book, parts=book.stuff, salient=np.ones(4), least_scores=np.full(12, 2.0))
    label_photos(scan, config, store, tiny_store.features, judged)
    masks = json.loads((store.folder / "instances.json").read_text())["annotations"]
    assert {each["painted"] for each in masks} == {1}  # MaskCut's are not judged


def test_keys_are_cached_beside_the_features_and_cut_instead_of_them(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    config = replace(config, tokens="keys", centred=True, faithful=True, threshold=0.1)
    store = LabelStore(tmp_path / "store")
    assert label_photos(scan, config, store, store.features).photos == 8
    assert sorted(len(list(folder.iterdir())) for folder in store.features.iterdir()) == [8, 8]


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
        ({"most_inside": 1.5}, "most_inside"),
        ({"merge": "best"}, "published, improved"),
        ({"stuff": "maps"}, "folder of stuff maps"),
        ({"stuff": "maps", "maps": "m", "stuff_crf": True}, "maps have none"),
    ],
)
def test_options_out_of_range_are_refused(
    tiny_photos: Path, tiny_encoder: Path, change: dict[str, float], message: str
) -> None:
    _, config = tiny.configure(tiny_photos, tiny_encoder)
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)  # type: ignore[arg-type]


def test_a_store_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path, tiny_store: LabelStore) -> None:
    store = LabelStore(tmp_path / "store")
    shutil.copytree(tiny_store.folder, store.folder)
    content = json.loads((store.folder / "label.json").read_text())
    del content["format_version"]
    (store.folder / "label.json").write_text(json.dumps(content))
    with pytest.raises(LabelStoreError, match="version 1, not 2: label its photos anew"):
        store.read_photos()


def test_a_finished_store_is_not_labelled_again(
    tmp_path: Path, tiny_store: LabelStore, tiny_photos: Path, tiny_encoder: Path
) -> None:
    store = LabelStore(tmp_path / "store")
    shutil.copytree(tiny_store.folder, store.folder)
    before = {path: path.stat().st_mtime_ns for path in store.shards.rglob("*.png")}
    label_photos(*tiny.configure(tiny_photos, tiny_encoder), store=store, features=store.features)
    assert {path: path.stat().st_mtime_ns for path in store.shards.rglob("*.png")} == before != {}
