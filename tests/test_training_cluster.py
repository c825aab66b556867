from pathlib import Path

import numpy as np
import pytest

from model.errors import ConfigError, LabelStoreError
from training.cluster import Codebook, assign, cluster, fit_whitening, read_codebook, whiten


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


def test_a_codebook_comes_back_as_it_was_written_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    codebook = Codebook(mean=np.arange(3.0), projection=np.ones((3, 2)), things=np.eye(2), stuff=np.zeros((1, 2)))
    codebook.write(tmp_path / "codebook.npz")
    assert (read_codebook(tmp_path / "codebook.npz").things == np.eye(2)).all()
    (tmp_path / "codebook.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(LabelStoreError, match=r"codebook\.npz"):
        read_codebook(tmp_path / "codebook.npz")
