"""How wrong a panoptic cascade is: proposals, three stages of boxes, masks and the dense map."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.network.boxes import clip, decode, encode, has_area
from model.network.cascade import BOX_SIDE, MASK_SIDE, STAGE_WEIGHTS, CascadeHeads, StageOutput
from model.network.panoptic_cascade import PanopticCascade
from model.network.proposals import (
    ANCHOR_SIDES_PX,
    LevelOutput,
    ProposalLimits,
    Proposals,
    draw_anchors,
    flatten_level,
    select_proposals,
)
from model.network.pyramid import STRIDES_PX as PYRAMID_STRIDES_PX
from model.network.resnet import STRIDES_PX
from training.fitting.cascade.mask_crops import crop_masks
from training.fitting.cascade.matching import Objects, compare_sets, draw, match, spare_ignored
from training.fitting.cascade.recipe import CascadeRecipe
from training.fitting.loop.trainee import IGNORE

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


class Wanted(NamedTuple):
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
    objects: tuple[Objects, ...],
    recipe: CascadeRecipe,
    generator: torch.Generator,
) -> CascadeLosses:
    """The loss of U2Seg's network (detectron2's PanopticFPN with CascadeROIHeads), with CutLER's DropLoss."""
    outputs = network.proposal_generator(levels)
    objectness, anchors = judge_proposals(outputs, objects, recipe, generator)
    with torch.no_grad():
        limits = ProposalLimits(per_level=recipe.proposals_per_level, total=recipe.proposals)
        detached = [LevelOutput(each.logits.float(), each.deltas.float()) for each in outputs]
        rois = draw_rois(select_proposals(detached, sizes, limits), objects, recipe, generator)
    classes, boxes = judge_stages(network.roi_heads, levels, sizes, rois, objects, recipe)
    semantic = levels[0].new_zeros(())
    if network.shape.stuff_clusters:
        semantic = judge_semantic(network.sem_seg_head(levels), objects, recipe.semantic_stride_px)
    return CascadeLosses(
        objectness=objectness,
        anchors=anchors,
        classes=classes,
        boxes=boxes,
        masks=judge_masks(network.roi_heads, levels, rois, objects),
        semantic=recipe.semantic_weight * semantic,
    )


