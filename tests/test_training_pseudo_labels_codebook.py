from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.contract import InputSize
from model.errors import ConfigError, LabelStoreError
from model.images import plan_letterbox
from training.data.dataset import PseudoLabelConfig
from training.data.label_config import MAX_OBJECTS, CodebookConfig
from training.data.photos import PhotoFile
from training.pseudo_labels.codebook import (
    Codebook,
    ObjectnessScorer,
    compute_score_thresholds,
    extract_codebook_config,
    fit_objectness,
    load_codebook,
    merge_options,
    smooth_with_masks,
)
from training.pseudo_labels.maskcut import MaskProposals
from training.pseudo_labels.photo_features import PhotoFeatures

CONFIG = CodebookConfig(encoder_hash="e", pca_dim=2, thing_clusters=2, stuff_clusters=1, stego_steps=7)
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
    read = load_codebook(tmp_path / "codebook.npz")
    assert read.config == CONFIG
    assert (read.things == np.eye(2)).all()
    assert (read.inside == [0.25]).all()
    assert (read.head["linear.weight"] == 0.5).all()
    assert read.digest == BOOK.digest


def test_what_tells_things_comes_along_and_without_it_the_digest_stays(tmp_path: Path) -> None:
    judged = replace(BOOK, parts=np.eye(2), salient=np.array([0.5, 0.125]), score_thresholds=np.array([0.75]))
    judged.write(tmp_path / "codebook.npz")
    read = load_codebook(tmp_path / "codebook.npz")
    assert (read.parts.tolist(), read.salient.tolist()) == ([[1, 0], [0, 1]], [0.5, 0.125])
    assert read.score_thresholds.tolist() == [0.75]
    assert read.digest == judged.digest != BOOK.digest == replace(judged, parts=np.zeros((0, 2))).digest


def test_the_digest_tells_numbers_and_settings_apart() -> None:
    seeded = replace(BOOK, config=replace(CONFIG, seed=1))
    others = [replace(BOOK, things=2 * np.eye(2)), seeded, replace(BOOK, head={})]
    assert len({BOOK.digest, *(other.digest for other in others)}) == 4


def test_a_broken_one_and_one_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "codebook.npz"
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(LabelStoreError, match=r"codebook\.npz"):
        load_codebook(path)
    np.savez(path, mean=BOOK.mean, projection=BOOK.projection, things=BOOK.things, stuff=BOOK.stuff)
    with pytest.raises(LabelStoreError, match="no codebook that can be read"):
        load_codebook(path)


def test_a_codebook_brings_its_settings_and_suffers_no_others() -> None:
    adopted = merge_options(BOOK, {"encoder_hash": "e", "maskcut_n": 5})
    assert (adopted["thing_clusters"], adopted["stego_steps"], adopted["maskcut_n"]) == (2, 7, 5)
    assert adopted["codebook"] == BOOK.digest
    with pytest.raises(ConfigError, match="encoder_hash e, thing_clusters 2"):
        merge_options(BOOK, {"encoder_hash": "other", "thing_clusters": 3})


def test_the_codebook_s_part_is_taken_out_of_a_label_configuration() -> None:
    config = PseudoLabelConfig(photos="p", photos_hash="h", encoder="f", encoder_hash="e", thing_clusters=5)
    assert extract_codebook_config(config) == CodebookConfig(encoder_hash="e", thing_clusters=5)


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


PHOTO = PhotoFile(path=Path("p"), name="p", digest="d", height=56, width=56)
LEFT, RIGHT, ALL = np.zeros((3, 4, 4), bool)
LEFT[:, :2] = RIGHT[:, 2:] = ALL[:] = True


def open_photo() -> PhotoFeatures:
    """Two kinds of patches: the left and the right half of a 4 x 4 grid."""
    maps = np.zeros((4, 4, 4, 8), np.float16)
    maps[:, :, :2, 0] = maps[:, :, 2:, 1] = 1.0
    placement = plan_letterbox(56, 56, [InputSize.square(tiny.SIDE_PX)], 4)
    return PhotoFeatures(photo=PHOTO, letterbox=placement, maps=maps)


