"""How wrong a panoptic cascade is: proposals, three stages of boxes, masks and the dense map."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.networks.boxes import apply_deltas, clip_boxes, get_deltas, is_nonempty
from model.networks.fpn import FPN_STRIDES_PX as PYRAMID_STRIDES_PX
from model.networks.panoptic_cascade import PanopticCascade
from model.networks.resnet import STAGE_STRIDES_PX
from model.networks.roi_heads import BOX_POOL_SIZE, MASK_SIZE, STAGE_DELTA_WEIGHTS, CascadeROIHeads, StageOutput
from model.networks.rpn import (
    ANCHOR_SIDES_PX,
    ProposalConfig,
    Proposals,
    RPNOutput,
    find_top_proposals,
    flatten_predictions,
    make_anchors,
)
from training.panoptic_cascade.config import CascadeTrainConfig
from training.panoptic_cascade.matching import CascadeTarget, draw, ignore_unlabeled, match, pairwise_box_iou
from training.trainer.task import IGNORE_INDEX

ANCHOR_IOUS = (0.3, 0.7)
"""Below the first an anchor is on nothing, from the second on an object."""
STAGE_IOUS = (0.5, 0.6, 0.7)
ANCHOR_SHARE, ROI_SHARE = 0.5, 0.25
_ANCHOR_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
_UNJUDGED = -1

Levels = tuple[Float[Tensor, "B C h w"], ...]


@dataclass(frozen=True, kw_only=True)
class CascadeLosses:
    """Weighted terms; their sum is what is minimised."""

    objectness: Tensor
    anchors: Tensor
    """Boxes of the proposals."""
    classes: Tensor
    """This and the next: the sum of three stages."""
    boxes: Tensor
    masks: Tensor
    semantic: Tensor

    @property
    def total(self) -> Tensor:
        return self.objectness + self.anchors + self.classes + self.boxes + self.masks + self.semantic

    def as_floats(self) -> dict[str, float]:
        return {name: float(value.detach()) for name, value in {**vars(self), "total": self.total}.items()}


class Rois(NamedTuple):
    """Boxes that the heads are taught on, those on objects first; a picture with fewer has unused ones behind them."""

    boxes: Float[Tensor, "B N 4"]
    is_used: Bool[Tensor, "B N"]


class RoiTargets(NamedTuple):
    """What a stage should say about each box."""

    clusters: Int[Tensor, "B N"]
    """The number of clusters for nothing; _UNJUDGED for what is not to be judged."""
    boxes: Float[Tensor, "B N 4"]
    nearest: Int[Tensor, "B N"]
    """The object's index."""
    is_object: Bool[Tensor, "B N"]


def compute_losses(
    network: PanopticCascade,
    levels: Levels,
    sizes: Int[Tensor, "B 2"],
    objects: tuple[CascadeTarget, ...],
    recipe: CascadeTrainConfig,
    generator: torch.Generator,
) -> CascadeLosses:
    """The loss of U2Seg's network (detectron2's PanopticFPN with CascadeROIHeads), with CutLER's DropLoss."""
    outputs = network.proposal_generator(levels)
    objectness, anchors = rpn_losses(outputs, objects, recipe, generator)
    with torch.no_grad():
        limits = ProposalConfig(pre_nms_topk=recipe.proposals_per_level, post_nms_topk=recipe.proposals)
        detached = [RPNOutput(each.logits.float(), each.deltas.float()) for each in outputs]
        rois = sample_rois(find_top_proposals(detached, sizes, limits), objects, recipe, generator)
    classes, boxes = cascade_losses(network.roi_heads, levels, sizes, rois, objects, recipe)
    semantic = levels[0].new_zeros(())
    if network.config.stuff_clusters:
        semantic = sem_seg_loss(network.sem_seg_head(levels), objects, recipe.semantic_stride_px)
    return CascadeLosses(
        objectness=objectness,
        anchors=anchors,
        classes=classes,
        boxes=boxes,
        masks=mask_rcnn_loss(network.roi_heads, levels, rois, objects),
        semantic=recipe.semantic_weight * semantic,
    )


