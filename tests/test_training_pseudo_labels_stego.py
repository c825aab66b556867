import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import ConfigError
from training.data.label_config import STEGO_PRESETS
from training.data.photos import PhotoFile
from training.pseudo_labels.codebook import StegoHead
from training.pseudo_labels.stego import (
    ClusterProbe,
    FeatureBatch,
    correlation_losses,
    crop_tokens,
    nearest_neighbors,
    train_stego,
    weigh,
)

TOLERANCE = 1e-6  # of the stored outputs: a recomputation in float64 differs by 2e-8
REFERENCE = {
    "cocostuff27_vit_base": STEGO_PRESETS["base"],
    "cocostuff27_vit_small_1_31_22": STEGO_PRESETS["small"],
}


def load(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "stego" / "stego.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


@pytest.mark.golden
@pytest.mark.parametrize("name", REFERENCE)
def test_losses_and_gradient_norms_equal_the_reference(golden: Path, name: str) -> None:
    stored, config = load(golden), REFERENCE[name]
    expected = json.loads((golden / "stego" / "expected.json").read_text())[name]
    codes, near_codes = (stored[name].clone().requires_grad_() for name in ("code", "code_pos"))
    losses = correlation_losses(
        FeatureBatch(features=stored["feats"], codes=codes),
        FeatureBatch(features=stored["feats_pos"], codes=near_codes),
        (stored["coords1"], stored["coords2"]),
        stored["neg_perms"],
        config,
    )
    for loss, key in zip(losses, ("pos_intra_loss", "pos_inter_loss", "neg_inter_loss"), strict=True):
        assert loss.item() == pytest.approx(expected[key], abs=TOLERANCE)
    total = weigh(losses, config)
    assert total.item() == pytest.approx(expected["total"], abs=TOLERANCE)
    gradient, near_gradient = torch.autograd.grad(total, [codes, near_codes])
    assert gradient.norm().item() == pytest.approx(expected["grad_code_norm"], abs=TOLERANCE)
    assert near_gradient.norm().item() == pytest.approx(expected["grad_code_pos_norm"], abs=TOLERANCE)


@pytest.mark.golden
def test_the_cluster_probe_equals_the_reference(golden: Path) -> None:
    stored = load(golden)
    expected = json.loads((golden / "stego" / "expected.json").read_text())["cluster_probe"]
    probe = ClusterProbe(27, 10)
    probe.centroids.data.copy_(stored["probe_clusters"])
    loss = probe(stored["probe_codes"])
    assert loss.item() == pytest.approx(expected["loss_hard"], abs=TOLERANCE)
    (gradient,) = torch.autograd.grad(loss, [probe.centroids])
    assert (gradient - stored["probe_grad_clusters"]).abs().max() < TOLERANCE
    cosines = probe.similarities(stored["probe_codes"])
    assert torch.equal(cosines.argmax(1), stored["probe_assign"].long())
    assert torch.allclose((2 * cosines).log_softmax(1), stored["probe_logprob_alpha2"], atol=TOLERANCE)


TINY = STEGO_PRESETS["tiny"]
PHOTOS = [PhotoFile(path=Path(str(i)), name=str(i), digest=str(i), height=8, width=8) for i in range(4)]


def read_tokens(photo: PhotoFile) -> np.ndarray:
    """Left and right halves differ, with a little noise of the photo's own."""
    tokens = np.random.default_rng(int(photo.name)).normal(0, 0.1, (8, 8, 12)).astype(np.float32)
    tokens[:, :4, 0] += 3
    tokens[:, 4:, 1] += 3
    return tokens


def train(checkpoint: Path, *, steps: int, seed: int = 0) -> tuple[StegoHead, np.ndarray]:
    config = replace(TINY, max_steps=steps, checkpoint_interval=3)
    return train_stego(PHOTOS, read_tokens, 2, config, seed, checkpoint)


def test_crops_are_the_four_corners_and_the_center_at_half_the_size() -> None:
    tokens = np.arange(24).reshape(4, 6, 1)
    assert [crop_tokens(tokens, position)[0, 0, 0] for position in range(5)] == [0, 3, 12, 15, 7]
    assert crop_tokens(tokens, 4)[..., 0].tolist() == [[7, 8, 9], [13, 14, 15]]
    assert crop_tokens(tokens[:1, :1], 3).shape == (1, 1, 1)


def test_neighbors_are_the_nearest_other_vectors_by_cosine() -> None:
    angles = np.radians([0, 1, 3, 90, 92])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32) * [[1], [9], [1], [1], [5]]
    assert nearest_neighbors(vectors.astype(np.float32), 1)[:, 0].tolist() == [1, 0, 1, 4, 3]
    assert nearest_neighbors(vectors.astype(np.float32), 2)[0].tolist() == [1, 2]


def test_training_makes_codes_similar_within_a_region_and_different_between_regions(tmp_path: Path) -> None:
    tokens = torch.from_numpy(read_tokens(PHOTOS[0])).permute(2, 0, 1)[None]

    def measure(steps: int) -> tuple[float, float]:
        head = train(tmp_path / f"{steps}.safetensors", steps=steps)[0]
        codes = torch.nn.functional.normalize(head(tokens)[0].flatten(1), dim=0)
        left = torch.arange(64) % 8 < 4
        cosines = codes.T @ codes
        return cosines[left][:, left].mean().item(), cosines[left][:, ~left].mean().item()

    untrained, trained = measure(1), measure(150)
    assert trained[0] > 0.95
    assert trained[1] < min(0.5, untrained[1])


def test_interrupted_training_resumes_with_the_same_result(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole.safetensors", steps=5)

    reads = itertools.count(1)

    def read_and_die(photo: PhotoFile) -> np.ndarray:
        if next(reads) > 1 + len(PHOTOS) + 4 * 4:  # the first photo, the neighbor search, four steps of two pairs
            raise KeyboardInterrupt
        return read_tokens(photo)

    config = replace(TINY, max_steps=5, checkpoint_interval=3)
    checkpoint = tmp_path / "cut.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_stego(PHOTOS, read_and_die, 2, config, 0, checkpoint)
    resumed = train_stego(PHOTOS, read_tokens, 2, config, 0, checkpoint)
    assert (resumed[1] == whole[1]).all()
    weights = resumed[0].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole[0].state_dict().items())
    with pytest.raises(ConfigError, match="other settings"):
        train(checkpoint, steps=5, seed=1)
