"""The cascade's losses where the answer is known: heads that say nothing, boxes that are anchors."""

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
from training.panoptic_cascade import losses as cascade_losses
from training.panoptic_cascade.config import CASCADE_PRESETS
from training.panoptic_cascade.losses import Rois, RoiTargets, crop_maps, crop_masks
from training.panoptic_cascade.matching import CascadeTarget
from training.trainer.task import IGNORE_INDEX

SIDE = 64
RECIPE = replace(CASCADE_PRESETS["tiny"], anchors=32, ignored_share=1.0)
SIZES = torch.tensor([[SIDE, SIDE]])


def label(*boxes: list[float], clusters: list[int] | None = None) -> CascadeTarget:
    """One picture with these objects, each as large as its box, on stuff 1."""
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    return CascadeTarget(
        boxes=torch.tensor(boxes).reshape(-1, 4),
        masks=masks,
        clusters=torch.tensor(clusters or [0] * len(boxes), dtype=torch.int64),
        semantic=torch.ones(SIDE, SIDE, dtype=torch.int64),
    )


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def say_nothing() -> list[RPNOutput]:
    sides = [SIDE // stride for stride in (4, 8, 16, 32, 64)]
    return [RPNOutput(torch.zeros(1, 3, side, side), torch.zeros(1, 12, side, side)) for side in sides]


def draw_levels(width: int = 8, *, is_noise: bool = True) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    shapes = [(1, width, SIDE // stride, SIDE // stride) for stride in (4, 8, 16, 32, 64)]
    return tuple(torch.randn(shape) if is_noise else torch.zeros(shape) for shape in shapes)


def test_undecided_proposals_cost_log_two_and_boxes_beside_the_object_their_distance() -> None:
    # The anchor of 32 px at cell 4, 4 is the object; its four neighbours, 4 px away, overlap it by 28/36: 0.125 each.
    objectness, boxes = cascade_losses.rpn_losses(say_nothing(), (label([0.0, 0.0, 32.0, 32.0]),), RECIPE, seed())
    assert float(objectness) == pytest.approx(math.log(2))
    assert float(boxes) == pytest.approx(4 * 0.125 / 32)


def test_proposals_of_a_picture_without_objects_learn_that_nothing_is_there() -> None:
    outputs = [RPNOutput(each.logits - 20.0, each.deltas) for each in say_nothing()]
    objectness, boxes = cascade_losses.rpn_losses(outputs, (label(),), RECIPE, seed())
    assert float(objectness) < 1e-6
    assert float(boxes) == 0.0


def test_proposals_on_unlabelled_ground_are_no_examples_of_nothing() -> None:
    objects = label()
    objects.semantic[:] = IGNORE_INDEX
    judged = cascade_losses.rpn_losses(say_nothing(), (objects,), replace(RECIPE, ignored_share=0.5), seed())
    assert float(judged[0]) == 0.0


def test_a_quarter_of_the_boxes_is_drawn_from_objects_which_are_among_the_candidates() -> None:
    objects = label([0.0, 0.0, 32.0, 32.0], [40.0, 40.0, 60.0, 60.0])
    far = torch.tensor([[0.0, 48.0, 16.0, 64.0]]).repeat(20, 1)
    near = torch.tensor([[0.0, 0.0, 32.0, 30.0]]).repeat(20, 1)
    boxes = torch.cat([far, near])[None]
    proposals = Proposals(boxes=boxes, logits=torch.zeros(1, 40), is_valid=torch.ones(1, 40, dtype=torch.bool))
    rois = cascade_losses.sample_rois(proposals, (objects,), replace(RECIPE, rois=16), seed())
    kinds = [cascade_losses.match(each[None], objects.boxes, 0.5, 0.5).kind.item() for each in rois.boxes[0]]
    assert kinds == [1] * 4 + [0] * 12
    none = Proposals(boxes=boxes, logits=proposals.logits, is_valid=torch.zeros(1, 40, dtype=torch.bool))
    alone = cascade_losses.sample_rois(none, (objects,), RECIPE, seed())
    assert sorted(alone.boxes[0].tolist()) == objects.boxes.tolist()


def test_pictures_with_fewer_boxes_have_unused_ones() -> None:
    proposals = Proposals(boxes=torch.zeros(2, 1, 4), logits=torch.zeros(2, 1), is_valid=torch.zeros(2, 1).bool())
    rois = cascade_losses.sample_rois(proposals, (label(), label([0.0, 0.0, 9.0, 9.0])), RECIPE, seed())
    assert rois.is_used.tolist() == [[False], [True]]


def test_a_later_stage_asks_for_more_overlap() -> None:
    rois = Rois(boxes=torch.tensor([[[0.0, 0.0, 20.0, 13.0]]]), is_used=torch.ones(1, 1, dtype=torch.bool))
    objects = (label([0.0, 0.0, 20.0, 20.0], clusters=[2]),)  # IoU 0.65
    stages = [cascade_losses.assign(rois, objects, iou, 3, 1.0) for iou in cascade_losses.STAGE_IOUS]
    assert [each.clusters.item() for each in stages] == [2, 2, 3]
    assert [each.is_object.item() for each in stages] == [True, True, False]


def test_a_box_far_from_every_label_teaches_no_cluster_but_counts() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 60.0, 60.0], [0.0, 0.0, 1.0, 1.0]]])
    output = StageOutput(logits=torch.zeros(1, 3, 3), deltas=torch.zeros(1, 3, 4), boxes=boxes)
    wanted = RoiTargets(
        clusters=torch.tensor([[1, 2, -1]]), boxes=boxes, nearest=torch.zeros(1, 3), is_object=torch.zeros(1, 3)
    )
    objects = (label([0.0, 0.0, 10.0, 10.0], clusters=[1]),)
    compare = cascade_losses.classification_loss
    assert float(compare(output, wanted, objects, 0.01)) == pytest.approx(math.log(3) / 2)
    assert float(compare(output, wanted, objects, -1.0)) == pytest.approx(math.log(3))
    assert float(compare(output, wanted, (label(),), 0.01)) == 0.0


