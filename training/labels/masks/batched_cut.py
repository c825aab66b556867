"""MaskCut for a batch of photos at once, on whatever device their features lie."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.errors import LabelStoreError
from training.labels.masks.discover import LEAST_AREA, MOST_OVERLAP, CutPlan
from training.labels.masks.eigen import solve_cuts

BatchSolver = Callable[[Bool[Tensor, "B P P"]], Float[Tensor, "B P"]]
_STRIDE = 8
"""Steps of a flood between two looks at whether it still spreads; each look waits for the device."""


def propose_batch(
    tokens: Float[Tensor, "B h w C"], plan: CutPlan, solve: BatchSolver = solve_cuts
) -> Bool[Tensor, "B N h w"]:
    """As `propose` of `training.labels.masks.discover`, photo by photo; N is the plan's cuts, and what is none, empty.

    No loop runs over photos. Raises LabelStoreError if `tokens` are not finite.
    """
    if not bool(tokens.isfinite().all()):
        raise LabelStoreError("features are not finite: the encoder or its cache is broken")
    flat = tokens.float()
    if plan.is_centred:
        flat = flat - flat.mean((1, 2), keepdim=True)
    flat = (flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-12)).flatten(1, 2)
    batch, height, width, _ = tokens.shape
    painted, previous = torch.zeros(2, batch, height, width, dtype=torch.bool, device=tokens.device)
    is_over = torch.zeros(batch, 1, 1, dtype=torch.bool, device=tokens.device)
    found = []
    for cut in range(plan.cuts):
        is_near = torch.bmm(flat, flat.mT) > plan.threshold
        masks = choose_objects(solve(is_near).unflatten(1, (height, width)))
        masks = masks & ~is_near.all(2).all(1).view(-1, 1, 1)
        fresh = masks & ~painted
        area = (masks if plan.is_faithful else fresh).sum((1, 2), keepdim=True)
        is_dropped = (area <= LEAST_AREA * height * width) | (_overlap(masks, previous) > MOST_OVERLAP)
        if plan.is_faithful:
            is_dropped = is_dropped & (cut > 0)
        else:
            is_dropped = is_over = is_over | is_dropped
        found.append(fresh & ~is_dropped)
        previous = masks & ~is_dropped
        painted = painted | previous
        flat = flat * ~previous.flatten(1).unsqueeze(-1)
    return torch.stack(found, dim=1)


def choose_objects(vectors: Float[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
    """As `training.labels.masks.discover.choose_object`, each on its own."""
    foreground = vectors > vectors.mean((1, 2), keepdim=True)
    seeds = _light(vectors.abs().flatten(1).argmax(1), vectors)
    corners = foreground[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(1).view(-1, 1, 1)
    is_turned = (corners >= 3) | ~(foreground & seeds).any(2, keepdim=True).any(1, keepdim=True)
    foreground = foreground ^ is_turned
    seeds = _light(torch.where(is_turned, -vectors, vectors).flatten(1).argmax(1), vectors)
    return flood(seeds & foreground, foreground)


def flood(seeds: Bool[Tensor, "B h w"], foreground: Bool[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
    """The parts of the foreground that seeds reach over shared sides."""
    reached = seeds
    while True:
        before = reached
        for _ in range(_STRIDE):
            spread = reached.clone()
            spread[:, 1:] |= reached[:, :-1]
            spread[:, :-1] |= reached[:, 1:]
            spread[:, :, 1:] |= reached[:, :, :-1]
            spread[:, :, :-1] |= reached[:, :, 1:]
            reached = spread & foreground
        if torch.equal(before, reached):
            return reached


def _light(places: Int[Tensor, "B"], like: Float[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
    """True at one flat place of each map."""
    lit = torch.zeros(like.shape, dtype=torch.bool, device=like.device).flatten(1)
    return lit.scatter(1, places.unsqueeze(1), True).view(like.shape)


def _overlap(ones: Bool[Tensor, "B h w"], others: Bool[Tensor, "B h w"]) -> Float[Tensor, "B 1 1"]:
    union = (ones | others).sum((1, 2), keepdim=True)
    return (ones & others).sum((1, 2), keepdim=True) / union.clamp(min=1)
