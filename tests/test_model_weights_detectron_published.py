"""Our networks have the tensors that the published configurations make, in name and size, at full size.

Written down from u2seg/U2Seg, configs/COCO-PanopticSegmentation/u2seg_R50_800.yaml, facebookresearch/CutLER,
model_zoo/configs/CutLER-ImageNet/cascade_mask_rcnn_R_50_FPN.yaml, and visinf/cups, Panoptic-Cascade-Mask-R-CNN.yaml.
"""

import pytest
import torch
from torch import Tensor

from model.network.cascade_shape import CascadeShape, infer_shape
from model.network.panoptic_cascade import CascadeLimits, PanopticCascade
from model.weights.detectron import check_family

U2SEG_800 = {
    "backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7),
    "backbone.bottom_up.stem.conv1.norm.weight": (64,),
    "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": (),
    "backbone.bottom_up.res2.0.shortcut.weight": (256, 64, 1, 1),
    "backbone.bottom_up.res2.0.shortcut.norm.running_mean": (256,),
    "backbone.bottom_up.res2.0.conv1.weight": (64, 64, 1, 1),
    "backbone.bottom_up.res2.2.conv3.weight": (256, 64, 1, 1),
    "backbone.bottom_up.res3.0.shortcut.weight": (512, 256, 1, 1),
    "backbone.bottom_up.res3.3.conv2.weight": (128, 128, 3, 3),
    "backbone.bottom_up.res4.0.conv1.weight": (256, 512, 1, 1),
    "backbone.bottom_up.res4.5.conv3.norm.running_var": (1024,),
    "backbone.bottom_up.res5.0.shortcut.weight": (2048, 1024, 1, 1),
    "backbone.bottom_up.res5.2.conv2.weight": (512, 512, 3, 3),
    "backbone.fpn_lateral2.weight": (256, 256, 1, 1),
    "backbone.fpn_lateral5.weight": (256, 2048, 1, 1),
    "backbone.fpn_lateral5.norm.bias": (256,),
    "backbone.fpn_output4.weight": (256, 256, 3, 3),
    "backbone.fpn_output4.norm.running_var": (256,),
    "proposal_generator.rpn_head.conv.weight": (256, 256, 3, 3),
    "proposal_generator.rpn_head.objectness_logits.weight": (3, 256, 1, 1),
    "proposal_generator.rpn_head.anchor_deltas.bias": (12,),
    "roi_heads.box_head.0.fc1.weight": (1024, 12544),
    "roi_heads.box_head.2.fc2.weight": (1024, 1024),
    "roi_heads.box_predictor.0.cls_score.weight": (801, 1024),
    "roi_heads.box_predictor.2.cls_score.bias": (801,),
    "roi_heads.box_predictor.1.bbox_pred.weight": (4, 1024),
    "roi_heads.mask_head.mask_fcn1.weight": (256, 256, 3, 3),
    "roi_heads.mask_head.mask_fcn4.bias": (256,),
    "roi_heads.mask_head.deconv.weight": (256, 256, 2, 2),
    "roi_heads.mask_head.predictor.weight": (800, 256, 1, 1),
    "sem_seg_head.p2.0.weight": (128, 256, 3, 3),
    "sem_seg_head.p2.0.norm.weight": (128,),
    "sem_seg_head.p4.2.weight": (128, 128, 3, 3),
    "sem_seg_head.p5.4.norm.bias": (128,),
    "sem_seg_head.predictor.weight": (28, 128, 1, 1),
    "sem_seg_head.predictor.bias": (28,),
}

# 53 convolutions of ResNet-50 and 8 of the pyramid with a weight and 5 of batch norm each; then weights and biases:
# 3 of the proposals, 2 + 2 in each of 3 stages, 6 of the mask head; 7 semantic ones with group norm, 1 predictor.
TENSORS = (53 + 8) * 6 + 2 * (3 + 4 * 3 + 6)
SEMANTIC_TENSORS = 7 * 3 + 2
COUNTERS = 53 + 8


def draw_state(shape: CascadeShape) -> dict[str, Tensor]:
    with torch.device("meta"):
        return PanopticCascade(shape, CascadeLimits()).state_dict()


def check_published(state: dict[str, Tensor], clusters: int, changed: dict[str, tuple[int, ...]]) -> None:
    by_cluster = {
        "roi_heads.box_predictor.0.cls_score.weight": (clusters + 1, 1024),
        "roi_heads.box_predictor.2.cls_score.bias": (clusters + 1,),
        "roi_heads.mask_head.predictor.weight": (clusters, 256, 1, 1),
    }
    published = {name: size for name, size in {**U2SEG_800, **by_cluster, **changed}.items() if name in state}
    assert {name: tuple(state[name].shape) for name in published} == published


@pytest.mark.parametrize("clusters", [800, 300])
def test_u2seg(clusters: int) -> None:
    state = draw_state(CascadeShape(thing_clusters=clusters))
    assert set(U2SEG_800) <= set(state)
    assert len(state) == TENSORS + SEMANTIC_TENSORS == 431
    check_published(state, clusters, {})
    check_family(infer_shape(state), "u2seg", clusters)


def test_cutler() -> None:
    state = draw_state(CascadeShape(thing_clusters=1, stuff_clusters=0))
    assert {name for name in U2SEG_800 if name not in state} == {name for name in U2SEG_800 if "sem_seg" in name}
    assert len(state) == TENSORS
    check_published(state, 1, {})
    check_family(infer_shape(state), "cutler", 1)


def test_cups_after_self_training() -> None:
    # cups/pl_model_self.py freezes the batch norms, which then count no batches.
    shape = CascadeShape(thing_clusters=15, stuff_clusters=12, backbone_norm="frozen", pyramid_norm="frozen")
    state = draw_state(shape)
    missing = {name for name in U2SEG_800 if name not in state}
    assert missing == {"backbone.bottom_up.stem.conv1.norm.num_batches_tracked"}
    assert len(state) == TENSORS + SEMANTIC_TENSORS - COUNTERS
    semantic = {"sem_seg_head.predictor.weight": (13, 128, 1, 1), "sem_seg_head.predictor.bias": (13,)}
    check_published(state, 15, semantic)
    assert infer_shape(state) == shape
    check_family(shape, "cups", 15)