def test_a_label_that_no_box_was_matched_to_still_keeps_boxes_near_it() -> None:
    boxes = torch.tensor([[[30.0, 30.0, 40.0, 40.0]]])  # overlaps the second label by 1/7, and is "nothing"
    output = StageOutput(logits=torch.zeros(1, 1, 2), deltas=torch.zeros(1, 1, 4), boxes=boxes)
    objects = (label([0.0, 0.0, 10.0, 10.0], [35.0, 35.0, 45.0, 45.0]),)
    rois = Rois(boxes=boxes, is_used=torch.ones(1, 1, dtype=torch.bool))
    wanted = cascade_losses.assign(rois, objects, 0.5, 1, 1.0)
    assert wanted.clusters.tolist() == [[1]]
    assert float(cascade_losses.classification_loss(output, wanted, objects, 0.1)) == pytest.approx(math.log(2))
    assert float(cascade_losses.classification_loss(output, wanted, objects, 0.2)) == 0.0


def test_the_box_loss_is_the_distance_in_the_units_of_the_stage_over_all_boxes() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0], [0.0] * 4]])
    rois = Rois(boxes=boxes, is_used=torch.tensor([[True, True, False]]))
    output = StageOutput(logits=torch.zeros(1, 3, 2), deltas=torch.zeros(1, 3, 4), boxes=boxes)
    wanted = RoiTargets(
        clusters=torch.tensor([[0, 1, -1]]), boxes=torch.tensor([[[1.0, 0.0, 11.0, 10.0]] * 3]),
        nearest=torch.zeros(1, 3), is_object=torch.tensor([[True, False, False]]),
    )  # fmt: skip
    losses = [float(cascade_losses.box_reg_loss(output, rois, wanted, stage)) for stage in range(3)]
    assert losses == pytest.approx([0.1 * weights[0] / 2 for weights in STAGE_DELTA_WEIGHTS])


def test_stages_say_what_they_do_at_inference_and_pass_on_a_third_of_the_gradient() -> None:
    heads = tiny.draw_cascade(stuff_clusters=2).roi_heads
    boxes = torch.tensor([[[3.0, 4.0, 40.0, 50.0]]])
    gradients, said = [], []
    for run in (heads.run_stage, lambda *given: cascade_losses.run_stage(heads, *given)):
        levels = tuple(each.requires_grad_() for each in draw_levels())
        output = run(1, levels, boxes)
        (output.logits.sum() + output.deltas.sum()).backward()
        gradients.append(levels[0].grad)
        said.append(output)
    assert all(torch.equal(*pair) for pair in zip(*said, strict=True))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0] / 3)


def test_masks_are_compared_inside_their_boxes_for_their_own_cluster() -> None:
    heads = tiny.draw_cascade(stuff_clusters=2).roi_heads
    torch.nn.init.zeros_(heads.mask_head.predictor.weight)
    heads.mask_head.predictor.bias.data = torch.tensor([0.0, 50.0, -50.0])
    rois = Rois(boxes=torch.tensor([[[0.0, 0.0, 30.0, 30.0]]]), is_used=torch.ones(1, 1, dtype=torch.bool))
    objects = [label([0.0, 0.0, 30.0, 30.0], clusters=[each]) for each in range(3)]
    losses = [cascade_losses.mask_rcnn_loss(heads, draw_levels(), rois, (each,)).item() for each in objects]
    assert losses == pytest.approx([math.log(2), 0.0, 50.0])
    assert float(cascade_losses.mask_rcnn_loss(heads, draw_levels(), rois, (label(),))) == 0.0


