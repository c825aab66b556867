"""Losses of a panoptic cascade: matching of boxes and labels, RPN, three box stages, masks and the semantic map."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.networks.backbones import FPN_STRIDES_PX
from model.networks.boxes import apply_deltas, box_iou, clip_boxes, get_deltas, is_nonempty
from model.networks.panoptic_cascade import PanopticCascade
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
from training.panoptic_cascade.dataset import CascadeSample
from training.trainer.task import IGNORE_INDEX, Losses

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
"""Kinds of boxes."""
RPN_IOU_THRESHOLDS = (0.3, 0.7)
"""An anchor is negative below the first IoU, and positive from the second on."""
CASCADE_IOU_THRESHOLDS = (0.5, 0.6, 0.7)
RPN_POSITIVE_FRACTION, ROI_POSITIVE_FRACTION = 0.5, 0.25
_RPN_DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
_IGNORED_CLASS = -1
Levels = tuple[Float[Tensor, "B C h w"], ...]


class BoxMatches(NamedTuple):
    """The assignment of each box."""

    nearest: Int[Tensor, "N"]
    """Index of the instance with the highest IoU; 0 if there is no instance."""
    kind: Int[Tensor, "N"]
    """POSITIVE, NEGATIVE or IGNORED."""


def match_boxes(
    boxes: Float[Tensor, "N 4"],
    instances: Float[Tensor, "M 4"],
    low: float,
    high: float,
    *,
    allow_low_quality: bool = False,
) -> BoxMatches:
    """Assign each box to the instance with the highest IoU: positive from `high` on, negative below `low`.

    With `allow_low_quality`, the boxes with the highest IoU of each instance are positive, too (Faster R-CNN, section
    3.1.2; detectron2/modeling/matcher.py).
    """
    if not len(instances):
        zeros = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return BoxMatches(nearest=zeros, kind=zeros)
    ious = box_iou(instances, boxes)
    best, nearest = ious.max(0)
    kind = torch.where(best >= high, POSITIVE, torch.where(best < low, NEGATIVE, IGNORED))
    if allow_low_quality:
        highest = ious.max(1, keepdim=True).values
        kind = torch.where(((ious == highest) & (highest > 0.0)).any(0), POSITIVE, kind)
    return BoxMatches(nearest=nearest, kind=kind)


def subsample_labels(
    kind: Int[Tensor, "N"], num_samples: int, positive_fraction: float, generator: torch.Generator
) -> tuple[Int[Tensor, "P"], Int[Tensor, "R"]]:
    """Sample positive boxes, at most this fraction of `num_samples`, and fill up with negative ones."""
    found = [torch.nonzero(kind == each)[:, 0] for each in (POSITIVE, NEGATIVE)]
    positive, negative = (each[torch.randperm(len(each), generator=generator, device=each.device)] for each in found)
    positive = positive[: int(num_samples * positive_fraction)]
    return positive, negative[: num_samples - len(positive)]


def ignore_unlabeled(
    kind: Int[Tensor, "N"], boxes: Float[Tensor, "N 4"], semantic: Int[Tensor, "H W"], max_fraction: float
) -> Int[Tensor, "N"]:
    """Change negative boxes to ignored ones if a larger fraction of their pixels is unlabeled.

    Boxes are clipped to the map and rounded to pixels; none of an empty box is unlabeled.
    """
    if max_fraction >= 1.0:
        return kind
    height, width = semantic.shape
    sums = functional.pad((semantic == IGNORE_INDEX).long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    limits = torch.tensor([width, height, width, height], device=boxes.device)
    x0, y0, x1, y1 = torch.minimum(boxes.round().long().clamp(min=0), limits).unbind(1)
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    fraction = inside / ((x1 - x0) * (y1 - y0)).clamp(min=1)
    return torch.where((kind == NEGATIVE) & (fraction > max_fraction), IGNORED, kind)


class Rois(NamedTuple):
    """Boxes that the heads are trained on, positive ones first; unused ones pad images with fewer boxes."""

    boxes: Float[Tensor, "B N 4"]
    is_used: Bool[Tensor, "B N"]


class RoiTargets(NamedTuple):
    """Targets of each box in one stage."""

    clusters: Int[Tensor, "B N"]
    """The number of clusters for background; -1 for an ignored box."""
    boxes: Float[Tensor, "B N 4"]
    nearest: Int[Tensor, "B N"]
    """Index of the assigned instance."""
    is_positive: Bool[Tensor, "B N"]


def panoptic_cascade_losses(
    network: PanopticCascade,
    levels: Levels,
    sizes: Int[Tensor, "B 2"],
    targets: tuple[CascadeSample, ...],
    config: CascadeTrainConfig,
    generator: torch.Generator,
) -> Losses:
    """Compute the losses of U2Seg's network (detectron2's PanopticFPN with CascadeROIHeads), with CutLER's DropLoss.

    `objectness` and `anchors` are classification and box regression of the RPN; `classes` and `boxes` are sums over the
    three stages.
    """
    outputs = network.proposal_generator(levels)
    objectness, anchors = rpn_losses(outputs, targets, config, generator)
    with torch.no_grad():
        proposal_config = ProposalConfig(pre_nms_topk=config.rpn_pre_nms_topk, post_nms_topk=config.rpn_post_nms_topk)
        detached = [RPNOutput(each.logits.float(), each.deltas.float()) for each in outputs]
        rois = sample_rois(find_top_proposals(detached, sizes, proposal_config), targets, config, generator)
    classes, boxes = cascade_losses(network.roi_heads, levels, sizes, rois, targets, config)
    semantic = levels[0].new_zeros(())
    if network.config.stuff_clusters:
        semantic = sem_seg_loss(network.sem_seg_head(levels), targets, config.sem_seg_loss_stride)
    return Losses(
        terms={
            "objectness": objectness,
            "anchors": anchors,
            "classes": classes,
            "boxes": boxes,
            "masks": mask_rcnn_loss(network.roi_heads, levels, rois, targets),
            "semantic": config.sem_seg_loss_weight * semantic,
        }
    )


def rpn_losses(
    outputs: list[RPNOutput], targets: tuple[CascadeSample, ...], config: CascadeTrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return binary cross-entropy of sampled anchors and L1 of the positive ones, both divided by the sample size."""
    flat = [flatten_predictions(each) for each in outputs]
    logits, deltas = (torch.cat(parts, dim=1).float() for parts in zip(*flat, strict=True))
    anchors = torch.cat([
        make_anchors(each.logits.shape[2], each.logits.shape[3], stride_px, side_px, logits.device)
        for each, stride_px, side_px in zip(outputs, FPN_STRIDES_PX, ANCHOR_SIDES_PX, strict=True)
    ])  # fmt: skip
    objectness, boxes = [], []
    for image, target in enumerate(targets):
        matches = match_boxes(anchors, target.boxes, *RPN_IOU_THRESHOLDS, allow_low_quality=True)
        kind = ignore_unlabeled(matches.kind, anchors, target.semantic, config.max_unlabeled_fraction)
        positive, negative = subsample_labels(kind, config.rpn_batch_size_per_image, RPN_POSITIVE_FRACTION, generator)
        sampled = torch.cat([positive, negative])
        is_positive = (torch.arange(len(sampled), device=logits.device) < len(positive)).float()
        objectness.append(
            functional.binary_cross_entropy_with_logits(logits[image, sampled], is_positive, reduction="sum")
        )
        target_deltas = get_deltas(anchors[positive], target.boxes[matches.nearest[positive]], _RPN_DELTA_WEIGHTS)
        boxes.append((deltas[image, positive] - target_deltas).abs().sum())
    count = config.rpn_batch_size_per_image * len(targets)
    return torch.stack(objectness).sum() / count, torch.stack(boxes).sum() / count


