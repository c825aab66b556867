"""Matching and losses of the panoptic cascade, with values known by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from model.networks.roi_heads import STAGE_DELTA_WEIGHTS, StageOutput
from model.networks.rpn import Proposals, RPNOutput
from training.panoptic_cascade import losses
from training.panoptic_cascade.config import CASCADE_PRESETS
from training.panoptic_cascade.dataset import CascadeSample
from training.panoptic_cascade.losses import Rois, RoiTargets, crop_maps, match_boxes
from training.trainer.task import IGNORE_INDEX

SIDE = 64
CONFIG = replace(CASCADE_PRESETS["tiny"], rpn_batch_size_per_image=32, max_unlabeled_fraction=1.0)
SIZES = torch.tensor([[SIDE, SIDE]])
INSTANCE, HALF, FAR = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [50.0, 50.0, 60.0, 60.0]


def make_target(*boxes: list[float], clusters: list[int] | None = None) -> CascadeSample:
    """An image with instances that fill their boxes, on stuff 1."""
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    return CascadeSample(
        pixels=torch.zeros(3, SIDE, SIDE, dtype=torch.uint8),
        masks=masks,
        clusters=torch.tensor(clusters or [0] * len(boxes), dtype=torch.int64),
        semantic=torch.ones(SIDE, SIDE, dtype=torch.int64),
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zero_rpn_outputs() -> list[RPNOutput]:
    sides = [SIDE // stride for stride in (4, 8, 16, 32, 64)]
    return [RPNOutput(torch.zeros(1, 3, side, side), torch.zeros(1, 12, side, side)) for side in sides]


def draw_levels(channels: int = 8) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return tuple(torch.randn(1, channels, SIDE // stride, SIDE // stride) for stride in (4, 8, 16, 32, 64))


# Matching


def test_boxes_are_positive_negative_or_ignored() -> None:
    matches = match_boxes(torch.tensor([INSTANCE, HALF, FAR]), torch.tensor([FAR, INSTANCE]), 0.3, 0.7)
    assert matches.kind.tolist() == [1, -1, 1]
    assert matches.nearest.tolist() == [1, 1, 0]
    half, instance = torch.tensor([HALF]), torch.tensor([INSTANCE])
    assert match_boxes(half, instance, 0.5, 0.5).kind.tolist() == [1]  # from 0.5 on
    assert match_boxes(half, instance, 0.6, 0.6).kind.tolist() == [0]
    no_instances = torch.zeros(0, 4)
    assert match_boxes(instance, no_instances, 0.3, 0.7, allow_low_quality=True).kind.tolist() == [0]


def test_with_low_quality_matches_the_best_boxes_of_an_instance_are_positive() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 2.0], HALF, HALF, FAR])
    kind = match_boxes(boxes, torch.tensor([INSTANCE]), 0.3, 0.7, allow_low_quality=True).kind
    assert kind.tolist() == [0, 1, 1, 0]
    elsewhere = torch.tensor([[80.0, 80.0, 90.0, 90.0]])
    assert match_boxes(boxes, elsewhere, 0.3, 0.7, allow_low_quality=True).kind.tolist() == [0, 0, 0, 0]


# RPN and RoIs


def test_rpn_losses_by_hand() -> None:
    # The anchor of 32 px at position 4, 4 is the instance; four neighbors, 4 px away, have an IoU of 28/36: 0.125 each.
    target = make_target([0.0, 0.0, 32.0, 32.0])
    objectness, boxes = losses.rpn_losses(zero_rpn_outputs(), (target,), CONFIG, generator())
    assert float(objectness) == pytest.approx(math.log(2))
    assert float(boxes) == pytest.approx(4 * 0.125 / 32)


def test_anchors_on_unlabeled_pixels_are_not_negative() -> None:
    target = make_target()
    target.semantic[:] = IGNORE_INDEX
    config = replace(CONFIG, max_unlabeled_fraction=0.5)
    assert float(losses.rpn_losses(zero_rpn_outputs(), (target,), config, generator())[0]) == 0.0


def test_a_quarter_of_the_rois_is_positive_and_instances_are_candidates() -> None:
    target = make_target([0.0, 0.0, 32.0, 32.0], [40.0, 40.0, 60.0, 60.0])
    far = torch.tensor([[0.0, 48.0, 16.0, 64.0]]).repeat(20, 1)
    near = torch.tensor([[0.0, 0.0, 32.0, 30.0]]).repeat(20, 1)
    boxes = torch.cat([far, near])[None]
    proposals = Proposals(boxes=boxes, is_valid=torch.ones(1, 40, dtype=torch.bool))
    rois = losses.sample_rois(proposals, (target,), replace(CONFIG, roi_batch_size_per_image=16), generator())
    assert match_boxes(rois.boxes[0], target.boxes, 0.5, 0.5).kind.tolist() == [1] * 4 + [0] * 12
    unused = Proposals(boxes=boxes, is_valid=torch.zeros(1, 40, dtype=torch.bool))
    instances_only = losses.sample_rois(unused, (target,), CONFIG, generator())
    assert sorted(instances_only.boxes[0].tolist()) == target.boxes.tolist()


# Box stages


def test_droploss_zeroes_boxes_far_from_every_label() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 60.0, 60.0], [0.0, 0.0, 1.0, 1.0]]])
    output = StageOutput(logits=torch.zeros(1, 3, 3), deltas=torch.zeros(1, 3, 4), boxes=boxes)
    roi_targets = RoiTargets(
        clusters=torch.tensor([[1, 2, -1]]), boxes=boxes, nearest=torch.zeros(1, 3), is_positive=torch.zeros(1, 3)
    )
    targets = (make_target(INSTANCE, clusters=[1]),)
    loss = losses.classification_loss
    assert float(loss(output, roi_targets, targets, 0.01)) == pytest.approx(math.log(3) / 2)
    assert float(loss(output, roi_targets, targets, -1.0)) == pytest.approx(math.log(3))
    assert float(loss(output, roi_targets, (make_target(),), 0.01)) == 0.0


def test_the_box_loss_is_in_the_units_of_the_stage_and_divided_by_all_boxes() -> None:
    boxes = torch.tensor([[INSTANCE, FAR, [0.0] * 4]])
    rois = Rois(boxes=boxes, is_used=torch.tensor([[True, True, False]]))
    output = StageOutput(logits=torch.zeros(1, 3, 2), deltas=torch.zeros(1, 3, 4), boxes=boxes)
    roi_targets = RoiTargets(
        clusters=torch.tensor([[0, 1, -1]]), boxes=torch.tensor([[[1.0, 0.0, 11.0, 10.0]] * 3]),
        nearest=torch.zeros(1, 3), is_positive=torch.tensor([[True, False, False]]),
    )  # fmt: skip
    values = [float(losses.box_reg_loss(output, rois, roi_targets, stage)) for stage in range(3)]
    assert values == pytest.approx([0.1 * weights[0] / 2 for weights in STAGE_DELTA_WEIGHTS])


def test_stages_are_those_of_inference_with_a_third_of_the_gradient() -> None:
    heads = tiny.draw_cascade(stuff_clusters=2).roi_heads
    boxes = torch.tensor([[[3.0, 4.0, 40.0, 50.0]]])
    gradients, outputs = [], []
    for run in (heads.run_stage, lambda *arguments: losses.run_stage(heads, *arguments)):
        levels = tuple(each.requires_grad_() for each in draw_levels())
        output = run(1, levels, boxes)
        (output.logits.sum() + output.deltas.sum()).backward()
        gradients.append(levels[0].grad)
        outputs.append(output)
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0] / 3)


# Masks, semantic map and the sum


def test_the_mask_loss_is_computed_in_the_box_for_the_cluster_of_the_instance() -> None:
    heads = tiny.draw_cascade(stuff_clusters=2).roi_heads
    torch.nn.init.zeros_(heads.mask_head.predictor.weight)
    heads.mask_head.predictor.bias.data = torch.tensor([0.0, 50.0, -50.0])
    rois = Rois(boxes=torch.tensor([[[0.0, 0.0, 30.0, 30.0]]]), is_used=torch.ones(1, 1, dtype=torch.bool))
    targets = [make_target([0.0, 0.0, 30.0, 30.0], clusters=[each]) for each in range(3)]
    values = [losses.mask_rcnn_loss(heads, draw_levels(), rois, (each,)).item() for each in targets]
    assert values == pytest.approx([math.log(2), 0.0, 50.0])
    assert float(losses.mask_rcnn_loss(heads, draw_levels(), rois, (make_target(),))) == 0.0


def test_the_semantic_loss_ignores_unlabeled_pixels_at_both_strides() -> None:
    target = make_target()
    target.semantic[:, 32:] = IGNORE_INDEX
    logits = torch.zeros(1, 3, 16, 16)
    logits[:, 1, :, :6] = 30.0
    logits[:, 2, :, 8:] = 30.0  # wrong, but ignored
    fine, coarse = (float(losses.sem_seg_loss(logits, (target,), stride)) for stride in (1, 4))
    assert coarse == pytest.approx(math.log(3) * 2 / 8)
    assert 0.0 < fine < math.log(3)
    target.semantic[:] = IGNORE_INDEX
    assert float(losses.sem_seg_loss(logits, (target,), 1)) == 0.0


def test_all_losses_are_finite_reproducible_and_reach_all_heads() -> None:
    network = tiny.draw_cascade(stuff_clusters=2)
    targets = (make_target([0.0, 0.0, 32.0, 32.0], [30.0, 40.0, 60.0, 60.0], clusters=[1, 2]),)
    first, second = (
        losses.panoptic_cascade_losses(network, draw_levels(), SIZES, targets, CONFIG, generator()) for _ in range(2)
    )
    assert first.as_floats() == second.as_floats()
    assert all(math.isfinite(value) and value > 0.0 for value in first.as_floats().values())
    first.total.backward()
    reached = {name.split(".")[0] for name, each in network.named_parameters() if each.grad is not None}
    assert reached == {"proposal_generator", "roi_heads", "sem_seg_head"}


def test_an_image_without_labels_has_finite_losses() -> None:
    network = tiny.draw_cascade(stuff_clusters=0)
    targets = (make_target(),)
    values = losses.panoptic_cascade_losses(network, draw_levels(), SIZES, targets, CONFIG, generator()).as_floats()
    assert all(math.isfinite(value) for value in values.values())
    assert values["boxes"] == values["masks"] == values["semantic"] == values["classes"] == 0.0


@pytest.mark.golden
@pytest.mark.parametrize("size", [7, 14])
def test_crops_agree_with_detectron2s_roi_align(golden: Path, size: int) -> None:
    with np.load(golden / "detectron2" / "units.npz") as stored:
        units = {key: torch.from_numpy(stored[key]) for key in stored.files if key.startswith("roialign_")}
    features, rois = units["roialign_features"], units["roialign_rois"]
    maps, boxes = features[rois[:, 0].long()], rois[:, 1:] / 4.0  # N C H W
    crops = torch.stack([crop_maps(maps[:, channel], boxes, size) for channel in range(maps.shape[1])], dim=1)
    # float32 rounds positions of up to 76 pixels by 4e-6, and the features rise by up to 6 between neighbors.
    torch.testing.assert_close(crops, units[f"roialign_out{size}"], rtol=0.0, atol=3e-5)