def test_the_semantic_loss_ignores_what_has_no_label_at_either_stride() -> None:
    objects = label()
    objects.semantic[:, 32:] = IGNORE_INDEX
    logits = torch.zeros(1, 3, 16, 16)
    logits[:, 1, :, :6] = 30.0
    logits[:, 2, :, 8:] = 30.0  # wrong, where nobody asks
    fine, coarse = (float(cascade_losses.sem_seg_loss(logits, (objects,), stride)) for stride in (1, 4))
    assert coarse == pytest.approx(math.log(3) * 2 / 8)
    assert 0.0 < fine < math.log(3)
    objects.semantic[:] = IGNORE_INDEX
    assert float(cascade_losses.sem_seg_loss(logits, (objects,), 1)) == 0.0


def test_all_terms_are_finite_reach_the_weights_and_repeat_with_the_seed() -> None:
    network = tiny.draw_cascade(stuff_clusters=2)
    objects = (label([0.0, 0.0, 32.0, 32.0], [30.0, 40.0, 60.0, 60.0], clusters=[1, 2]),)
    first, second = (
        cascade_losses.compute_losses(network, draw_levels(), SIZES, objects, RECIPE, seed()) for _ in range(2)
    )
    assert first.as_floats() == second.as_floats()
    assert all(math.isfinite(value) and value > 0.0 for value in first.as_floats().values())
    first.total.backward()
    reached = {name.split(".")[0] for name, each in network.named_parameters() if each.grad is not None}
    assert reached == {"proposal_generator", "roi_heads", "sem_seg_head"}


def test_a_picture_without_any_label_gives_finite_losses() -> None:
    network = tiny.draw_cascade(stuff_clusters=0)
    losses = cascade_losses.compute_losses(network, draw_levels(), SIZES, (label(),), RECIPE, seed()).as_floats()
    assert all(math.isfinite(value) for value in losses.values())
    assert losses["boxes"] == losses["masks"] == losses["semantic"] == losses["classes"] == 0.0


def test_a_crop_holds_the_cells_that_are_half_covered() -> None:
    masks = torch.zeros(2, 12, 12, dtype=torch.bool)
    masks[0, 2:6, 2:4] = True  # the left half of the box below
    masks[1, 2:3, :] = True  # a quarter of the upper cells
    boxes = torch.tensor([[2.0, 2.0, 6.0, 6.0], [2.0, 2.0, 6.0, 10.0]])
    crops = crop_masks(masks, boxes, torch.tensor([0, 1]), 2)
    assert crops[0].tolist() == [[True, False], [True, False]]
    assert not crops[1].any()


def test_the_mean_of_a_ramp_is_the_place_of_the_middle() -> None:
    ramp = torch.arange(20.0).expand(1, 10, 20)
    crop = crop_maps(ramp, torch.tensor([[2.0, 1.0, 12.0, 9.0]]), 2)
    torch.testing.assert_close(crop, torch.tensor([[[4.0, 9.0], [4.0, 9.0]]]))  # pixel i's centre lies at i + 0.5


def test_crops_are_the_same_where_the_network_computes_in_half() -> None:
    torch.manual_seed(0)
    maps, boxes = torch.rand(3, 20, 20), torch.tensor([[1.0, 2.0, 15.5, 17.0]] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = crop_maps(maps, boxes, 7)
    assert torch.equal(half, crop_maps(maps, boxes, 7))


@pytest.mark.golden
@pytest.mark.parametrize("side", [7, 14])
def test_crops_are_the_references_roialign(golden: Path, side: int) -> None:
    with np.load(golden / "detectron2" / "units.npz") as stored:
        units = {key: torch.from_numpy(stored[key]) for key in stored.files if key.startswith("roialign_")}
    features, rois = units["roialign_features"], units["roialign_rois"]
    maps, boxes = features[rois[:, 0].long()], rois[:, 1:] / 4.0  # N C H W
    found = torch.stack([crop_maps(maps[:, channel], boxes, side) for channel in range(maps.shape[1])], dim=1)
    # float32 rounds places of up to 76 pixels by 4e-6, and the features rise by up to 6 from one to the next.
    torch.testing.assert_close(found, units[f"roialign_out{side}"], rtol=0.0, atol=3e-5)