@torch.no_grad()
def sample_rois(
    proposals: Proposals, targets: tuple[CascadeSample, ...], config: CascadeTrainConfig, generator: torch.Generator
) -> Rois:
    """Sample from the proposals and the instances' own boxes, at most a quarter of them positive."""
    sampled = []
    for boxes, is_used, target in zip(proposals.boxes, proposals.is_valid, targets, strict=True):
        candidates = torch.cat([boxes[is_used], target.boxes])
        kind = match_boxes(candidates, target.boxes, CASCADE_IOU_THRESHOLDS[0], CASCADE_IOU_THRESHOLDS[0]).kind
        kind = ignore_unlabeled(kind, candidates, target.semantic, config.max_unlabeled_fraction)
        indices = subsample_labels(kind, config.roi_batch_size_per_image, ROI_POSITIVE_FRACTION, generator)
        sampled.append(candidates[torch.cat(indices)])
    length = max(1, *(len(each) for each in sampled))
    is_used = [torch.arange(length, device=each.device) < len(each) for each in sampled]
    padded = [functional.pad(each, (0, 0, 0, length - len(each))) for each in sampled]
    return Rois(boxes=torch.stack(padded), is_used=torch.stack(is_used))


@torch.no_grad()
def label_rois(
    rois: Rois, targets: tuple[CascadeSample, ...], iou_threshold: float, background: int, max_unlabeled_fraction: float
) -> RoiTargets:
    """Return the targets of a stage with this IoU threshold; `background` is the class of negative boxes."""
    parts = []
    for boxes, is_used, target in zip(*rois, targets, strict=True):
        nearest, kind = match_boxes(boxes, target.boxes, iou_threshold, iou_threshold)
        kind = ignore_unlabeled(kind, boxes, target.semantic, max_unlabeled_fraction)
        own = target.clusters[nearest] if len(target.clusters) else nearest
        classes = torch.where(kind == POSITIVE, own, torch.where(kind == NEGATIVE, background, _IGNORED_CLASS))
        matched = target.boxes[nearest] if len(target.boxes) else boxes
        parts.append((torch.where(is_used, classes, _IGNORED_CLASS), matched, nearest, is_used & (kind == POSITIVE)))
    return RoiTargets(*(torch.stack(each) for each in zip(*parts, strict=True)))


