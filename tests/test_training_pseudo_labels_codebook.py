"""Storing and applying a codebook: objectness, mask embeddings, stuff."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokens import make_photo_features

from model.errors import ConfigError, DatasetError
from training.data.features import PhotoFeatures
from training.data.label_config import CodebookConfig, PseudoLabelOptions
from training.pseudo_labels.codebook import (
    Codebook,
    load_codebook,
    smooth_with_masks,
    use_codebook_settings,
)
from training.pseudo_labels.consensus import FeatureProjections
from training.pseudo_labels.maskcut import MaskProposals

CONFIG = CodebookConfig(encoder_hash="e", pca_dim=2, thing_clusters=2, stuff_clusters=1, stego_steps=7)
CODEBOOK = Codebook(
    config=CONFIG,
    mean=np.arange(3.0),
    projection=np.ones((3, 2)),
    thing_centroids=np.eye(2),
    stuff_centroids=np.zeros((1, 2)),
    stuff_in_masks=np.array([0.25]),
    stego_head={"linear.weight": np.full((2, 3), 0.5, np.float32)},
)
WITH_OBJECTNESS = replace(
    CODEBOOK,
    patch_centroids=np.eye(2),
    patch_objectness=np.array([0.5, 0.125]),
    score_thresholds=np.array([0.75]),
    projections=FeatureProjections(mean=np.zeros(2), projection=np.eye(2)),
)
LEFT, RIGHT, ALL = np.zeros((3, 4, 4), bool)
LEFT[:, :2] = RIGHT[:, 2:] = ALL[:] = True
ROW = np.array([[[1, 0], [0, 1], [0, 1], [1, 0]]], np.float32)


def draw_halves(height: int = 56) -> PhotoFeatures:
    """The left and the right half of a 4 x 4 grid have different features."""
    maps = np.zeros((2, 4, 4, 8))
    maps[:, :, :2, 0] = maps[:, :, 2:, 1] = 1.0
    return make_photo_features(maps, height=height)


def make_proposals(masks: list[np.ndarray], scores: list[float]) -> MaskProposals:
    soft = np.array(masks, np.float32).reshape(len(masks), 4, 4)
    return MaskProposals(soft=soft, scores=np.array(scores, np.float32))


def make_row_proposals(masks: list[list[int]], scores: list[float]) -> MaskProposals:
    return MaskProposals(soft=np.array(masks, np.float32).reshape(-1, 1, 4), scores=np.array(scores, np.float32))


def with_objectness(left: float, right: float) -> Codebook:
    """A codebook with one patch cluster per half."""
    directions = draw_halves().concat_layers()[0, [0, 3]]
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return replace(
        CODEBOOK,
        mean=np.zeros(16),
        projection=np.eye(16),
        patch_centroids=units,
        patch_objectness=np.array([left, right]),
    )


@pytest.mark.parametrize("codebook", [CODEBOOK, WITH_OBJECTNESS], ids=["plain", "objectness"])
def test_a_codebook_round_trips_to_disk(tmp_path: Path, codebook: Codebook) -> None:
    codebook.save(tmp_path / "codebook.npz")
    loaded = load_codebook(tmp_path / "codebook.npz")
    assert loaded.config == CONFIG
    assert (loaded.thing_centroids == np.eye(2)).all()
    assert (loaded.stego_head["linear.weight"] == 0.5).all()
    assert loaded.patch_objectness.tolist() == codebook.patch_objectness.tolist()
    assert (loaded.projections is None) == (codebook.projections is None)
    assert loaded.digest == codebook.digest


def test_the_digest_depends_on_arrays_and_settings() -> None:
    others = [
        replace(CODEBOOK, thing_centroids=2 * np.eye(2)),
        replace(CODEBOOK, config=replace(CONFIG, seed=1)),
        replace(CODEBOOK, stego_head={}),
        WITH_OBJECTNESS,
    ]
    assert len({CODEBOOK.digest, *(other.digest for other in others)}) == 5


def test_a_damaged_codebook_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "codebook.npz"
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DatasetError, match=r"codebook\.npz is not a readable codebook"):
        load_codebook(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format_version": 2}, "format version 2, this release reads 3; run `useg label` again"),
        ({"format_version": 3, "encoder_hash": "e", "pca_dims": 3}, "did you mean 'pca_dim'"),
        ({"format_version": 3, "encoder_hash": "e", "stuff": "crf"}, "stuff"),
        ({"format_version": 3, "encoder_hash": "e", "layers": 3}, "layers"),
    ],
)
def test_unknown_versions_keys_and_values_are_rejected(tmp_path: Path, config: dict[str, object], message: str) -> None:
    np.savez(tmp_path / "codebook.npz", config=np.array(json.dumps(config)))
    with pytest.raises(DatasetError, match=message):
        load_codebook(tmp_path / "codebook.npz")


def test_a_codebook_replaces_default_settings_and_contradicts_others() -> None:
    used = use_codebook_settings(PseudoLabelOptions(maskcut_n=5, pca_dim=2), CODEBOOK, "e")
    assert (used.thing_clusters, used.stego_steps, used.maskcut_n, used.pca_dim) == (2, 7, 5, 2)
    with pytest.raises(ConfigError, match="fitted with thing_clusters 2, encoder e: leave"):
        use_codebook_settings(PseudoLabelOptions(thing_clusters=3), CODEBOOK, "other")


def test_of_masks_with_equal_consensus_the_one_with_more_objectness_comes_first() -> None:
    ranked = with_objectness(0.04, 0.36).rank_by_objectness(
        draw_halves(), make_proposals([LEFT, ALL, RIGHT], [9.0, 9.0, 9.0])
    )
    assert ranked.scores == pytest.approx(np.sqrt([0.36, 0.2, 0.04]))
    assert (ranked.binary == [RIGHT, ALL, LEFT]).all()


def test_the_score_is_the_root_of_consensus_times_objectness_within_0_to_1() -> None:
    found = make_proposals([LEFT] * 4, [20.0, 4.0, 1.0, -0.5])
    ranked = with_objectness(1.0, 0.0).rank_by_objectness(draw_halves(), found)
    assert ranked.scores == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
    assert len(with_objectness(1.0, 1.0).rank_by_objectness(draw_halves(), make_proposals([], [])).soft) == 0


def test_a_mask_embedding_is_the_mean_of_whitened_features_at_unit_length() -> None:
    features = make_photo_features(np.random.default_rng(0).normal(size=(2, 4, 4, 64)))
    codebook = replace(CODEBOOK, mean=np.zeros(128, np.float32), projection=np.eye(128, 5, dtype=np.float32))
    upper_left = np.zeros((4, 4), bool)
    upper_left[:2, :2] = True
    (vector,) = codebook.embed_masks(features, upper_left[None])
    patches = features.concat_layers()[:2, :2, :5].reshape(4, 5)
    mean = (patches / np.linalg.norm(patches, axis=1, keepdims=True)).mean(0)
    assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)  # single precision
    assert codebook.embed_masks(features, np.zeros((0, 4, 4), bool)).shape[0] == 0


def test_a_patch_is_smoothed_half_by_itself_and_half_by_the_mean_of_its_mask() -> None:
    smoothed = smooth_with_masks(ROW, make_row_proposals([[1, 1, 1, 0]], [2.0]))[0]
    mean = np.array([1, 2]) / np.sqrt(5)
    for index in range(3):
        expected = ROW[0, index] + mean
        assert smoothed[index] == pytest.approx(expected / np.linalg.norm(expected))
    assert smoothed[3].tolist() == [1, 0]  # in no mask


def test_masks_are_weighted_by_their_squared_scores_and_negative_scores_by_zero() -> None:
    proposals = make_row_proposals([[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], [3.0, 1.0, -5.0])
    means = 9 * np.array([1, 0]) + np.array([1, 2]) / 3
    expected = np.array([1, 0]) + means / np.linalg.norm(means)
    assert smooth_with_masks(ROW, proposals)[0, 3] == pytest.approx(expected / np.linalg.norm(expected))
    assert (smooth_with_masks(ROW, make_row_proposals([], [])) == ROW).all()


def test_a_pixel_takes_the_most_similar_stuff_cluster_and_borders_cross_patches() -> None:
    codebook = replace(with_objectness(0.5, 0.5), config=replace(CONFIG, stuff="kmeans"))
    codebook = replace(codebook, stuff_centroids=codebook.patch_centroids)
    stuff = codebook.segment_stuff(draw_halves(height=28), make_proposals([], []))
    assert stuff.shape == (28, 56)
    assert (stuff[:, :27] == 1).all()
    assert (stuff[:, 29:] == 2).all()
