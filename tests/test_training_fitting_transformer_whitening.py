import pytest
import torch

from training.fitting.transformer.data import Target
from training.fitting.transformer.whitening import Whitening


def test_an_object_is_described_by_its_whitened_patches_each_by_its_share() -> None:
    # Two taps that count, of two channels: normalising a token leaves (1, -1) or (-1, 1) of each.
    features = torch.zeros(4, 1, 4, 2)
    features[2:] = torch.tensor([5.0, 1.0])
    features[2:, :, 1::2] = torch.tensor([1.0, 5.0])  # the right patches of two rows
    projection = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    whitening = Whitening(mean=torch.tensor([0.5, 0.0, -0.5, 0.0]), projection=projection)
    masks = torch.zeros(2, 4, 4)
    masks[0, :, :2] = 1
    masks[1, :2, :3] = 1  # all of one patch, half of another
    target = Target(
        masks=masks,
        clusters=torch.tensor([0, 1]),
        weights=torch.ones(2),
        semantic=torch.zeros(4, 4, dtype=torch.int64),
        known=torch.ones(4, 4, dtype=torch.bool),
    )
    (described,) = whitening.describe(features, (target,))
    assert described.vectors is not None
    left, right = torch.tensor([0.5, 1.5]), torch.tensor([-1.5, -0.5])
    left, right = left / left.norm(), right / right.norm()
    both = left + 0.5 * right
    assert described.vectors[0].tolist() == pytest.approx(left.tolist(), abs=1e-4)  # layer norm's epsilon
    assert described.vectors[1].tolist() == pytest.approx((both / both.norm()).tolist(), abs=1e-4)
    assert whitening.size == 2
