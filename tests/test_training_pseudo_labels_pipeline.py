import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.checkpoints.state_dicts import load_encoder
from model.errors import CheckpointError, ConfigError, LabelStoreError
from training.data.dataset import PseudoLabelDataset, read_label_map
from training.data.features import fill_cache, fill_keys, open_cache, open_key_cache
from training.data.label_config import MaskDiscoveryConfig
from training.data.photos import scan_photos
from training.pseudo_labels.codebook import load_codebook
from training.pseudo_labels.photo_features import load_photo_features
from training.pseudo_labels.pipeline import MaskProposer, fit_feature_projections, label_photos, maskcut_foreground


def test_every_photo_gets_a_label_in_its_own_size_that_agrees_with_the_index(tiny_store: PseudoLabelDataset) -> None:
    content = json.loads((tiny_store.folder / "panoptic.json").read_text())
    assert len(content["images"]) == len(content["annotations"]) == 8
    known = {category["id"]: category["isthing"] for category in content["categories"]}
    assert known == {1: 1, 2: 1, 3: 1, 4: 0, 5: 0, 6: 0, 7: 0}
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        labels = read_label_map(tiny_store.folder / "panoptic" / annotation["file_name"])
        assert labels.shape == (image["height"], image["width"])
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert set(np.unique(labels).tolist()) - {0} == set(segments)
        for segment_id, segment in segments.items():
            assert segment["area"] == int((labels == segment_id).sum())
            assert segment["category_id"] in known


def test_a_rerun_finishes_a_store_that_was_cut_off_and_gives_the_same(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_photos: Path, tiny_encoder: Path
) -> None:
    store = PseudoLabelDataset(tmp_path / "store")
    shutil.copytree(tiny_store.folder, store.folder)
    (store.folder / "panoptic.json").unlink()
    next((store.folder / "masks").iterdir()).unlink()
    next(store.features.rglob("*.npy")).unlink()
    with pytest.raises(LabelStoreError, match="no finished labels"):
        store.read_photos()
    label_photos(*tiny.configure(tiny_photos, tiny_encoder), store=store, features=store.features)
    assert (store.folder / "panoptic.json").read_bytes() == (tiny_store.folder / "panoptic.json").read_bytes()


