import numpy as np
import pytest

from model.errors import ConfigError
from training.labels.clusters.cluster import assign, cluster, fit_whitening, whiten


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
    centroids = cluster(vectors, 3, seed=0)
    numbers = assign(vectors, centroids).reshape(3, 50)
    assert all(len(set(row.tolist())) == 1 for row in numbers)
    assert len(set(numbers[:, 0].tolist())) == 3
    assert np.linalg.norm(centroids, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_the_same_seed_gives_the_same_clusters() -> None:
    vectors = np.random.default_rng(2).normal(size=(200, 4)).astype(np.float32)
    assert np.array_equal(cluster(vectors, 5, seed=3), cluster(vectors, 5, seed=3))


def test_more_clusters_than_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 vectors cannot make 3 clusters"):
        cluster(np.ones((2, 4), np.float32), 3, seed=0)


def test_no_cluster_stays_empty_however_often_a_vector_is_repeated() -> None:
    # Of 300 vectors 298 are the same: random seeds fall on them, and k-means never finds the other two.
    vectors = np.repeat(np.eye(3, 4), [298, 1, 1], axis=0).astype(np.float32)
    for is_spherical in (True, False):
        centroids = cluster(vectors, 3, seed=0, is_spherical=is_spherical)
        numbers = assign(vectors, centroids, is_spherical=is_spherical)
        assert sorted(np.bincount(numbers, minlength=3).tolist()) == [1, 1, 298]


def test_one_start_of_kmeans_plus_plus_finds_what_random_starts_find() -> None:
    generator = np.random.default_rng(1)
    vectors = np.repeat(np.eye(6, 8), 30, axis=0) + generator.normal(0, 0.02, (180, 8))
    centroids = cluster(vectors, 6, seed=0, seeding="plusplus")
    numbers = assign(vectors, centroids).reshape(6, 30)
    assert all(len(set(row.tolist())) == 1 for row in numbers)
    assert len(set(numbers[:, 0].tolist())) == 6


def test_distances_tell_apart_what_angles_do_not() -> None:
    vectors = np.array([[1, 0], [1.1, 0], [5, 0], [5.1, 0]], np.float32)
    near, far = sorted(cluster(vectors, 2, seed=0, is_spherical=False)[:, 0].tolist())
    assert (near, far) == (pytest.approx(1.05), pytest.approx(5.05))
    centroids = np.array([[1.05, 0], [5.05, 0]], np.float32)
    assert assign(vectors, centroids, is_spherical=False).tolist() == [0, 0, 1, 1]
    assert assign(vectors, centroids).tolist() == [1, 1, 1, 1]
