import numpy as np
import pytest

from training.labels.clusters.blending import blend
from training.labels.masks.proposals import Proposals

TOKENS = np.array([[[1, 0], [0, 1], [0, 1], [1, 0]]], np.float32)


def find(masks: list[list[int]], scores: list[float]) -> Proposals:
    return Proposals(soft=np.array(masks, np.float32)[:, None], scores=np.array(scores, np.float32))


def test_a_patch_is_half_itself_and_half_the_mean_of_its_mask() -> None:
    blended = blend(TOKENS, find([[1, 1, 1, 0]], [2.0]))[0]
    mean = np.array([1, 2]) / np.sqrt(5)
    for place in range(3):
        expected = TOKENS[0, place] + mean
        assert blended[place] == pytest.approx(expected / np.linalg.norm(expected))
    assert blended[3].tolist() == [1, 0]  # in no mask


def test_a_mask_counts_by_the_square_of_its_score_and_not_below_zero() -> None:
    blended = blend(TOKENS, find([[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], [3.0, 1.0, -5.0]))[0, 3]
    means = 9 * np.array([1, 0]) + np.array([1, 2]) / 3
    expected = np.array([1, 0]) + means / np.linalg.norm(means)
    assert blended == pytest.approx(expected / np.linalg.norm(expected))


def test_without_masks_nothing_changes() -> None:
    none = Proposals(soft=np.zeros((0, 1, 4), np.float32), scores=np.zeros(0, np.float32))
    assert (blend(TOKENS, none) == TOKENS).all()
