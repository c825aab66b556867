"""How wrong a mask transformer's prediction is: matched masks, classes, qualities and the dense map."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from model.networks.mask_transformer import AuxOutput, DecoderOutput
from training.mask_transformer.feature_dataset import Target
from training.trainer.distributed import average
from training.trainer.task import IGNORE_INDEX

MASK_WEIGHT = 5.0
DICE_WEIGHT = 5.0
CLASS_WEIGHT = 2.0
SEMANTIC_WEIGHT = 1.0
QUALITY_WEIGHT = 1.0
EMBEDDING_WEIGHT = 1.0
NO_OBJECT_WEIGHT = 0.1
"""Of the class loss where a query matched nothing."""
LABEL_SMOOTHING = 0.1
_MOST_UNKNOWN = 0.5
"""Share of an unmatched query's mask from which nothing is asked of it."""
_LEAST_SUM = 1e-3
"""Of weights, against division by nothing."""
_WORST = 1e6


@dataclass(frozen=True, kw_only=True)
class MaskTransformerLosses:
    """Weighted terms, whose sum is what is minimised, and two scores to watch."""

    mask: Tensor
    dice: Tensor
    classes: Tensor
    quality: Tensor
    semantic: Tensor
    layers: Tensor
    embedding: Tensor | None = None
    """Of networks that have such a head."""
    iou: Tensor
    """Mean of the matched masks, by weight: a score, as the next one, and none of the sum."""
    stuff: Tensor
    """Share of the known cells whose dense class is right."""

    @property
    def total(self) -> Tensor:
        total = self.mask + self.dice + self.classes + self.quality + self.semantic + self.layers
        return total if self.embedding is None else total + self.embedding

    def as_floats(self) -> dict[str, float]:
        terms = {**vars(self), "total": self.total}
        return {name: float(value.detach()) for name, value in terms.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class MatchedPairs:
    """Pairs of query and target over a whole batch, and what the other queries are held to."""

    images: Int[Tensor, "P"]
    queries: Int[Tensor, "P"]
    masks: Float[Tensor, "P h w"]
    clusters: Int[Tensor, "P"]
    weights: Float[Tensor, "P"]
    """Of the targets."""
    vectors: Float[Tensor, "P D"] | None
    is_known: Bool[Tensor, "B Q"]
    """Whether a query, if unmatched, drew where everything is known."""


def compute_losses(prediction: DecoderOutput, targets: tuple[Target, ...], doubt: float = 0.0) -> MaskTransformerLosses:
    """Mask2Former's loss (weights 5, 5, 2) with a predicted IoU and a dense semantic term.

    Unlike it: the queries are matched once, by the final prediction at patch resolution, and every block is held to
    that matching; masks are compared on all cells, there being few; a pair counts by its target's weight; and, as in
    CutLER's DropLoss, an unmatched query is free where it may have found what has no label. Always in fp32.

    `doubt`: the weight of "none" for a matched query, for each part of 1 that its target's weight lacks. Without it a
    query learns to be as sure of doubtful objects as of others, only later; with 1 its chance of an object becomes
    the target's weight.
    """
    with torch.autocast(prediction.mask_logits.device.type, enabled=False):
        return _compute_in_full(_enlarge_floats(prediction), targets, doubt)


def _compute_in_full(prediction: DecoderOutput, targets: tuple[Target, ...], doubt: float) -> MaskTransformerLosses:
    matches = match(prediction, targets)
    matched = prediction.mask_logits[matches.images, matches.queries]
    mask, dice = mask_losses(matched, matches.masks, matches.weights)
    quality = prediction.iou_logits[matches.images, matches.queries]
    overlaps = measure_iou(matched, matches.masks)
    return MaskTransformerLosses(
        mask=MASK_WEIGHT * mask,
        dice=DICE_WEIGHT * dice,
        classes=CLASS_WEIGHT * class_loss(prediction.class_logits, matches, doubt),
        quality=QUALITY_WEIGHT
        * _average(
            functional.binary_cross_entropy_with_logits(quality, overlaps, reduction="none"),
            matches.weights,
        ),
        semantic=SEMANTIC_WEIGHT * semantic_loss(prediction.semantic_logits, targets),
        layers=_compare_layers(prediction, matches, doubt),
        embedding=_compare_embeddings(prediction, matches),
        iou=_average(overlaps, matches.weights),
        stuff=measure_accuracy(prediction.semantic_logits, targets),
    )


@torch.no_grad()
def match(prediction: DecoderOutput, targets: tuple[Target, ...]) -> MatchedPairs:
    """The cheapest one-to-one assignment of targets to queries in each picture."""
    grid = (
        prediction.aux_outputs[-1].mask_logits.shape[-1] if prediction.aux_outputs else prediction.mask_logits.shape[-1]
    )
    low = functional.adaptive_avg_pool2d(prediction.mask_logits, grid).flatten(2)
    chances = prediction.class_logits.softmax(-1)
    images, queries, picked = [], [], []
    for image, target in enumerate(targets):
        wanted = functional.adaptive_avg_pool2d(target.masks, grid).flatten(1)
        cost = _price(low[image], chances[image], wanted, target.clusters)
        rows, columns = linear_sum_assignment(cost.nan_to_num(nan=_WORST).numpy(force=True))
        images += [image] * len(rows)
        queries += rows.tolist()
        picked.append(torch.from_numpy(columns))
    chosen = list(zip(targets, picked, strict=True))
    device = low.device
    return MatchedPairs(
        images=torch.tensor(images, dtype=torch.int64, device=device),
        queries=torch.tensor(queries, dtype=torch.int64, device=device),
        masks=torch.cat([target.masks[order] for target, order in chosen]),
        clusters=torch.cat([target.clusters[order] for target, order in chosen]),
        weights=torch.cat([target.weights[order] for target, order in chosen]),
        vectors=_join_vectors(targets, picked),
        is_known=is_in_labeled_area(low, torch.stack([target.known for target in targets])),
    )


def is_in_labeled_area(low: Float[Tensor, "B Q N"], known: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B Q"]:
    """Whether at least half of each mask, logits at patch resolution, lies where things are known; so do empty ones."""
    grid = round(low.shape[2] ** 0.5)
    shares = functional.adaptive_avg_pool2d(known.float(), grid).flatten(1)
    drawn = (low > 0.0).to(shares.dtype)
    inside = torch.einsum("bqn,bn->bq", drawn, shares)
    return inside >= (1.0 - _MOST_UNKNOWN) * drawn.sum(2)


def mask_losses(
    logits: Float[Tensor, "P h w"], masks: Float[Tensor, "P h w"], weights: Float[Tensor, "P"]
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and Dice loss, means over pairs by their weights; 0 if there is none."""
    cross = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2))
    chances, wanted = logits.sigmoid().flatten(1), masks.flatten(1)
    dice = 1.0 - (2.0 * (chances * wanted).sum(1) + 1.0) / (chances.sum(1) + wanted.sum(1) + 1.0)
    return _average(cross, weights), _average(dice, weights)


def class_loss(logits: Float[Tensor, "B Q K+1"], matches: MatchedPairs, doubt: float = 0.0) -> Tensor:
    """Cross-entropy by the weight of each query's target; one without should say "none", at a tenth or not at all."""
    none = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], none, dtype=torch.int64, device=logits.device)
    wanted[matches.images, matches.queries] = matches.clusters
    # Not cross_entropy's class weights: with label smoothing they would weigh the smoothed share by all classes.
    each = functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    weights = torch.where(matches.is_known, NO_OBJECT_WEIGHT, 0.0)
    weights[matches.images, matches.queries] = matches.weights
    if not doubt:
        return _average(each, weights.flatten())
    matched = logits[matches.images, matches.queries]
    wrong = functional.cross_entropy(
        matched, torch.full_like(matches.clusters, none), reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    doubts = doubt * (1.0 - matches.weights)
    return _average(torch.cat([each, wrong]), torch.cat([weights.flatten(), doubts]))


def semantic_loss(logits: Float[Tensor, "B L h w"], targets: tuple[Target, ...]) -> Tensor:
    """Mean cross-entropy over the cells that are not ignored; 0 if all are."""
    wanted = torch.stack([target.semantic for target in targets])
    summed = functional.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
    return summed / average((wanted != IGNORE_INDEX).sum().float()).clamp(min=1.0)


@torch.no_grad()
def measure_accuracy(logits: Float[Tensor, "B L h w"], targets: tuple[Target, ...]) -> Tensor:
    """Share of the cells that are not ignored whose likeliest class is the target's."""
    wanted = torch.stack([target.semantic for target in targets])
    right = ((logits.argmax(1) == wanted) & (wanted != IGNORE_INDEX)).sum()
    return right / average((wanted != IGNORE_INDEX).sum().float()).clamp(min=1.0)


@torch.no_grad()
def measure_iou(logits: Float[Tensor, "P h w"], masks: Float[Tensor, "P h w"]) -> Float[Tensor, "P"]:
    """Intersection over union of thresholded masks."""
    drawn, wanted = logits.flatten(1) > 0.0, masks.flatten(1) > 0.5
    return (drawn & wanted).sum(1) / (drawn | wanted).sum(1).clamp(min=1)


def _enlarge_floats(prediction: DecoderOutput) -> DecoderOutput:
    """The same in fp32, whatever the network computed in."""
    return DecoderOutput(
        class_logits=prediction.class_logits.float(),
        iou_logits=prediction.iou_logits.float(),
        mask_logits=prediction.mask_logits.float(),
        semantic_logits=prediction.semantic_logits.float(),
        aux_outputs=tuple(AuxOutput(*(logits.float() for logits in each)) for each in prediction.aux_outputs),
        embeddings=None if prediction.embeddings is None else prediction.embeddings.float(),
    )


def _join_vectors(targets: tuple[Target, ...], picked: list[Tensor]) -> Float[Tensor, "P D"] | None:
    pairs = zip(targets, picked, strict=True)
    known = [target.vectors[order] for target, order in pairs if target.vectors is not None]
    return torch.cat(known) if known else None


def _average(values: Float[Tensor, "n"], weights: Float[Tensor, "n"]) -> Tensor:
    return (values * weights).sum() / average(weights.sum()).clamp(min=_LEAST_SUM)


def _price(low: Tensor, chances: Tensor, wanted: Tensor, clusters: Tensor) -> Float[Tensor, "Q M"]:
    cells = low.shape[1]
    cross = (functional.softplus(-low) @ wanted.T + functional.softplus(low) @ (1.0 - wanted).T) / cells
    soft = low.sigmoid()
    dice = 1.0 - (2.0 * soft @ wanted.T + 1.0) / (soft.sum(1)[:, None] + wanted.sum(1)[None] + 1.0)
    return MASK_WEIGHT * cross + DICE_WEIGHT * dice - CLASS_WEIGHT * chances[:, clusters]


def _compare_embeddings(prediction: DecoderOutput, matches: MatchedPairs) -> Tensor | None:
    """One less the cosine with what the masks hold."""
    if prediction.embeddings is None or matches.vectors is None:
        return None
    found = prediction.embeddings[matches.images, matches.queries]
    cosines = functional.cosine_similarity(found, matches.vectors, dim=1)
    return EMBEDDING_WEIGHT * _average(1.0 - cosines, matches.weights)


def _compare_layers(prediction: DecoderOutput, matches: MatchedPairs, doubt: float) -> Tensor:
    total = prediction.mask_logits.new_zeros(())
    for layer in prediction.aux_outputs:
        wanted = functional.adaptive_avg_pool2d(matches.masks, layer.mask_logits.shape[-1])
        mask, dice = mask_losses(layer.mask_logits[matches.images, matches.queries], wanted, matches.weights)
        total = (
            total
            + MASK_WEIGHT * mask
            + DICE_WEIGHT * dice
            + CLASS_WEIGHT * class_loss(layer.class_logits, matches, doubt)
        )
    return total
