import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tokens import make_photo_features

from model.checkpoints.dino import load_encoder
from model.errors import ConfigError, DatasetError
from training.data.dataset import PseudoLabelDataset
from training.data.features import FeatureStore, PhotoFeatures
from training.data.label_config import MAX_OBJECTS, CodebookConfig, PseudoLabelConfig, PseudoLabelOptions
from training.data.photos import PhotoFile
from training.pseudo_labels.clustering import (
    CodebookInputs,
    fit_codebook,
    fit_score_thresholds,
    kmeans,
)
from training.pseudo_labels.codebook import (
    Codebook,
    load_codebook,
    nearest_centroid,
    smooth_with_masks,
    use_codebook_settings,
)
from training.pseudo_labels.consensus import FeatureProjections
from training.pseudo_labels.maskcut import MaskProposals, proposals_from_masks

PHOTOS = [PhotoFile(path=Path(str(i)), name=str(i), digest=str(i), height=56, width=56) for i in range(6)]


@pytest.fixture
def inputs(tmp_path: Path, tiny_encoder: Path) -> CodebookInputs:
    """Features: the left and the right half differ. Masks: the right half, in odd photos its upper part, in 5 none."""
    config = PseudoLabelConfig(
        photos="photos",
        photos_hash="p",
        encoder=str(tiny_encoder),
        encoder_hash="e",
        side_px=tiny.SIDE_PX,
        layers=(2, 3),
        proposals="maskcut",
        pca_dim=3,
        thing_clusters=2,
        stuff_clusters=2,
        stego_preset="tiny",
        stego_steps=3,
    )
    encoder = load_encoder(str(tiny_encoder), tiny.SIDE_PX)
    features = FeatureStore(tmp_path / "features", encoder, config.encoder_hash, config)
    dataset = PseudoLabelDataset(tmp_path / "labels")
    for index, photo in enumerate(PHOTOS):
        maps = np.random.default_rng(index).normal(0, 0.1, (4, 4, 4, 64))
        maps[:, :, :2, :32] += 1.0
        maps[:, :, 2:, :32] -= 1.0
        features.cache.write(photo.digest, maps.astype(np.float16))
        masks = np.zeros((0 if index == 5 else 1, 4, 4), bool)
        masks[:, : 4 - 2 * (index % 2), 2:] = True
        proposals_from_masks(masks).write(dataset.proposals(photo.digest))
    return CodebookInputs(config=config, photos=PHOTOS, features=features, dataset=dataset)


def load(inputs: CodebookInputs, index: int) -> tuple[PhotoFeatures, MaskProposals]:
    return list(inputs.load("test"))[index]


def test_stuff_clusters_know_the_fraction_of_them_that_lies_in_masks(inputs: CodebookInputs) -> None:
    codebook = fit_codebook(inputs)
    stuff = nearest_centroid(codebook.embed_stuff(*load(inputs, 0)), codebook.stuff_centroids) + 1
    left, right = stuff[0, 0], stuff[0, 3]
    assert stuff.tolist() == [[left, left, right, right]] * 4
    # Of the right halves' 6 x 8 patches, 3 x 8 and 2 x 4 lie in masks.
    assert codebook.stuff_in_masks[right - 1] == pytest.approx(32 / 48)
    assert codebook.stuff_in_masks[left - 1] == 0.0


@pytest.mark.parametrize("stuff", ["kmeans", "regions", "stego"])
def test_a_fitted_codebook_assigns_the_same_clusters_after_loading(
    inputs: CodebookInputs, tmp_path: Path, stuff: str
) -> None:
    config = replace(inputs.config, stuff=stuff)  # type: ignore[arg-type]
    codebook = fit_codebook(replace(inputs, config=config))
    codebook.save(tmp_path / "codebook.npz")
    features, masks = load(inputs, 1)
    loaded = load_codebook(tmp_path / "codebook.npz")
    assert (codebook.segment_stuff(features, masks) == loaded.segment_stuff(features, masks)).all()
    things = codebook.assign_things(features, masks.binary)
    assert things.tolist() == loaded.assign_things(features, masks.binary).tolist()
    assert things[0] in (1, 2)


def test_photos_without_masks_are_an_error(inputs: CodebookInputs) -> None:
    with pytest.raises(ConfigError, match="6 photos have no mask"):
        fit_codebook(replace(inputs, photos=[PHOTOS[5]] * 6))


