import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny

from model.encodings import encode_panoptic_png
from model.errors import ConfigError
from training.fitting.annotations import draw_pictures, name_given, store_annotations
from training.labels.store import LabelStore, read_label
from training.scores.sets.layouts import TruthSet
from training.scores.sets.truth import Truth


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    return TruthSet(folder=tiny.draw_truth(tmp_path / "set")).read()


def test_a_share_is_the_same_for_the_same_seed_and_never_empty(truth: Truth) -> None:
    assert [len(draw_pictures(truth, fraction, 0)) for fraction in (0.01, 0.25, 0.5, 1.0)] == [1, 1, 2, 4]
    assert draw_pictures(truth, 0.5, 3) == draw_pictures(truth, 0.5, 3)
    assert {draw_pictures(truth, 0.25, seed)[0].image_id for seed in range(20)} == {1, 2, 3, 4}


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_no_share_at_all_and_more_than_everything_are_refused(truth: Truth, fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction must lie above 0"):
        draw_pictures(truth, fraction, 0)


def test_categories_become_clusters_and_groups_become_void(tmp_path: Path, tiny_encoder: Path) -> None:
    folder = tiny.draw_truth(tmp_path / "set")
    label_map = np.full((48, 64), 300, np.int32)
    label_map[:10], label_map[10:20], label_map[20:30, :8] = 7, 8, 0
    (folder / "panoptic" / "0.png").write_bytes(encode_panoptic_png(label_map))
    content = json.loads((folder / "panoptic.json").read_text())
    crowd = {"id": 8, "category_id": 17, "iscrowd": 1}
    content["annotations"][0]["segments_info"] = [*content["annotations"][0]["segments_info"], crowd]
    (folder / "panoptic.json").write_text(json.dumps(content))
    truth = TruthSet(folder=folder).read()

    store = LabelStore(tmp_path / "store")
    photos = store_annotations(truth, truth.pictures, tiny_encoder, tiny.SIDE_PX, store)

    stored = store.read_photos()
    assert [photo.name for photo in photos] == ["0.png", "1.png", "2.png", "3.png"]
    assert [photo.path for photo in stored] == [(folder / "images" / photo.name).resolve() for photo in photos]
    assert stored[0].categories == {1: 1, 2: 2}  # one thing, animal; then the stuff, wall
    assert np.array_equal(read_label(stored[0].label), np.select([label_map == 7, label_map == 300], [1, 2]))
    masks = store.read_masks()[photos[0].digest]
    assert [(mask["category_id"], mask["area"]) for mask in masks] == [(1, 640)]
    config = store.read_config()
    assert (config.thing_clusters, config.stuff_clusters, config.proposals) == (1, 1, "annotations")
    assert config.note == "4 pictures of set, labelled by people"


def test_a_store_that_is_there_is_taken_as_it_is(tmp_path: Path, truth: Truth, tiny_encoder: Path) -> None:
    store = LabelStore(tmp_path / "store")
    store_annotations(truth, truth.pictures, tiny_encoder, tiny.SIDE_PX, store)
    written = store.read_photos()[0].label.stat().st_mtime_ns
    store_annotations(truth, truth.pictures, tiny_encoder, tiny.SIDE_PX, store)
    assert store.read_photos()[0].label.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="photos_hash differ"):
        store_annotations(truth, truth.pictures[:2], tiny_encoder, tiny.SIDE_PX, store)


def test_a_set_without_labels_for_every_pixel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "0.png"), np.zeros((4, 6, 3), np.uint8))
    box = {"id": 1, "image_id": 1, "category_id": 17, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0,
           "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]]}  # fmt: skip
    content = {"images": [{"id": 1, "file_name": "0.png", "height": 4, "width": 6}], "annotations": [box],
               "categories": [{"id": 17, "name": "cat", "supercategory": "animal"}]}  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(content))
    truth = TruthSet(folder=tmp_path, layout="instances").read()
    with pytest.raises(ConfigError, match="knows masks alone"):
        draw_pictures(truth, 1.0, 0)


def test_given_names_know_their_photos(tmp_path: Path, truth: Truth, tiny_encoder: Path) -> None:
    store = LabelStore(tmp_path / "store")
    photos = store_annotations(truth, truth.pictures[:2], tiny_encoder, tiny.SIDE_PX, store)
    names = name_given(truth, store, "ab")
    assert names.make_table().tolist() == [-1, 0, 1]
    assert [category.name for category in names.categories] == ["animal", "wall"]
    assert names.fitted_on.count_shared([photo.digest for photo in photos]) == 2