def judge_proposals(
    outputs: list[LevelOutput], objects: tuple[Objects, ...], recipe: CascadeRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of drawn anchors and L1 of those on objects, both over the number that could be drawn."""
    flat = [flatten_level(each) for each in outputs]
    logits, deltas = (torch.cat(parts, dim=1).float() for parts in zip(*flat, strict=True))
    anchors = torch.cat([
        draw_anchors(each.logits.shape[2], each.logits.shape[3], stride_px, side_px, logits.device)
        for each, stride_px, side_px in zip(outputs, PYRAMID_STRIDES_PX, ANCHOR_SIDES_PX, strict=True)
    ])  # fmt: skip
    objectness, boxes = [], []
    for image, each in enumerate(objects):
        matches = match(anchors, each.boxes, *ANCHOR_IOUS, keeps_best=True)
        kind = spare_ignored(matches.kind, anchors, each.semantic == IGNORE, recipe.ignored_share)
        positive, negative = draw(kind, recipe.anchors, ANCHOR_SHARE, generator)
        chosen = torch.cat([positive, negative])
        wanted = (torch.arange(len(chosen), device=logits.device) < len(positive)).float()
        given = logits[image, chosen]
        objectness.append(functional.binary_cross_entropy_with_logits(given, wanted, reduction="sum"))
        moves = encode(anchors[positive], each.boxes[matches.nearest[positive]], _ANCHOR_WEIGHTS)
        boxes.append((deltas[image, positive] - moves).abs().sum())
    count = recipe.anchors * len(objects)
    return torch.stack(objectness).sum() / count, torch.stack(boxes).sum() / count


@torch.no_grad()
def draw_rois(
    proposals: Proposals, objects: tuple[Objects, ...], recipe: CascadeRecipe, generator: torch.Generator
) -> Rois:
    """Some of the proposals and of the objects' own boxes, at most a quarter of them on objects."""
    drawn = []
    for boxes, is_used, each in zip(proposals.boxes, proposals.is_used, objects, strict=True):
        candidates = torch.cat([boxes[is_used], each.boxes])
        kind = match(candidates, each.boxes, STAGE_IOUS[0], STAGE_IOUS[0]).kind
        kind = spare_ignored(kind, candidates, each.semantic == IGNORE, recipe.ignored_share)
        drawn.append(candidates[torch.cat(draw(kind, recipe.rois, ROI_SHARE, generator))])
    most = max(1, *(len(each) for each in drawn))
    is_used = [torch.arange(most, device=each.device) < len(each) for each in drawn]
    boxes = [functional.pad(each, (0, 0, 0, most - len(each))) for each in drawn]
    return Rois(boxes=torch.stack(boxes), is_used=torch.stack(is_used))


@torch.no_grad()
def assign(rois: Rois, objects: tuple[Objects, ...], iou: float, clusters: int, ignored_share: float) -> Wanted:
    """What a stage that counts a box as on an object from this IoU on should say."""
    parts = []
    for boxes, is_used, each in zip(*rois, objects, strict=True):
        nearest, kind = match(boxes, each.boxes, iou, iou)
        kind = spare_ignored(kind, boxes, each.semantic == IGNORE, ignored_share)
        own = each.clusters[nearest] if len(each.clusters) else nearest
        wanted = torch.where(kind == 1, own, torch.where(kind == 0, clusters, _UNJUDGED))
        matched = each.boxes[nearest] if len(each.boxes) else boxes
        parts.append((torch.where(is_used, wanted, _UNJUDGED), matched, nearest, is_used & (kind == 1)))
    return Wanted(*(torch.stack(each) for each in zip(*parts, strict=True)))


def judge_stages(
    heads: CascadeHeads,
    levels: Levels,
    sizes: Int[Tensor, "B 2"],
    rois: Rois,
    objects: tuple[Objects, ...],
    recipe: CascadeRecipe,
) -> tuple[Tensor, Tensor]:
    """Class and box loss of the three stages, each on the boxes that the one before made of its own."""
    classes, boxes = [], []
    for stage, iou in enumerate(STAGE_IOUS):
        output = run_stage(heads, stage, levels, rois.boxes)
        wanted = assign(rois, objects, iou, output.logits.shape[2] - 1, recipe.ignored_share)
        classes.append(compare_classes(output, wanted, objects, recipe.drop_iou))
        boxes.append(compare_boxes(output, rois, wanted, stage))
        moved = clip(output.boxes.detach(), sizes)
        rois = Rois(boxes=moved, is_used=rois.is_used & has_area(moved))
    return torch.stack(classes).sum(), torch.stack(boxes).sum()


def run_stage(heads: CascadeHeads, stage: int, levels: Levels, boxes: Float[Tensor, "B N 4"]) -> StageOutput:
    """As `CascadeHeads.run_stage`, but a third of its gradient reaches the features (detectron2's cascade_rcnn.py)."""
    pooled = heads.pool(levels[: len(STRIDES_PX)], STRIDES_PX, boxes, BOX_SIDE, heads.sampling)
    if pooled.requires_grad:
        pooled.register_hook(lambda gradient: gradient / len(STAGE_WEIGHTS))
    logits, deltas = heads.box_predictor[stage](heads.box_head[stage](pooled))
    deltas = deltas.float()
    return StageOutput(logits=logits.float(), deltas=deltas, boxes=decode(boxes, deltas, STAGE_WEIGHTS[stage]))


def compare_classes(output: StageOutput, wanted: Wanted, objects: tuple[Objects, ...], drop_iou: float) -> Tensor:
    """Cross-entropy, the mean over all boxes that are judged, though those far from every label count as zero.

    DropLoss (CutLER, section 3.3). Unlike CutLER's code, a picture's labels are all its labels, not those matched.
    """
    overlaps = []
    for boxes, each in zip(output.boxes.detach(), objects, strict=True):
        best = compare_sets(boxes, each.boxes).amax(1) if len(each.boxes) else boxes.new_zeros(len(boxes))
        overlaps.append(best)
    is_near = torch.stack(overlaps) > drop_iou
    given, said = output.logits.flatten(0, 1), wanted.clusters.flatten()
    each_loss = functional.cross_entropy(given, said, reduction="none", ignore_index=_UNJUDGED)
    return (each_loss * is_near.flatten()).sum() / (said != _UNJUDGED).sum().clamp(min=1)


def compare_boxes(output: StageOutput, rois: Rois, wanted: Wanted, stage: int) -> Tensor:
    """L1 of the deltas of boxes on objects, over the number of all boxes."""
    on = wanted.is_object
    moves = encode(rois.boxes[on], wanted.boxes[on], STAGE_WEIGHTS[stage])
    return (output.deltas[on] - moves).abs().sum() / rois.is_used.sum().clamp(min=1)


def judge_masks(heads: CascadeHeads, levels: Levels, rois: Rois, objects: tuple[Objects, ...]) -> Tensor:
    """Binary cross-entropy of the masks of drawn boxes on objects, each for its object's cluster."""
    channels = heads.mask_head.predictor.out_channels
    wanted = assign(rois, objects, STAGE_IOUS[0], 0, 1.0)
    count = int(wanted.is_object.sum(1).max())
    if not count:
        return levels[0].new_zeros(())
    on, boxes = wanted.is_object[:, :count], rois.boxes[:, :count]  # those on objects come first
    pooled = heads.pool(levels[: len(STRIDES_PX)], STRIDES_PX, boxes, MASK_SIDE // 2, heads.sampling)
    own = torch.where(on, wanted.clusters[:, :count], 0).clamp(max=channels - 1)
    logits = heads.mask_head(pooled, own)[on].float()
    crops = [
        crop_masks(each.masks, boxes[image][on[image]], wanted.nearest[image, :count][on[image]], MASK_SIDE)
        for image, each in enumerate(objects)
    ]
    return functional.binary_cross_entropy_with_logits(logits, torch.cat(crops).float())


def judge_semantic(logits: Float[Tensor, "B S+1 h w"], objects: tuple[Objects, ...], stride_px: int) -> Tensor:
    """Mean cross-entropy over pixels, or every fourth, that are not ignored; 0 if all are."""
    wanted = torch.stack([each.semantic for each in objects])
    logits = logits.float()
    if stride_px == 1:
        logits = functional.interpolate(logits, size=wanted.shape[1:], mode="bilinear", align_corners=False)
    else:
        wanted = wanted[:, stride_px // 2 :: stride_px, stride_px // 2 :: stride_px]
    summed = functional.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
    return summed / (wanted != IGNORE).sum().clamp(min=1)
