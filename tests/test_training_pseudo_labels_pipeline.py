import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from model.errors import CheckpointError, ConfigError, DatasetError
from training.data.dataset import LabeledPhoto, PseudoLabelDataset, read_label_map
from training.data.label_config import PseudoLabelConfig
from training.data.photos import PhotoFile
from training.pseudo_labels.clustering import fit_projections
from training.pseudo_labels.codebook import load_codebook
from training.pseudo_labels.pipeline import PseudoLabelWorker, label_photos
from training.pseudo_labels.visualize import make_label_tile, plot_labels, save_figure

Photos = tuple[PhotoFile, ...]


@pytest.fixture
def scanned(tiny_photos: Path, tiny_encoder: Path) -> Photos:
    return tiny.configure(tiny_photos, tiny_encoder)[0]


@pytest.fixture
def config(tiny_photos: Path, tiny_encoder: Path) -> PseudoLabelConfig:
    return tiny.configure(tiny_photos, tiny_encoder)[1]


@pytest.fixture
def dataset(tmp_path: Path) -> PseudoLabelDataset:
    """An empty folder."""
    return PseudoLabelDataset(tmp_path / "labels")


@pytest.fixture
def copied(dataset: PseudoLabelDataset, tiny_store: PseudoLabelDataset) -> PseudoLabelDataset:
    """A copy of finished labels."""
    shutil.copytree(tiny_store.folder, dataset.folder)
    return dataset


def read_masks(dataset: PseudoLabelDataset) -> list[dict[str, Any]]:
    masks: list[dict[str, Any]] = json.loads((dataset.folder / "instances.json").read_text())["annotations"]
    return masks


def test_every_photo_has_a_label_in_its_own_size_that_agrees_with_the_coco_file(tiny_store: PseudoLabelDataset) -> None:
    content = json.loads((tiny_store.folder / "panoptic.json").read_text())
    assert len(content["images"]) == len(content["annotations"]) == 8
    known = {category["id"]: category["isthing"] for category in content["categories"]}
    assert known == {1: 1, 2: 1, 3: 1, 4: 0, 5: 0, 6: 0, 7: 0}
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        label_map = read_label_map(tiny_store.folder / "panoptic" / annotation["file_name"])
        assert label_map.shape == (image["height"], image["width"])
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert set(np.unique(label_map).tolist()) - {0} == set(segments)
        for segment_id, segment in segments.items():
            assert segment["area"] == int((label_map == segment_id).sum())
            assert segment["category_id"] in known


def test_a_rerun_completes_interrupted_labels_with_the_same_result(
    copied: PseudoLabelDataset, tiny_store: PseudoLabelDataset, scanned: Photos, config: PseudoLabelConfig
) -> None:
    (copied.folder / "panoptic.json").unlink()
    next((copied.folder / "masks").iterdir()).unlink()
    next(copied.features.rglob("*.npy")).unlink()
    with pytest.raises(DatasetError, match="no finished labels"):
        copied.read_photos()
    label_photos(scanned, config, copied, copied.features)
    assert (copied.folder / "panoptic.json").read_bytes() == (tiny_store.folder / "panoptic.json").read_bytes()


def test_consensus_masks_have_scores_and_only_the_likeliest_are_in_the_panoptic_map(
    dataset: PseudoLabelDataset, tiny_store: PseudoLabelDataset, scanned: Photos, config: PseudoLabelConfig
) -> None:
    config = replace(config, proposals="consensus", maskcut_tau=0.3, objects_per_image=2)
    report = label_photos(scanned, config, dataset, tiny_store.features)
    masks = read_masks(dataset)
    assert report.photos_without_mask < 8 <= len(masks) <= 8 * 12
    assert all(0.0 <= each["score"] <= 1.0 for each in masks)
    photos = json.loads((dataset.folder / "panoptic.json").read_text())["annotations"]
    shown = sum(segment["category_id"] <= 3 for photo in photos for segment in photo["segments_info"])
    assert 0 < shown == sum(each["in_panoptic"] for each in masks) < len(masks)
    projections = dataset.projections.read_bytes()
    (dataset.folder / "panoptic.json").unlink()
    label_photos(scanned, config, dataset, tiny_store.features)
    assert dataset.projections.read_bytes() == projections
    assert read_masks(dataset) == masks


def test_consensus_masks_need_a_codebook_with_objectness_and_maskcut_takes_any(
    dataset: PseudoLabelDataset, tiny_store: PseudoLabelDataset, scanned: Photos, config: PseudoLabelConfig
) -> None:
    codebook = load_codebook(tiny_store.codebook)
    with pytest.raises(ConfigError, match="not fitted on consensus masks"):
        label_photos(scanned, replace(config, proposals="consensus"), dataset, tiny_store.features, codebook)
    assert not dataset.folder.exists()
    with_objectness = replace(
        codebook,
        patch_centroids=codebook.stuff_centroids,
        patch_objectness=np.ones(4),
        score_thresholds=np.full(12, 2.0),
    )
    label_photos(scanned, config, dataset, tiny_store.features, with_objectness)
    assert {each["in_panoptic"] for each in read_masks(dataset)} == {1}


@pytest.mark.parametrize("rule", ["u2seg", "drop-thing-like"])
def test_only_the_published_rule_keeps_stuff_that_lies_in_masks_elsewhere(
    dataset: PseudoLabelDataset, tiny_store: PseudoLabelDataset, scanned: Photos, config: PseudoLabelConfig, rule: str
) -> None:
    codebook = replace(load_codebook(tiny_store.codebook), stuff_in_masks=np.ones(4))
    label_photos(scanned, replace(config, stuff_merge_rule=rule), dataset, tiny_store.features, codebook)
    found = {category for photo in dataset.read_photos() for category in photo.categories.values()}
    assert any(category > 3 for category in found) == (rule == "u2seg")


