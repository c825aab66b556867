"""Folding batch norms away changes no answer."""

import pytest
import tiny
import torch

from model.network.cascade_shape import CascadeShape
from model.network.fold import fold_norms
from model.network.panoptic_cascade import CascadeLimits, PanopticCascade
from model.network.proposals import ProposalLimits
from model.network.resnet import Norm

LIMITS = CascadeLimits(proposals=ProposalLimits(per_level=40, total=30))


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_folded_network_answers_the_same_and_has_no_batch_norm(norm: Norm) -> None:
    torch.manual_seed(3)
    shape = CascadeShape(
        thing_clusters=3, stuff_clusters=2, stem_width=8, inner_width=4, outer_width=16, backbone_norm=norm,
        pyramid_width=8, pyramid_norm=norm, box_width=16, mask_width=8, semantic_width=32,
    )  # fmt: skip
    network = PanopticCascade(shape, LIMITS).eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)  # in place: every scale, shift, mean and variance counts
    pixels = tiny.draw_noise(1, 64, 96)
    sizes = torch.tensor([[64, 90]])
    folded = fold_norms(network)
    before = network.backbone(pixels.float() / 255.0)
    after = folded.backbone(pixels.float() / 255.0)
    for one, other in zip(before, after, strict=True):
        assert one.std() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))  # float32, 53 layers
    assert folded(pixels, sizes).scores.shape == (1, 100)
    assert [name for name in folded.state_dict() if "running_mean" in name] == []
    assert "sem_seg_head.p2.0.norm.weight" in folded.state_dict()  # group norms stay
