"""Losses of a mask transformer: Hungarian matching, masks, classes, predicted IoU and the semantic map."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from model.networks.mask_transformer import AuxOutput, DecoderOutput
from training.mask_transformer.samples import Targets
from training.trainer.distributed import mean_over_processes
from training.trainer.task import IGNORE_INDEX, Losses

MASK_WEIGHT = 5.0
DICE_WEIGHT = 5.0
CLASS_WEIGHT = 2.0
SEMANTIC_WEIGHT = 1.0
IOU_WEIGHT = 1.0
NO_OBJECT_WEIGHT = 0.1
"""Weight of the class loss of unmatched queries."""
LABEL_SMOOTHING = 0.1
_MAX_UNLABELED = 0.5
"""Fraction of an unmatched query's mask that may be unlabeled before DropLoss drops its class loss."""
_MIN_WEIGHT_SUM = 1e-3
"""Prevents division by zero."""
_NAN_COST = 1e6


@dataclass(frozen=True, kw_only=True)
class MatchedPairs:
    """Matched pairs of query and target over a whole batch."""

    images: Int[Tensor, "P"]
    queries: Int[Tensor, "P"]
    masks: Float[Tensor, "P h w"]
    """Target masks."""
    clusters: Int[Tensor, "P"]
    weights: Float[Tensor, "P"]
    is_in_labeled_area: Bool[Tensor, "B Q"]
    """For every query: whether it is trained as no-object if it is unmatched."""


def mask_transformer_losses(output: DecoderOutput, targets: Targets, no_object_from_score: float = 0.0) -> Losses:
    """Compute Mask2Former's losses (weights 5, 5, 2), with a predicted IoU and a dense semantic term.

    Unlike Mask2Former: queries are matched once, by the final output at patch resolution, and all intermediate blocks
    use this matching (`layers`); masks are compared at all map pixels instead of sampled points; a pair is weighted by
    its target; and, as in CutLER's DropLoss, an unmatched query is not trained where labels are missing. Runs in fp32.

    `no_object_from_score` adds, for a matched query, a no-object loss weighted by it times (1 - target weight).
    Without it, a query becomes as confident of uncertain labels as of certain ones, only later; with 1, its object
    probability converges to the target's weight.
    """
    with torch.autocast(output.mask_logits.device.type, enabled=False):
        output = _to_fp32(output)
        pairs = hungarian_match(output, targets)
        masks = output.mask_logits[pairs.images, pairs.queries]
        mask, dice = mask_losses(masks, pairs.masks, pairs.weights)
        ious = paired_mask_iou(masks, pairs.masks)
        quality = functional.binary_cross_entropy_with_logits(
            output.iou_logits[pairs.images, pairs.queries], ious, reduction="none"
        )
        semantic, accuracy = semantic_loss(output.semantic_logits, targets.semantic)
        return Losses(
            terms={
                "mask": MASK_WEIGHT * mask,
                "dice": DICE_WEIGHT * dice,
                "classes": CLASS_WEIGHT * class_loss(output.class_logits, pairs, no_object_from_score),
                "quality": IOU_WEIGHT * _weighted_mean(quality, pairs.weights),
                "semantic": SEMANTIC_WEIGHT * semantic,
                "layers": _aux_loss(output.aux_outputs, pairs, no_object_from_score),
            },
            metrics={"iou": _weighted_mean(ious, pairs.weights), "stuff": accuracy},
        )


@torch.no_grad()
def hungarian_match(output: DecoderOutput, targets: Targets) -> MatchedPairs:
    """Match targets to queries one to one in each image, with minimal total cost."""
    finest = output.aux_outputs[-1] if output.aux_outputs else output
    grid = finest.mask_logits.shape[-1]
    coarse = functional.adaptive_avg_pool2d(output.mask_logits, grid).flatten(2)
    probabilities = output.class_logits.softmax(-1)
    target_masks = functional.adaptive_avg_pool2d(targets.masks.float(), grid).flatten(1)
    queries, matched, first = [], [], 0
    for image, count in enumerate(targets.image_indices.bincount(minlength=len(coarse)).tolist()):
        own = slice(first, first + count)
        cost = _matching_cost(coarse[image], probabilities[image], target_masks[own], targets.clusters[own])
        rows, columns = linear_sum_assignment(cost.nan_to_num(nan=_NAN_COST).numpy(force=True))
        queries.append(torch.from_numpy(rows))
        matched.append(torch.from_numpy(columns) + first)
        first += count
    order = torch.cat(matched).to(coarse.device)
    return MatchedPairs(
        images=targets.image_indices[order],
        queries=torch.cat(queries).to(order.device),
        masks=targets.masks[order].float(),
        clusters=targets.clusters[order],
        weights=targets.weights[order],
        is_in_labeled_area=is_in_labeled_area(coarse, targets.is_labeled),
    )