def test_a_vote_gives_masks_with_scores_and_a_rerun_takes_them_as_they_are(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    config = replace(config, proposals="vote", objects=2)
    store = PseudoLabelDataset(tmp_path / "store")
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
        store.lock_config(replace(config, proposals="maskcut"))


def test_a_vote_needs_a_codebook_of_a_vote_while_maskcut_takes_any(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    book, store = load_codebook(tiny_store.codebook), PseudoLabelDataset(tmp_path / "store")
    with pytest.raises(ConfigError, match="not fitted on a vote"):
        label_photos(scan, replace(config, proposals="vote"), store, tiny_store.features, book)
    assert not store.folder.exists()
    judged = replace(book, parts=book.stuff, salient=np.ones(4), score_thresholds=np.full(12, 2.0))
    label_photos(scan, config, store, tiny_store.features, judged)
    masks = json.loads((store.folder / "instances.json").read_text())["annotations"]
    assert {each["painted"] for each in masks} == {1}  # MaskCut's are not judged


def test_keys_are_cached_beside_the_features_and_cut_instead_of_them(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    config = replace(config, tokens="keys", maskcut_subtract_mean=True, maskcut_reference_filters=True, threshold=0.1)
    store = PseudoLabelDataset(tmp_path / "store")
    assert label_photos(scan, config, store, store.features).photos == 8
    assert sorted(len(list(folder.iterdir())) for folder in store.features.iterdir()) == [8, 8]


def test_a_store_made_otherwise_is_left_alone(
    tiny_store: PseudoLabelDataset, tiny_photos: Path, tiny_encoder: Path
) -> None:
    _, config = tiny.configure(tiny_photos, tiny_encoder)
    with pytest.raises(ConfigError, match="thing_clusters differ"):
        tiny_store.lock_config(replace(config, thing_clusters=2))


def test_what_only_the_codebook_needs_may_change_until_there_is_one(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    store = PseudoLabelDataset(tmp_path / "store")
    with pytest.raises(ConfigError, match="ask for fewer"):
        label_photos(scan, replace(config, thing_clusters=99), store, store.features)
    with pytest.raises(ConfigError, match="maskcut_n differ"):
        store.lock_config(replace(config, maskcut_n=1))
    assert label_photos(scan, config, store, store.features).photos == 8


def test_an_encoder_that_does_not_fit_leaves_no_store_behind(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    store = PseudoLabelDataset(tmp_path / "store")
    with pytest.raises(CheckpointError, match="no multiple"):
        label_photos(scan, replace(config, side_px=60), store, store.features)
    assert not store.folder.exists()


def test_a_folder_of_other_things_is_not_taken_for_a_store(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    _, config = tiny.configure(tiny_photos, tiny_encoder)
    with pytest.raises(ConfigError, match="no label store"):
        PseudoLabelDataset(tmp_path).lock_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"side_px": 54}, "multiple of 4"),
        ({"maskcut_n": 0}, "maskcut_n"),
        ({"threshold": 1.5}, "threshold"),
        ({"max_stuff_in_things": 1.5}, "max_stuff_in_things"),
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


def test_a_store_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path, tiny_store: PseudoLabelDataset) -> None:
    store = PseudoLabelDataset(tmp_path / "store")
    shutil.copytree(tiny_store.folder, store.folder)
    content = json.loads((store.folder / "label.json").read_text())
    del content["format_version"]
    (store.folder / "label.json").write_text(json.dumps(content))
    with pytest.raises(LabelStoreError, match="version 1, not 2: label its photos anew"):
        store.read_photos()


def test_a_finished_store_is_not_labelled_again(
    tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_photos: Path, tiny_encoder: Path
) -> None:
    store = PseudoLabelDataset(tmp_path / "store")
    shutil.copytree(tiny_store.folder, store.folder)
    before = {path: path.stat().st_mtime_ns for path in store.shards.rglob("*.png")}
    label_photos(*tiny.configure(tiny_photos, tiny_encoder), store=store, features=store.features)
    assert {path: path.stat().st_mtime_ns for path in store.shards.rglob("*.png")} == before != {}


def test_every_way_of_finding_gives_masks_on_the_patches_that_show_the_photo(
    tmp_path: Path, tiny_encoder: Path, tiny_photos: Path
) -> None:
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    photos = scan_photos(tiny_photos).photos
    cache, keys = (each(tmp_path, "0" * 64, tiny.SIDE_PX) for each in (open_cache, open_key_cache))
    fill_cache(cache, photos, encoder, tiny.SIDE_PX)
    fill_keys(keys, photos, encoder, tiny.SIDE_PX)
    view = partial(load_photo_features, cache, side_px=tiny.SIDE_PX)
    finders = {
        "patches": MaskProposer(config=MaskDiscoveryConfig(proposals="maskcut", threshold=0.6), encoder=encoder),
        "keys": MaskProposer(
            config=MaskDiscoveryConfig(proposals="maskcut", threshold=0.1, tokens="keys", maskcut_subtract_mean=True),
            encoder=encoder,
            keys=keys,
        ),
        "vote": MaskProposer(
            config=MaskDiscoveryConfig(proposals="vote"),
            encoder=encoder,
            views=fit_feature_projections(photos, view, encoder, 0),
        ),
    }
    wide = view(photos[0])  # 48 x 64 on a square of 56: three of four rows
    for name, finder in finders.items():
        found = finder.find(wide)
        assert found.soft.shape[1:] == (3, 4), name
        assert len(found.soft) == len(found.scores) > 0, name
        assert ((found.soft >= 0.0) & (found.soft <= 1.0)).all(), name


def test_what_maskcut_finds_is_salient(tmp_path: Path, tiny_encoder: Path, tiny_photos: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    photo = scan_photos(tiny_photos).photos[0]
    cache = open_cache(tmp_path, "0" * 64, tiny.SIDE_PX)
    fill_cache(cache, [photo], encoder, tiny.SIDE_PX)
    view = load_photo_features(cache, photo, tiny.SIDE_PX)
    found = MaskProposer(config=MaskDiscoveryConfig(proposals="maskcut"), encoder=encoder).find(view)
    assert (maskcut_foreground(encoder, view) == found.binary.any(0)).all()
    alike = np.zeros_like(view.maps)
    alike[..., 0] = 1.0
    assert not maskcut_foreground(encoder, replace(view, maps=alike)).any()


def test_views_do_not_depend_on_anything_but_the_seed(tmp_path: Path, tiny_encoder: Path, tiny_photos: Path) -> None:
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    photos = scan_photos(tiny_photos).photos
    cache = open_cache(tmp_path, "0" * 64, tiny.SIDE_PX)
    fill_cache(cache, photos, encoder, tiny.SIDE_PX)
    one, other = (
        fit_feature_projections(photos, partial(load_photo_features, cache, side_px=tiny.SIDE_PX), encoder, 1)
        for _ in range(2)
    )
    assert one.mean == pytest.approx(other.mean, abs=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maskcut_n": 0}, "maskcut_n"),
        ({"objects": 0}, "objects"),
        ({"objects": 13}, "objects must be at most 12"),
        ({"threshold": 1.0}, "threshold"),
        ({"proposals": "sam"}, "maskcut, vote"),
        ({"tokens": "values"}, "patches, keys"),
        ({"refinement": "none"}, "guided, crf"),
        ({"proposals": "vote", "tokens": "keys"}, "not with a vote"),
        ({"proposals": "vote", "maskcut_subtract_mean": True}, "not with a vote"),
        ({"proposals": "vote", "maskcut_reference_filters": True}, "not with a vote"),
    ],
)
def test_options_out_of_range_or_at_odds_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskDiscoveryConfig(**options)  # type: ignore[arg-type]