def test_of_consensus_masks_only_those_with_objectness_make_clusters(inputs: CodebookInputs) -> None:
    halves = np.zeros((2, 4, 4), np.float32)
    halves[0, :, :2] = halves[1, :, 2:] = 1.0
    for index, photo in enumerate(PHOTOS):
        MaskProposals(soft=halves, scores=np.array([6.0, 5.0], np.float32)).write(
            inputs.dataset.proposals(photo.digest)
        )
        # MaskCut finds the right half: two of its patches have a feature of their own.
        maps = np.random.default_rng(index).normal(0, 0.1, (4, 4, 4, 64))
        maps[..., 0] += 3.0
        maps[:, 1:3, 2:, 0] -= 3.0
        maps[:, 1:3, 2:, 1] += 3.0
        maps[:, :, 2:, 2] += 1.0
        inputs.features.cache.write(photo.digest, maps.astype(np.float16))
    config = replace(inputs.config, proposals="consensus", objects_per_image=1)
    codebook = fit_codebook(replace(inputs, config=config))
    chosen = codebook.select_things(*load(inputs, 0), 1)
    assert chosen.binary[:, 0].tolist() == [[False, False, True, True]]  # the left half has the higher consensus


def test_score_thresholds_leave_one_more_mask_per_photo_each() -> None:
    thresholds = fit_score_thresholds([np.array([0.9, 0.8, 0.1]), np.array([0.7])])
    assert thresholds.tolist() == [0.8, 0.1] + [0.1] * (MAX_OBJECTS - 2)
    assert fit_score_thresholds([np.zeros(0)]).tolist() == [0.0] * MAX_OBJECTS


def test_no_cluster_stays_empty_with_repeated_vectors() -> None:
    # 298 of 300 vectors are equal: random starts pick them, and k-means never finds the other two.
    vectors = np.repeat(np.eye(3, 4), [298, 1, 1], axis=0).astype(np.float32)
    numbers = nearest_centroid(vectors, kmeans(vectors, 3, seed=0))
    assert sorted(np.bincount(numbers, minlength=3).tolist()) == [1, 1, 298]


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


def make_proposals(masks: list[Any], scores: list[float], rows: int = 4) -> MaskProposals:
    soft = np.array(masks, np.float32).reshape(len(masks), rows, 4)
    return MaskProposals(soft=soft, scores=np.array(scores, np.float32))


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


def test_the_digest_depends_on_arrays_and_settings() -> None:
    others = [
        replace(CODEBOOK, thing_centroids=2 * np.eye(2)),
        replace(CODEBOOK, config=replace(CONFIG, seed=1)),
        replace(CODEBOOK, stego_head={}),
        WITH_OBJECTNESS,
    ]
    assert len({CODEBOOK.digest, *(other.digest for other in others)}) == 5


def test_a_damaged_codebook_and_one_of_another_version_are_errors_that_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "codebook.npz"
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DatasetError, match=r"codebook\.npz is not a readable codebook"):
        load_codebook(path)
    np.savez(path, config=np.array(json.dumps({"format_version": 2})))
    with pytest.raises(DatasetError, match=r"codebook\.npz .* format version 2, this release reads 3; run"):
        load_codebook(path)


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


def test_masks_are_weighted_by_their_squared_scores_and_negative_scores_by_zero() -> None:
    proposals = make_proposals([[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], [3.0, 1.0, -5.0], rows=1)
    means = 9 * np.array([1, 0]) + np.array([1, 2]) / 3
    expected = np.array([1, 0]) + means / np.linalg.norm(means)
    assert smooth_with_masks(ROW, proposals)[0, 3] == pytest.approx(expected / np.linalg.norm(expected))
    assert (smooth_with_masks(ROW, make_proposals([], [], rows=1)) == ROW).all()


def test_a_pixel_takes_the_most_similar_stuff_cluster_and_borders_cross_patches() -> None:
    codebook = replace(with_objectness(0.5, 0.5), config=replace(CONFIG, stuff="kmeans"))
    codebook = replace(codebook, stuff_centroids=codebook.patch_centroids)
    stuff = codebook.segment_stuff(draw_halves(height=28), make_proposals([], []))
    assert stuff.shape == (28, 56)
    assert (stuff[:, :27] == 1).all()
    assert (stuff[:, 29:] == 2).all()