def is_in_labeled_area(coarse: Float[Tensor, "B Q N"], is_labeled: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B Q"]:
    """Return whether at least half of each mask (logits at patch resolution) is labeled; True for an empty mask."""
    grid = round(coarse.shape[2] ** 0.5)
    fractions = functional.adaptive_avg_pool2d(is_labeled.float(), grid).flatten(1)
    masks = (coarse > 0.0).to(fractions.dtype)
    labeled_area = torch.einsum("bqn,bn->bq", masks, fractions)
    return labeled_area >= (1.0 - _MAX_UNLABELED) * masks.sum(2)


def mask_losses(
    logits: Float[Tensor, "P h w"], masks: Float[Tensor, "P h w"], weights: Float[Tensor, "P"]
) -> tuple[Tensor, Tensor]:
    """Return binary cross-entropy and Dice loss, weighted means over the pairs; 0 without pairs."""
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2))
    probabilities, target = logits.sigmoid().flatten(1), masks.flatten(1)
    dice = 1.0 - (2.0 * (probabilities * target).sum(1) + 1.0) / (probabilities.sum(1) + target.sum(1) + 1.0)
    return _weighted_mean(cross_entropy, weights), _weighted_mean(dice, weights)


def class_loss(logits: Float[Tensor, "B Q K+1"], pairs: MatchedPairs, no_object_from_score: float = 0.0) -> Tensor:
    """Return the weighted cross-entropy of matched queries with their clusters, of others with no-object."""
    no_object = logits.shape[-1] - 1
    targets = torch.full(logits.shape[:2], no_object, dtype=torch.int64, device=logits.device)
    targets[pairs.images, pairs.queries] = pairs.clusters
    # Not cross_entropy's class weights: with label smoothing they would weight the smoothed part by all classes.
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    weights = torch.where(pairs.is_in_labeled_area, NO_OBJECT_WEIGHT, 0.0)
    weights[pairs.images, pairs.queries] = pairs.weights
    if not no_object_from_score:
        return _weighted_mean(losses, weights.flatten())
    matched = logits[pairs.images, pairs.queries]
    no_object_losses = functional.cross_entropy(
        matched, torch.full_like(pairs.clusters, no_object), reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    no_object_weights = no_object_from_score * (1.0 - pairs.weights)
    return _weighted_mean(torch.cat([losses, no_object_losses]), torch.cat([weights.flatten(), no_object_weights]))


def semantic_loss(logits: Float[Tensor, "B L h w"], target: Int[Tensor, "B h w"]) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the accuracy over the map pixels that are not ignored; 0 if all are."""
    is_counted = target != IGNORE_INDEX
    count = mean_over_processes(is_counted.sum().float()).clamp(min=1.0)
    summed = functional.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
    correct = ((logits.argmax(1) == target) & is_counted).sum()
    return summed / count, correct / count


@torch.no_grad()
def paired_mask_iou(logits: Float[Tensor, "P h w"], masks: Float[Tensor, "P h w"]) -> Float[Tensor, "P"]:
    """Return the IoU of each thresholded prediction with its target."""
    predicted, target = logits.flatten(1) > 0.0, masks.flatten(1) > 0.5
    return (predicted & target).sum(1) / (predicted | target).sum(1).clamp(min=1)


def _to_fp32(output: DecoderOutput) -> DecoderOutput:
    return DecoderOutput(
        class_logits=output.class_logits.float(),
        iou_logits=output.iou_logits.float(),
        mask_logits=output.mask_logits.float(),
        semantic_logits=output.semantic_logits.float(),
        aux_outputs=tuple(AuxOutput(*(logits.float() for logits in each)) for each in output.aux_outputs),
    )


def _weighted_mean(values: Float[Tensor, "n"], weights: Float[Tensor, "n"]) -> Tensor:
    return (values * weights).sum() / mean_over_processes(weights.sum()).clamp(min=_MIN_WEIGHT_SUM)


def _matching_cost(
    logits: Float[Tensor, "Q N"],
    probabilities: Float[Tensor, "Q K+1"],
    masks: Float[Tensor, "M N"],
    clusters: Int[Tensor, "M"],
) -> Float[Tensor, "Q M"]:
    num_pixels = logits.shape[1]
    cross_entropy = (
        functional.softplus(-logits) @ masks.T + functional.softplus(logits) @ (1.0 - masks).T
    ) / num_pixels
    soft = logits.sigmoid()
    dice = 1.0 - (2.0 * soft @ masks.T + 1.0) / (soft.sum(1)[:, None] + masks.sum(1)[None] + 1.0)
    return MASK_WEIGHT * cross_entropy + DICE_WEIGHT * dice - CLASS_WEIGHT * probabilities[:, clusters]


def _aux_loss(layers: tuple[AuxOutput, ...], pairs: MatchedPairs, no_object_from_score: float) -> Tensor:
    """Return the mask and class losses of the intermediate blocks, at patch resolution."""
    total = pairs.masks.new_zeros(())
    for layer in layers:
        masks = functional.adaptive_avg_pool2d(pairs.masks, layer.mask_logits.shape[-1])
        mask, dice = mask_losses(layer.mask_logits[pairs.images, pairs.queries], masks, pairs.weights)
        classes = class_loss(layer.class_logits, pairs, no_object_from_score)
        total = total + MASK_WEIGHT * mask + DICE_WEIGHT * dice + CLASS_WEIGHT * classes
    return total