def cascade_losses(
    heads: CascadeROIHeads,
    levels: Levels,
    sizes: Int[Tensor, "B 2"],
    rois: Rois,
    targets: tuple[CascadeSample, ...],
    config: CascadeTrainConfig,
) -> tuple[Tensor, Tensor]:
    """Return class and box losses, summed over the stages; each stage refines the boxes of the previous one."""
    classes, boxes = [], []
    for stage, iou_threshold in enumerate(CASCADE_IOU_THRESHOLDS):
        output = run_stage(heads, stage, levels, rois.boxes)
        background = output.logits.shape[2] - 1
        roi_targets = label_rois(rois, targets, iou_threshold, background, config.max_unlabeled_fraction)
        classes.append(classification_loss(output, roi_targets, targets, config.droploss_iou_threshold))
        boxes.append(box_reg_loss(output, rois, roi_targets, stage))
        refined = clip_boxes(output.boxes.detach(), sizes)
        rois = Rois(boxes=refined, is_used=rois.is_used & is_nonempty(refined))
    return torch.stack(classes).sum(), torch.stack(boxes).sum()


def run_stage(heads: CascadeROIHeads, stage: int, levels: Levels, boxes: Float[Tensor, "B N 4"]) -> StageOutput:
    """Run `CascadeROIHeads.run_stage` with a third of the gradient to the features (detectron2's cascade_rcnn.py)."""
    pooled = heads.pool(levels, boxes, BOX_POOL_SIZE)
    if pooled.requires_grad:
        pooled.register_hook(lambda gradient: gradient / len(STAGE_DELTA_WEIGHTS))
    logits, deltas = heads.box_predictor[stage](heads.box_head[stage](pooled))
    deltas = deltas.float()
    refined = apply_deltas(boxes, deltas, STAGE_DELTA_WEIGHTS[stage])
    return StageOutput(logits=logits.float(), deltas=deltas, boxes=refined)


def classification_loss(
    output: StageOutput, roi_targets: RoiTargets, targets: tuple[CascadeSample, ...], droploss_iou_threshold: float
) -> Tensor:
    """Return the mean cross-entropy over all boxes that are not ignored; boxes far from every label count as zero.

    DropLoss (CutLER, section 3.3). Unlike in CutLER's code, the labels of an image are all of them, not those matched.
    """
    max_ious = []
    for boxes, target in zip(output.boxes.detach(), targets, strict=True):
        has_labels = len(target.boxes) > 0
        max_ious.append(box_iou(boxes, target.boxes).amax(1) if has_labels else boxes.new_zeros(len(boxes)))
    is_near = torch.stack(max_ious) > droploss_iou_threshold
    logits, classes = output.logits.flatten(0, 1), roi_targets.clusters.flatten()
    losses = functional.cross_entropy(logits, classes, reduction="none", ignore_index=_IGNORED_CLASS)
    return (losses * is_near.flatten()).sum() / (classes != _IGNORED_CLASS).sum().clamp(min=1)