def rpn_losses(
    outputs: list[RPNOutput], objects: tuple[CascadeTarget, ...], recipe: CascadeTrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of drawn anchors and L1 of those on objects, both over the number that could be drawn."""
    flat = [flatten_predictions(each) for each in outputs]
    logits, deltas = (torch.cat(parts, dim=1).float() for parts in zip(*flat, strict=True))
    anchors = torch.cat([
        make_anchors(each.logits.shape[2], each.logits.shape[3], stride_px, side_px, logits.device)
        for each, stride_px, side_px in zip(outputs, PYRAMID_STRIDES_PX, ANCHOR_SIDES_PX, strict=True)
    ])  # fmt: skip
    objectness, boxes = [], []
    for image, each in enumerate(objects):
        matches = match(anchors, each.boxes, *ANCHOR_IOUS, keeps_best=True)
        kind = ignore_unlabeled(matches.kind, anchors, each.semantic == IGNORE_INDEX, recipe.ignored_share)
        positive, negative = draw(kind, recipe.anchors, ANCHOR_SHARE, generator)
        chosen = torch.cat([positive, negative])
        wanted = (torch.arange(len(chosen), device=logits.device) < len(positive)).float()
        given = logits[image, chosen]
        objectness.append(functional.binary_cross_entropy_with_logits(given, wanted, reduction="sum"))
        moves = get_deltas(anchors[positive], each.boxes[matches.nearest[positive]], _ANCHOR_WEIGHTS)
        boxes.append((deltas[image, positive] - moves).abs().sum())
    count = recipe.anchors * len(objects)
    return torch.stack(objectness).sum() / count, torch.stack(boxes).sum() / count


@torch.no_grad()
def sample_rois(
    proposals: Proposals, objects: tuple[CascadeTarget, ...], recipe: CascadeTrainConfig, generator: torch.Generator
) -> Rois:
    """Some of the proposals and of the objects' own boxes, at most a quarter of them on objects."""
    drawn = []
    for boxes, is_used, each in zip(proposals.boxes, proposals.is_valid, objects, strict=True):
        candidates = torch.cat([boxes[is_used], each.boxes])
        kind = match(candidates, each.boxes, STAGE_IOUS[0], STAGE_IOUS[0]).kind
        kind = ignore_unlabeled(kind, candidates, each.semantic == IGNORE_INDEX, recipe.ignored_share)
        drawn.append(candidates[torch.cat(draw(kind, recipe.rois, ROI_SHARE, generator))])
    most = max(1, *(len(each) for each in drawn))
    is_used = [torch.arange(most, device=each.device) < len(each) for each in drawn]
    boxes = [functional.pad(each, (0, 0, 0, most - len(each))) for each in drawn]
    return Rois(boxes=torch.stack(boxes), is_used=torch.stack(is_used))


@torch.no_grad()
def assign(
    rois: Rois, objects: tuple[CascadeTarget, ...], iou: float, clusters: int, ignored_share: float
) -> RoiTargets:
    """What a stage that counts a box as on an object from this IoU on should say."""
    parts = []
    for boxes, is_used, each in zip(*rois, objects, strict=True):
        nearest, kind = match(boxes, each.boxes, iou, iou)
        kind = ignore_unlabeled(kind, boxes, each.semantic == IGNORE_INDEX, ignored_share)
        own = each.clusters[nearest] if len(each.clusters) else nearest
        wanted = torch.where(kind == 1, own, torch.where(kind == 0, clusters, _UNJUDGED))
        matched = each.boxes[nearest] if len(each.boxes) else boxes
        parts.append((torch.where(is_used, wanted, _UNJUDGED), matched, nearest, is_used & (kind == 1)))
    return RoiTargets(*(torch.stack(each) for each in zip(*parts, strict=True)))


def cascade_losses(
    heads: CascadeROIHeads,
    levels: Levels,
    sizes: Int[Tensor, "B 2"],
    rois: Rois,
    objects: tuple[CascadeTarget, ...],
    recipe: CascadeTrainConfig,
) -> tuple[Tensor, Tensor]:
    """Class and box loss of the three stages, each on the boxes that the one before made of its own."""
    classes, boxes = [], []
    for stage, iou in enumerate(STAGE_IOUS):
        output = run_stage(heads, stage, levels, rois.boxes)
        wanted = assign(rois, objects, iou, output.logits.shape[2] - 1, recipe.ignored_share)
        classes.append(classification_loss(output, wanted, objects, recipe.drop_iou))
        boxes.append(box_reg_loss(output, rois, wanted, stage))
        moved = clip_boxes(output.boxes.detach(), sizes)
        rois = Rois(boxes=moved, is_used=rois.is_used & is_nonempty(moved))
    return torch.stack(classes).sum(), torch.stack(boxes).sum()


def run_stage(heads: CascadeROIHeads, stage: int, levels: Levels, boxes: Float[Tensor, "B N 4"]) -> StageOutput:
    """As `CascadeROIHeads.run_stage`, but a third of its gradient reaches the features (detectron2's
    cascade_rcnn.py)."""
    pooled = heads.roi_align(levels[: len(STAGE_STRIDES_PX)], STAGE_STRIDES_PX, boxes, BOX_POOL_SIZE, heads.pooling)
    if pooled.requires_grad:
        pooled.register_hook(lambda gradient: gradient / len(STAGE_DELTA_WEIGHTS))
    logits, deltas = heads.box_predictor[stage](heads.box_head[stage](pooled))
    deltas = deltas.float()
    return StageOutput(
        logits=logits.float(), deltas=deltas, boxes=apply_deltas(boxes, deltas, STAGE_DELTA_WEIGHTS[stage])
    )


def classification_loss(
    output: StageOutput, wanted: RoiTargets, objects: tuple[CascadeTarget, ...], drop_iou: float
) -> Tensor:
    """Cross-entropy, the mean over all boxes that are judged, though those far from every label count as zero.

    DropLoss (CutLER, section 3.3). Unlike CutLER's code, a picture's labels are all its labels, not those matched.
    """
    overlaps = []
    for boxes, each in zip(output.boxes.detach(), objects, strict=True):
        best = pairwise_box_iou(boxes, each.boxes).amax(1) if len(each.boxes) else boxes.new_zeros(len(boxes))
        overlaps.append(best)
    is_near = torch.stack(overlaps) > drop_iou
    given, said = output.logits.flatten(0, 1), wanted.clusters.flatten()
    each_loss = functional.cross_entropy(given, said, reduction="none", ignore_index=_UNJUDGED)
    return (each_loss * is_near.flatten()).sum() / (said != _UNJUDGED).sum().clamp(min=1)


def box_reg_loss(output: StageOutput, rois: Rois, wanted: RoiTargets, stage: int) -> Tensor:
    """L1 of the deltas of boxes on objects, over the number of all boxes."""
    on = wanted.is_object
    moves = get_deltas(rois.boxes[on], wanted.boxes[on], STAGE_DELTA_WEIGHTS[stage])
    return (output.deltas[on] - moves).abs().sum() / rois.is_used.sum().clamp(min=1)


def mask_rcnn_loss(heads: CascadeROIHeads, levels: Levels, rois: Rois, objects: tuple[CascadeTarget, ...]) -> Tensor:
    """Binary cross-entropy of the masks of drawn boxes on objects, each for its object's cluster."""
    channels = heads.mask_head.predictor.out_channels
    wanted = assign(rois, objects, STAGE_IOUS[0], 0, 1.0)
    count = int(wanted.is_object.sum(1).max())
    if not count:
        return levels[0].new_zeros(())
    on, boxes = wanted.is_object[:, :count], rois.boxes[:, :count]  # those on objects come first
    pooled = heads.roi_align(levels[: len(STAGE_STRIDES_PX)], STAGE_STRIDES_PX, boxes, MASK_SIZE // 2, heads.pooling)
    own = torch.where(on, wanted.clusters[:, :count], 0).clamp(max=channels - 1)
    logits = heads.mask_head(pooled, own)[on].float()
    crops = [
        crop_masks(each.masks, boxes[image][on[image]], wanted.nearest[image, :count][on[image]], MASK_SIZE)
        for image, each in enumerate(objects)
    ]
    return functional.binary_cross_entropy_with_logits(logits, torch.cat(crops).float())


def sem_seg_loss(logits: Float[Tensor, "B S+1 h w"], objects: tuple[CascadeTarget, ...], stride_px: int) -> Tensor:
    """Mean cross-entropy over pixels, or every fourth, that are not ignored; 0 if all are."""
    wanted = torch.stack([each.semantic for each in objects])
    logits = logits.float()
    if stride_px == 1:
        logits = functional.interpolate(logits, size=wanted.shape[1:], mode="bilinear", align_corners=False)
    else:
        wanted = wanted[:, stride_px // 2 :: stride_px, stride_px // 2 :: stride_px]
    summed = functional.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
    return summed / (wanted != IGNORE_INDEX).sum().clamp(min=1)


def crop_masks(
    masks: Bool[Tensor, "M H W"], boxes: Float[Tensor, "N 4"], index: Int[Tensor, "N"], side: int
) -> Bool[Tensor, "N side side"]:
    """What each box shows of the mask that `index` names: the cells of which half or more is covered.

    RoIAlign with a sample for each pixel, as detectron2's `BitMasks.crop_and_resize`. Its samples form a lattice, so
    that rows and columns are averaged one after the other.
    """
    return crop_maps(masks[index].float(), boxes, side) >= 0.5


def crop_maps(maps: Float[Tensor, "N H W"], boxes: Float[Tensor, "N 4"], side: int) -> Float[Tensor, "N side side"]:
    """The mean of each map in the cells of its box, in pixels of the map."""
    x0, y0, x1, y1 = boxes.float().unbind(1)
    rows = _average(y0, y1, maps.shape[1], side)
    columns = _average(x0, x1, maps.shape[2], side)
    with torch.autocast(maps.device.type, enabled=False):  # half of a cell must be told from less
        return torch.bmm(torch.bmm(rows, maps), columns.transpose(1, 2))


def _average(
    start: Float[Tensor, "N"], end: Float[Tensor, "N"], extent: int, side: int
) -> Float[Tensor, "N side extent"]:
    """How much each of `extent` pixels counts in each bin between `start` and `end`.

    Bilinear samples at most a pixel apart; one that lies more than a pixel outside counts as zero, and
    an empty box has none.
    """
    length = ((end - start) / side)[:, None, None]
    count = torch.ceil(length)
    samples = count.clamp(min=1.0)
    sample = torch.arange(int(samples.max()) if len(samples) else 0, device=start.device)
    bins = torch.arange(side, device=start.device)[:, None]
    position = start[:, None, None] - 0.5 + (bins + (sample + 0.5) / samples) * length  # N side samples
    is_counted = (sample < count) & (position >= -1.0) & (position <= extent)
    position = position.clamp(0.0, extent - 1.0)
    first = position.floor()
    later = (position - first) * is_counted / samples
    weights = torch.zeros(len(start), side, extent, device=start.device)
    weights.scatter_add_(2, first.long(), is_counted / samples - later)
    return weights.scatter_add_(2, (first.long() + 1).clamp(max=extent - 1), later)