def make_judge(left: float, right: float) -> ObjectnessScorer:
    """One that knows how often either kind is salient."""
    directions = open_photo().join()[0, [0, 3]]
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return ObjectnessScorer(mean=np.zeros(16), projection=np.eye(16), parts=units, salient=np.array([left, right]))


def test_of_masks_that_views_agree_on_equally_the_more_salient_leads() -> None:
    found = MaskProposals(soft=np.array([LEFT, ALL, RIGHT], np.float32), scores=np.array([9.0, 9.0, 9.0], np.float32))
    judged = make_judge(0.04, 0.36).judge(open_photo(), found)
    assert judged.scores == pytest.approx(np.sqrt([0.36, 0.2, 0.04]))
    assert (judged.binary == [RIGHT, ALL, LEFT]).all()


def test_a_score_grows_with_the_root_of_the_votes_and_stays_in_0_to_1() -> None:
    found = MaskProposals(soft=np.array([LEFT] * 4, np.float32), scores=np.array([20.0, 4.0, 1.0, -0.5]))
    judged = make_judge(1.0, 0.0).judge(open_photo(), found)
    assert judged.scores == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


def test_a_photo_without_masks_has_none_to_judge() -> None:
    none = MaskProposals(soft=np.zeros((0, 4, 4), np.float32), scores=np.zeros(0, np.float32))
    assert make_judge(1.0, 1.0).judge(open_photo(), none).soft.shape == (0, 4, 4)


def test_salience_is_the_share_of_a_kind_that_stands_out() -> None:
    view = open_photo()
    sample = np.repeat(view.join().reshape(16, 16), 2, axis=0)
    views = [view, view]
    salient = iter([RIGHT, RIGHT & (np.arange(4)[:, None] < 2)])
    judge = fit_objectness(sample, np.zeros(16), np.eye(16), views, lambda view: next(salient), 0)
    halves = MaskProposals(soft=np.array([LEFT, RIGHT], np.float32), scores=np.full(2, 9.0, np.float32))
    own = judge.judge(view, halves)
    assert own.scores == pytest.approx([np.sqrt(0.75), 0.0])
    assert (own.binary[0] == RIGHT).all()


def test_least_scores_leave_one_more_mask_a_photo_each() -> None:
    least = compute_score_thresholds([np.array([0.9, 0.8, 0.1]), np.array([0.7])])
    assert least.tolist() == [0.8, 0.1] + [0.1] * (MAX_OBJECTS - 2)
    assert compute_score_thresholds([np.zeros(0)]).tolist() == [0.0] * MAX_OBJECTS


TOKENS = np.array([[[1, 0], [0, 1], [0, 1], [1, 0]]], np.float32)


def find(masks: list[list[int]], scores: list[float]) -> MaskProposals:
    return MaskProposals(soft=np.array(masks, np.float32)[:, None], scores=np.array(scores, np.float32))


def test_a_patch_is_half_itself_and_half_the_mean_of_its_mask() -> None:
    blended = smooth_with_masks(TOKENS, find([[1, 1, 1, 0]], [2.0]))[0]
    mean = np.array([1, 2]) / np.sqrt(5)
    for place in range(3):
        expected = TOKENS[0, place] + mean
        assert blended[place] == pytest.approx(expected / np.linalg.norm(expected))
    assert blended[3].tolist() == [1, 0]  # in no mask


def test_a_mask_counts_by_the_square_of_its_score_and_not_below_zero() -> None:
    blended = smooth_with_masks(TOKENS, find([[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], [3.0, 1.0, -5.0]))[0, 3]
    means = 9 * np.array([1, 0]) + np.array([1, 2]) / 3
    expected = np.array([1, 0]) + means / np.linalg.norm(means)
    assert blended == pytest.approx(expected / np.linalg.norm(expected))


def test_without_masks_nothing_changes() -> None:
    none = MaskProposals(soft=np.zeros((0, 1, 4), np.float32), scores=np.zeros(0, np.float32))
    assert (smooth_with_masks(TOKENS, none) == TOKENS).all()
