from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.checkpoints.state_dicts import load_encoder
from model.contract import InputSize
from model.errors import ConfigError
from model.images import plan_letterbox
from training.data.label_config import CodebookConfig
from training.data.photos import PhotoFile
from training.pseudo_labels.clustering import (
    CodebookInputs,
    fit_codebook,
    make_mask_embedder,
    make_stuff_segmenter,
    select_things,
)
from training.pseudo_labels.codebook import load_codebook
from training.pseudo_labels.kmeans import fit_whitening, kmeans, nearest_centroid, whiten
from training.pseudo_labels.maskcut import MaskProposals, proposals_from_masks
from training.pseudo_labels.photo_features import PhotoFeatures

PHOTOS = [PhotoFile(path=Path(str(i)), name=str(i), digest=str(i), height=56, width=56) for i in range(6)]
CONFIG = CodebookConfig(
    encoder_hash="e",
    side_px=tiny.SIDE_PX,
    pca_dim=3,
    thing_clusters=2,
    stuff_clusters=2,
    stego="tiny",
    stego_steps=3,
)


def open_photo(photo: PhotoFile) -> PhotoFeatures:
    """Two kinds of patches, the left and the right half of a 4 x 4 grid, and some noise."""
    maps = np.random.default_rng(int(photo.name)).normal(0, 0.1, (4, 4, 4, 64))
    maps[:, :, :2, :32] += 1.0
    maps[:, :, 2:, :32] -= 1.0
    placement = plan_letterbox(56, 56, [InputSize.square(tiny.SIDE_PX)], 4)
    return PhotoFeatures(photo=photo, letterbox=placement, maps=maps.astype(np.float16))


def find(view: PhotoFeatures) -> MaskProposals:
    """The right half in even photos, its upper patches in odd ones; in the last one nothing."""
    masks = np.zeros((0 if view.photo.name == "5" else 1, 4, 4), bool)
    masks[:, : 4 - 2 * (int(view.photo.name) % 2), 2:] = True
    return proposals_from_masks(masks)


@pytest.fixture
def material(tmp_path: Path, tiny_encoder: Path) -> CodebookInputs:
    return CodebookInputs(
        photos=PHOTOS,
        view=open_photo,
        found=find,
        encoder=load_encoder(str(tiny_encoder), tiny.SIDE_PX),
        encoder_source=str(tiny_encoder),
        maps=tmp_path,
        scratch=tmp_path,
    )


def test_stuff_clusters_know_how_much_of_them_lies_in_masks(material: CodebookInputs) -> None:
    book = fit_codebook(material, CONFIG)
    labels = make_stuff_segmenter(book, material).label_patches(open_photo(PHOTOS[0]))
    left, right = labels[0, 0], labels[0, 3]
    assert labels.tolist() == [[left, left, right, right]] * 4
    # Of the right halves' 6 x 8 patches, 3 x 8 and 2 x 4 lie in masks.
    assert book.inside[right - 1] == pytest.approx(32 / 48)
    assert book.inside[left - 1] == 0.0


def test_a_fitted_codebook_does_the_same_once_it_was_stored(material: CodebookInputs, tmp_path: Path) -> None:
    for stuff in ("kmeans", "regions", "stego"):
        book = fit_codebook(material, replace(CONFIG, stuff=stuff))  # type: ignore[arg-type]
        book.write(tmp_path / "codebook.npz")
        stored = load_codebook(tmp_path / "codebook.npz")
        view = open_photo(PHOTOS[1])
        one, other = (make_stuff_segmenter(each, material).label_pixels(view) for each in (book, stored))
        assert (one == other).all()
        vectors = make_mask_embedder(stored, material).embed(view, find(view).binary)
        assert nearest_centroid(vectors, stored.things)[0] in (0, 1)


def test_photos_without_any_mask_make_no_codebook(material: CodebookInputs) -> None:
    bare = replace(material, photos=[PHOTOS[5]] * 6)
    with pytest.raises(ConfigError, match="6 photos gave no mask"):
        fit_codebook(bare, CONFIG)


