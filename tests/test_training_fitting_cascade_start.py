import pytest
import tiny
import torch

from model.network.cascade_shape import CascadeShape
from model.network.panoptic_cascade import CascadeLimits, PanopticCascade
from training.fitting.cascade.start import initialise


def test_weights_are_drawn_as_the_reference_draws_them() -> None:
    torch.manual_seed(0)
    network = PanopticCascade(CascadeShape(thing_clusters=40, pyramid_width=64, mask_width=64), CascadeLimits())
    initialise(network)
    state = network.state_dict()
    deviations = {
        "proposal_generator.rpn_head.conv.weight": 0.01,
        "roi_heads.box_predictor.2.cls_score.weight": 0.01,
        "roi_heads.box_predictor.0.bbox_pred.weight": 0.001,
        "roi_heads.mask_head.predictor.weight": 0.001,
        "roi_heads.mask_head.mask_fcn2.weight": (2 / (9 * 64)) ** 0.5,  # He, by fan-out
        "backbone.bottom_up.res3.1.conv2.weight": (2 / (9 * 128)) ** 0.5,
        "sem_seg_head.p3.0.weight": (2 / (9 * 128)) ** 0.5,
        "backbone.fpn_output3.weight": (1 / (9 * 64)) ** 0.5,  # uniform, by fan-in
        "roi_heads.box_head.1.fc1.weight": (1 / (49 * 64)) ** 0.5,
    }
    assert {name: float(state[name].std()) for name in deviations} == pytest.approx(deviations, rel=0.05)
    assert all(not tensor.any() for name, tensor in state.items() if name.endswith((".bias",)) and "norm" not in name)


def test_norms_stay_as_they_are() -> None:
    network = tiny.draw_cascade(stuff_clusters=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if ".norm." in name}
    initialise(network)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
