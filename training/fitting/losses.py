"""How wrong a mask transformer's prediction is: matched masks, classes, qualities and the dense map."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from model.network.mask_transformer import Prediction
from training.fitting.data import IGNORE, Target

MASK_WEIGHT = 5.0
DICE_WEIGHT = 5.0
CLASS_WEIGHT = 2.0
SEMANTIC_WEIGHT = 1.0
QUALITY_WEIGHT = 1.0
NONE_WEIGHT = 0.1
"""Of the class loss where a query matched nothing."""
LABEL_SMOOTHING = 0.1
_WORST = 1e6


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Weighted terms; their sum is what is minimised."""

    mask: Tensor
    dice: Tensor
    classes: Tensor
    quality: Tensor
    semantic: Tensor
    layers: Tensor

    @property
    def total(self) -> Tensor:
        return self.mask + self.dice + self.classes + self.quality + self.semantic + self.layers

    def as_floats(self) -> dict[str, float]:
        return {name: float(value.detach()) for name, value in {**vars(self), "total": self.total}.items()}


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Pairs of query and target over a whole batch."""

    images: Int[Tensor, "P"]
    queries: Int[Tensor, "P"]
    masks: Float[Tensor, "P h w"]
    clusters: Int[Tensor, "P"]


def compute_losses(prediction: Prediction, targets: tuple[Target, ...]) -> Losses:
    """Mask2Former's loss (weights 5, 5, 2) with a predicted IoU and a dense semantic term.

    Unlike it: the queries are matched once, by the final prediction at patch resolution, and every block is held to
    that matching; masks are compared on all cells, there being few.
    """
    matches = match(prediction, targets)
    count = max(1, len(matches.queries))
    matched = prediction.masks[matches.images, matches.queries]
    mask, dice = compare_masks(matched, matches.masks, count)
    quality = prediction.quality[matches.images, matches.queries]
    return Losses(
        mask=MASK_WEIGHT * mask,
        dice=DICE_WEIGHT * dice,
        classes=CLASS_WEIGHT * compare_classes(prediction.classes, matches),
        quality=QUALITY_WEIGHT
        * functional.binary_cross_entropy_with_logits(quality, measure_iou(matched, matches.masks), reduction="sum")
        / count,
        semantic=SEMANTIC_WEIGHT * compare_semantic(prediction.semantic, targets),
        layers=_compare_layers(prediction, matches, count),
    )


@torch.no_grad()
def match(prediction: Prediction, targets: tuple[Target, ...]) -> Matches:
    """The cheapest one-to-one assignment of targets to queries in each picture."""
    grid = prediction.layers[-1].masks.shape[-1] if prediction.layers else prediction.masks.shape[-1]
    low = functional.adaptive_avg_pool2d(prediction.masks, grid).flatten(2)
    chances = prediction.classes.softmax(-1)
    images, queries, picked = [], [], []
    for image, target in enumerate(targets):
        wanted = functional.adaptive_avg_pool2d(target.masks, grid).flatten(1)
        cost = _price(low[image], chances[image], wanted, target.clusters)
        rows, columns = linear_sum_assignment(cost.nan_to_num(nan=_WORST).numpy(force=True))
        images += [image] * len(rows)
        queries += rows.tolist()
        picked.append(torch.from_numpy(columns))
    return Matches(
        images=torch.tensor(images, dtype=torch.int64),
        queries=torch.tensor(queries, dtype=torch.int64),
        masks=torch.cat([target.masks[order] for target, order in zip(targets, picked, strict=True)]),
        clusters=torch.cat([target.clusters[order] for target, order in zip(targets, picked, strict=True)]),
    )


def compare_masks(logits: Tensor, masks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and Dice loss of pairs [P h w], summed over pairs and divided by `count`."""
    cross = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2)).sum()
    chances, wanted = logits.sigmoid().flatten(1), masks.flatten(1)
    dice = 1.0 - (2.0 * (chances * wanted).sum(1) + 1.0) / (chances.sum(1) + wanted.sum(1) + 1.0)
    return cross / count, dice.sum() / count


def compare_classes(logits: Float[Tensor, "B Q K+1"], matches: Matches) -> Tensor:
    """Cross-entropy of every query; those without a match should say "none", at a tenth of the weight."""
    none = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], none, dtype=torch.int64)
    wanted[matches.images, matches.queries] = matches.clusters
    # Not cross_entropy's class weights: with label smoothing they would weigh the smoothed share by all classes.
    each = functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    weights = torch.where(wanted.flatten() == none, NONE_WEIGHT, 1.0)
    return (each * weights).sum() / weights.sum()


def compare_semantic(logits: Float[Tensor, "B L h w"], targets: tuple[Target, ...]) -> Tensor:
    """Mean cross-entropy over the cells that are not ignored; 0 if all are."""
    wanted = torch.stack([target.semantic for target in targets])
    summed = functional.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
    return summed / max(1, int((wanted != IGNORE).sum()))


@torch.no_grad()
def measure_iou(logits: Float[Tensor, "P h w"], masks: Float[Tensor, "P h w"]) -> Float[Tensor, "P"]:
    """Intersection over union of thresholded masks."""
    drawn, wanted = logits.flatten(1) > 0.0, masks.flatten(1) > 0.5
    return (drawn & wanted).sum(1) / (drawn | wanted).sum(1).clamp(min=1)


def _price(low: Tensor, chances: Tensor, wanted: Tensor, clusters: Tensor) -> Float[Tensor, "Q M"]:
    cells = low.shape[1]
    cross = (functional.softplus(-low) @ wanted.T + functional.softplus(low) @ (1.0 - wanted).T) / cells
    soft = low.sigmoid()
    dice = 1.0 - (2.0 * soft @ wanted.T + 1.0) / (soft.sum(1)[:, None] + wanted.sum(1)[None] + 1.0)
    return MASK_WEIGHT * cross + DICE_WEIGHT * dice - CLASS_WEIGHT * chances[:, clusters]


def _compare_layers(prediction: Prediction, matches: Matches, count: int) -> Tensor:
    total = prediction.masks.new_zeros(())
    for layer in prediction.layers:
        wanted = functional.adaptive_avg_pool2d(matches.masks, layer.masks.shape[-1])
        mask, dice = compare_masks(layer.masks[matches.images, matches.queries], wanted, count)
        total = total + MASK_WEIGHT * mask + DICE_WEIGHT * dice + CLASS_WEIGHT * compare_classes(layer.classes, matches)
    return total