def test_of_a_vote_s_masks_only_likely_things_make_clusters(material: CodebookInputs) -> None:
    def find_both(view: PhotoFeatures) -> MaskProposals:
        halves = np.zeros((2, 4, 4), bool)
        halves[0, :, :2] = halves[1, :, 2:] = True
        return MaskProposals(soft=halves.astype(np.float32), scores=np.array([6.0, 5.0], np.float32))

    voted = replace(material, found=find_both, salient=lambda view: find(view).binary.any(0), objects=1)
    book = fit_codebook(voted, CONFIG)
    chosen = select_things(book, voted, open_photo(PHOTOS[0]))
    assert chosen.binary.astype(int)[:, 0].tolist() == [[0, 0, 1, 1]]  # though more views agree on the left half
    right = make_stuff_segmenter(book, voted).label_patches(open_photo(PHOTOS[0]))[0, 3]
    assert book.inside.tolist() == [float(each == right - 1) for each in range(2)]


def test_whitened_tokens_have_no_mean_and_unit_length_and_the_loud_axis_is_quiet() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.normal(0, 1, (5000, 6)) * [100, 1, 1, 1, 1, 1] + 7
    mean, projection = fit_whitening(tokens, 6)
    projected = (tokens - mean) @ projection
    # 5,000 samples whiten themselves exactly: only rounding is left.
    assert np.cov(projected.T) == pytest.approx(np.eye(6), abs=2e-3)
    assert np.linalg.norm(whiten(tokens, mean, projection), axis=1) == pytest.approx(1.0)


def test_clusters_are_the_directions_that_the_vectors_have() -> None:
    generator = np.random.default_rng(1)
    centres = np.eye(3, 8)
    vectors = np.repeat(centres, 50, axis=0) + generator.normal(0, 0.05, (150, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    centroids = kmeans(vectors, 3, seed=0)
    numbers = nearest_centroid(vectors, centroids).reshape(3, 50)
    assert all(len(set(row.tolist())) == 1 for row in numbers)
    assert len(set(numbers[:, 0].tolist())) == 3
    assert np.linalg.norm(centroids, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_the_same_seed_gives_the_same_clusters() -> None:
    vectors = np.random.default_rng(2).normal(size=(200, 4)).astype(np.float32)
    assert np.array_equal(kmeans(vectors, 5, seed=3), kmeans(vectors, 5, seed=3))


def test_more_clusters_than_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 vectors cannot make 3 clusters"):
        kmeans(np.ones((2, 4), np.float32), 3, seed=0)


def test_no_cluster_stays_empty_however_often_a_vector_is_repeated() -> None:
    # Of 300 vectors 298 are the same: random seeds fall on them, and k-means never finds the other two.
    vectors = np.repeat(np.eye(3, 4), [298, 1, 1], axis=0).astype(np.float32)
    for is_spherical in (True, False):
        centroids = kmeans(vectors, 3, seed=0, is_spherical=is_spherical)
        numbers = nearest_centroid(vectors, centroids, is_spherical=is_spherical)
        assert sorted(np.bincount(numbers, minlength=3).tolist()) == [1, 1, 298]


def test_one_start_of_kmeans_plus_plus_finds_what_random_starts_find() -> None:
    generator = np.random.default_rng(1)
    vectors = np.repeat(np.eye(6, 8), 30, axis=0) + generator.normal(0, 0.02, (180, 8))
    centroids = kmeans(vectors, 6, seed=0, kmeans_init="plusplus")
    numbers = nearest_centroid(vectors, centroids).reshape(6, 30)
    assert all(len(set(row.tolist())) == 1 for row in numbers)
    assert len(set(numbers[:, 0].tolist())) == 6


def test_distances_tell_apart_what_angles_do_not() -> None:
    vectors = np.array([[1, 0], [1.1, 0], [5, 0], [5.1, 0]], np.float32)
    near, far = sorted(kmeans(vectors, 2, seed=0, is_spherical=False)[:, 0].tolist())
    assert (near, far) == (pytest.approx(1.05), pytest.approx(5.05))
    centroids = np.array([[1.05, 0], [5.05, 0]], np.float32)
    assert nearest_centroid(vectors, centroids, is_spherical=False).tolist() == [0, 0, 1, 1]
    assert nearest_centroid(vectors, centroids).tolist() == [1, 1, 1, 1]
