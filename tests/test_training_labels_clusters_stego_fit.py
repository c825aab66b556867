from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import ConfigError
from training.labels.clusters.stego_fit import Stego, cut_crop, find_neighbours, train_stego
from training.labels.clusters.stego_recipe import STEGO_PRESETS
from training.photos import PhotoFile

TINY = STEGO_PRESETS["tiny"]
PHOTOS = [PhotoFile(path=Path(str(i)), name=str(i), digest=str(i), height=8, width=8) for i in range(4)]


def read_tokens(photo: PhotoFile) -> np.ndarray:
    """Left and right halves of two kinds, with a little noise of the photo's own."""
    tokens = np.random.default_rng(int(photo.name)).normal(0, 0.1, (8, 8, 12)).astype(np.float32)
    tokens[:, :4, 0] += 3
    tokens[:, 4:, 1] += 3
    return tokens


def train(checkpoint: Path, *, steps: int, seed: int = 0) -> Stego:
    config = replace(TINY, steps=steps, checkpoint_every=3)
    return train_stego(PHOTOS, read_tokens, 2, config, seed, checkpoint)


def list_weights(stego: Stego) -> list[torch.Tensor]:
    return [*stego.head.state_dict().values(), torch.from_numpy(stego.centroids)]


def test_crops_are_the_four_corners_and_the_middle_in_half_the_size() -> None:
    tokens = np.arange(24).reshape(4, 6, 1)
    assert [cut_crop(tokens, place)[0, 0, 0] for place in range(5)] == [0, 3, 12, 15, 7]
    assert cut_crop(tokens, 4)[..., 0].tolist() == [[7, 8, 9], [13, 14, 15]]
    assert cut_crop(tokens[:1, :1], 3).shape == (1, 1, 1)


def test_neighbours_are_the_nearest_others_by_angle() -> None:
    angles = np.radians([0, 1, 3, 90, 92])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32) * [[1], [9], [1], [1], [5]]
    assert find_neighbours(vectors.astype(np.float32), 1)[:, 0].tolist() == [1, 0, 1, 4, 3]
    assert find_neighbours(vectors.astype(np.float32), 2)[0].tolist() == [1, 2]


def test_nobody_is_his_own_neighbour_even_among_twins() -> None:
    neighbours = find_neighbours(np.ones((9, 3), np.float32), 4)
    assert all(place not in row for place, row in enumerate(neighbours.tolist()))
    with pytest.raises(ConfigError, match="9 crops have no 9 neighbours"):
        find_neighbours(np.ones((9, 3), np.float32), 9)


def test_training_makes_codes_alike_within_a_kind_and_unlike_between_kinds(tmp_path: Path) -> None:
    tokens = torch.from_numpy(read_tokens(PHOTOS[0])).permute(2, 0, 1)[None]

    def measure(steps: int) -> tuple[float, float]:
        head = train(tmp_path / f"{steps}.safetensors", steps=steps).head
        codes = torch.nn.functional.normalize(head(tokens)[0].flatten(1), dim=0)
        left = torch.arange(64) % 8 < 4
        cosines = codes.T @ codes
        return cosines[left][:, left].mean().item(), cosines[left][:, ~left].mean().item()

    untrained, trained = measure(1), measure(150)
    assert trained[0] > 0.95
    assert trained[1] < min(0.5, untrained[1])


def test_the_probe_s_centroids_move_towards_the_codes(tmp_path: Path) -> None:
    tokens = torch.from_numpy(read_tokens(PHOTOS[1])).permute(2, 0, 1)[None]

    def measure(steps: int) -> float:
        stego = train(tmp_path / f"{steps}.safetensors", steps=steps)
        assert np.linalg.norm(stego.centroids, axis=1) == pytest.approx(1.0, abs=1e-5)
        codes = torch.nn.functional.normalize(stego.head(tokens)[0].flatten(1), dim=0).T.numpy()
        return float((codes @ stego.centroids.T).max(1).mean())

    assert measure(150) > measure(1) + 0.1


def test_training_goes_on_where_it_was_and_ends_where_it_would_have(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole.safetensors", steps=5)

    class Killed(Exception):
        pass

    reads = 0

    def read_and_die(photo: PhotoFile) -> np.ndarray:
        nonlocal reads
        reads += 1
        if reads > 1 + len(PHOTOS) + 4 * 4:  # the first, the neighbours, and four steps of two pairs
            raise Killed
        return read_tokens(photo)

    config = replace(TINY, steps=5, checkpoint_every=3)
    checkpoint = tmp_path / "cut.safetensors"
    with pytest.raises(Killed):
        train_stego(PHOTOS, read_and_die, 2, config, 0, checkpoint)
    resumed = train_stego(PHOTOS, read_tokens, 2, config, 0, checkpoint)
    for one, other in zip(list_weights(whole), list_weights(resumed), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ConfigError, match="other settings"):
        train(checkpoint, steps=5, seed=1)