@pytest.mark.parametrize(
    "change",
    [
        {"proposals": "maskcut"},
        {"proposals": "maskcut", "maskcut_tau": 0.1, "maskcut_features": "keys", "maskcut_subtract_mean": True},
        {"proposals": "consensus", "maskcut_tau": 0.3},
    ],
    ids=["patches", "keys", "consensus"],
)
def test_masks_lie_on_the_patches_that_show_the_photo(
    tmp_path: Path, scanned: Photos, config: PseudoLabelConfig, change: dict[str, Any]
) -> None:
    worker = PseudoLabelWorker(
        config=replace(config, **change), dataset=PseudoLabelDataset(tmp_path), features_dir=tmp_path / "features"
    )
    assert sum(worker.work("features", scanned)) == 8
    fit_projections(scanned, worker.features, 0).write(worker.dataset.projections)
    found = worker.propose_masks(scanned[0])  # 48 x 64 on a square of 56: three of four rows
    assert found.soft.shape[1:] == (3, 4)
    assert len(found.soft) == len(found.scores) > 0
    assert ((found.soft >= 0.0) & (found.soft <= 1.0)).all()


def test_options_of_the_codebook_may_change_until_it_is_fitted(
    dataset: PseudoLabelDataset, scanned: Photos, config: PseudoLabelConfig
) -> None:
    with pytest.raises(ConfigError, match="ask for fewer"):
        label_photos(scanned, replace(config, thing_clusters=99), dataset, dataset.features)
    with pytest.raises(ConfigError, match="maskcut_n differ"):
        dataset.lock_config(replace(config, maskcut_n=1))
    assert label_photos(scanned, config, dataset, dataset.features).photos == 8
    with pytest.raises(ConfigError, match="thing_clusters differ"):
        dataset.lock_config(replace(config, thing_clusters=2))


def test_options_that_do_not_fit_the_encoder_leave_no_folder_behind(
    dataset: PseudoLabelDataset, scanned: Photos, config: PseudoLabelConfig
) -> None:
    with pytest.raises(CheckpointError, match="multiple"):
        label_photos(scanned, replace(config, side_px=60), dataset, dataset.features)
    with pytest.raises(ConfigError, match="blocks 0 to 3"):
        label_photos(scanned, replace(config, layers=(4,)), dataset, dataset.features)
    assert not dataset.folder.exists()


def test_a_folder_with_other_files_is_rejected(tmp_path: Path, config: PseudoLabelConfig) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="holds no pseudo-labels"):
        PseudoLabelDataset(tmp_path).lock_config(config)


def test_options_in_conflict_are_rejected(config: PseudoLabelConfig) -> None:
    with pytest.raises(ConfigError, match="layers"):
        replace(config, layers=())
    with pytest.raises(ConfigError, match="need proposals maskcut"):
        replace(config, proposals="consensus", maskcut_subtract_mean=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": None}, "format version None, this release reads 3; run `useg label` again"),
        ({"maskcut_m": 3}, "did you mean 'maskcut_n'"),
    ],
)
def test_a_stored_configuration_of_another_version_or_with_unknown_values_is_rejected(
    copied: PseudoLabelDataset, change: dict[str, Any], message: str
) -> None:
    content = json.loads((copied.folder / "label.json").read_text())
    (copied.folder / "label.json").write_text(json.dumps(content | change))
    with pytest.raises(DatasetError, match=message):
        copied.read_photos()


def write_labeled(folder: Path) -> LabeledPhoto:
    """A gray photo of 288 x 216: the left third a thing, the middle stuff, the right unlabeled."""
    label_map = np.zeros((216, 288), np.int32)
    label_map[:, :96], label_map[:, 96:192] = 7, 9
    return tiny.write_labeled(folder, "gray", np.full((216, 288, 3), 100, np.uint8), label_map, {7: 1, 9: 5})


def test_things_are_strong_and_outlined_stuff_is_pale_and_unlabeled_pixels_are_dark(tmp_path: Path) -> None:
    tile = make_label_tile(write_labeled(tmp_path), thing_clusters=3)
    assert (tile.photo == 100).all()
    thing, stuff, void = (tile.overlay[100, column].astype(int) for column in (40, 140, 240))
    assert np.ptp(thing) > np.ptp(stuff) > 0
    assert void.tolist() == [30, 30, 30]
    assert tile.overlay[100, 96].tolist() == [250, 250, 250]
    assert tile.overlay[100, 192].tolist() == [30, 30, 30]
    assert (tile.name, tile.summary) == ("gray.png", "1 thing, 1 stuff, 33% unlabeled")


def test_a_cluster_has_the_same_color_in_every_segment(tmp_path: Path) -> None:
    first = write_labeled(tmp_path)
    other = replace(first, categories={7: 3, 9: 1})
    one, two = (make_label_tile(photo, thing_clusters=3) for photo in (first, other))
    assert one.overlay[100, 40].tolist() == two.overlay[100, 140].tolist()


def test_the_seed_selects_the_photos(tiny_store: PseudoLabelDataset) -> None:
    all_captions, first, again, other = (
        [axis.get_title() for axis in plot_labels(tiny_store, count, seed).axes[::2] if axis.get_title()]
        for count, seed in ((9, 0), (4, 0), (4, 0), (4, 1))
    )
    assert first == again != other
    assert all_captions == [f"{index}.png" for index in range(8)]


def test_an_unknown_image_format_is_rejected(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    with pytest.raises(ConfigError, match="no known image format"):
        save_figure(plot_labels(tiny_store, 2, 0), tmp_path / "labels.txt")