def box_reg_loss(output: StageOutput, rois: Rois, roi_targets: RoiTargets, stage: int) -> Tensor:
    """Return the L1 distance of the positive boxes' deltas, divided by the number of all boxes."""
    positive = roi_targets.is_positive
    target_deltas = get_deltas(rois.boxes[positive], roi_targets.boxes[positive], STAGE_DELTA_WEIGHTS[stage])
    return (output.deltas[positive] - target_deltas).abs().sum() / rois.is_used.sum().clamp(min=1)


def mask_rcnn_loss(heads: CascadeROIHeads, levels: Levels, rois: Rois, targets: tuple[CascadeSample, ...]) -> Tensor:
    """Return the binary cross-entropy of the positive boxes' masks, each for the cluster of its instance."""
    channels = heads.mask_head.predictor.out_channels
    roi_targets = label_rois(rois, targets, CASCADE_IOU_THRESHOLDS[0], 0, 1.0)
    count = int(roi_targets.is_positive.sum(1).max())
    if not count:
        return levels[0].new_zeros(())
    # Positive boxes come first.
    positive, boxes = roi_targets.is_positive[:, :count], rois.boxes[:, :count]
    pooled = heads.pool(levels, boxes, MASK_SIZE // 2)
    clusters = torch.where(positive, roi_targets.clusters[:, :count], 0).clamp(max=channels - 1)
    logits = heads.mask_head(pooled, clusters)[positive].float()
    crops = [
        crop_maps(each.masks[nearest[is_positive]].float(), own[is_positive], MASK_SIZE) >= 0.5
        for each, own, nearest, is_positive in zip(
            targets, boxes, roi_targets.nearest[:, :count], positive, strict=True
        )
    ]
    return functional.binary_cross_entropy_with_logits(logits, torch.cat(crops).float())


def sem_seg_loss(logits: Float[Tensor, "B S+1 h w"], targets: tuple[CascadeSample, ...], stride_px: int) -> Tensor:
    """Return the mean cross-entropy over the pixels, or every fourth, that are not ignored; 0 if all are."""
    target = torch.stack([each.semantic for each in targets])
    logits = logits.float()
    if stride_px == 1:
        logits = functional.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    else:
        target = target[:, stride_px // 2 :: stride_px, stride_px // 2 :: stride_px]
    summed = functional.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return summed / (target != IGNORE_INDEX).sum().clamp(min=1)


def crop_maps(maps: Float[Tensor, "N H W"], boxes: Float[Tensor, "N 4"], size: int) -> Float[Tensor, "N size size"]:
    """Return the mean of each map in the bins of its box, whose coordinates are pixels of the map.

    RoIAlign with a sample for each pixel, as detectron2's `BitMasks.crop_and_resize`. The samples form a grid, so
    rows and columns are averaged one after the other.
    """
    x0, y0, x1, y1 = boxes.float().unbind(1)
    rows = _bin_weights(y0, y1, maps.shape[1], size)
    columns = _bin_weights(x0, x1, maps.shape[2], size)
    with torch.autocast(maps.device.type, enabled=False):  # bf16 cannot tell one half from slightly less
        return torch.bmm(torch.bmm(rows, maps), columns.transpose(1, 2))


def _bin_weights(
    start: Float[Tensor, "N"], end: Float[Tensor, "N"], length: int, size: int
) -> Float[Tensor, "N size length"]:
    """Return the weight of each of `length` pixels in each bin between `start` and `end`.

    Samples are bilinear and at most a pixel apart; a sample more than a pixel outside counts as zero. An empty box has
    no samples.
    """
    bin_length = ((end - start) / size)[:, None, None]
    count = torch.ceil(bin_length)
    samples = count.clamp(min=1.0)
    sample = torch.arange(int(samples.max()) if len(samples) else 0, device=start.device)
    bins = torch.arange(size, device=start.device)[:, None]
    position = start[:, None, None] - 0.5 + (bins + (sample + 0.5) / samples) * bin_length  # N size samples
    is_counted = (sample < count) & (position >= -1.0) & (position <= length)
    position = position.clamp(0.0, length - 1.0)
    first = position.floor()
    second_weight = (position - first) * is_counted / samples
    weights = torch.zeros(len(start), size, length, device=start.device)
    weights.scatter_add_(2, first.long(), is_counted / samples - second_weight)
    return weights.scatter_add_(2, (first.long() + 1).clamp(max=length - 1), second_weight)
