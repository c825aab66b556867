"""Object masks from nothing but features: MaskCut."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from model.errors import LabelStoreError
from training.labels.masks.eigen import solve_cut

LEAST_AREA = 0.01
MOST_OVERLAP = 0.5

Solver = Callable[[Bool[np.ndarray, "P P"]], Float[np.ndarray, "P"]]
"""From a graph to the eigenvector that cuts it."""


@dataclass(frozen=True, kw_only=True)
class CutPlan:
    """What MaskCut depends on."""

    cuts: int = 3
    """Most masks a photo."""
    threshold: float = 0.3
    """Cosine above which two patches are near; 0.15 in the paper, on DINO's keys."""
    is_centred: bool = False
    """Take out the photo's mean feature first: a graph whose patches are all near has no second part."""
    is_faithful: bool = False
    """Filter as the public code does: the first mask always stays, a dropped one does not end the search (the same
    problem is solved again, and passes), and area is that of the mask before earlier ones are taken out."""


def propose(tokens: Float[np.ndarray, "h w C"], plan: CutPlan, solve: Solver = solve_cut) -> Bool[np.ndarray, "N h w"]:
    """Disjoint masks, most salient first; N may be 0.

    MaskCut: iterated normalised cut on the cosine affinity (CutLER, section 3.1, and its public maskcut.py). Unlike
    it: `solve_cut` fixes the eigenvector's sign, where the public code takes a solver's, and with it the side that the
    corner rule sees; a photo whose patches are all near to each other has no mask, where the public code cuts it at
    random; and unless the plan is faithful, a mask that a filter drops ends the search.
    Raises LabelStoreError if `tokens` are not finite.
    """
    height, width, _ = tokens.shape
    flat = normalise_tokens(tokens, is_centred=plan.is_centred).reshape(height * width, -1)
    painted, previous = np.zeros((2, height, width), bool)
    found: list[Bool[np.ndarray, "h w"]] = []
    for cut in range(plan.cuts):
        is_near = flat @ flat.T > plan.threshold
        if is_near.all():
            break
        mask = choose_object(solve(is_near).reshape(height, width))
        fresh = mask & ~painted
        is_small = (mask if plan.is_faithful else fresh).sum() <= LEAST_AREA * mask.size
        is_exempt = plan.is_faithful and cut == 0
        if not is_exempt and (is_small or overlap(mask, previous) > MOST_OVERLAP):
            if not plan.is_faithful:
                break
            previous = np.zeros_like(mask)
            continue
        found.append(fresh)
        painted, previous = painted | mask, mask
        flat = np.where(mask.reshape(-1, 1), np.float32(0.0), flat)
    kept = [mask for mask in found if mask.any()]
    return np.array(kept, bool).reshape(len(kept), height, width)


def normalise_tokens(tokens: Float[np.ndarray, "h w C"], *, is_centred: bool) -> Float[np.ndarray, "h w C"]:
    """Tokens of unit length, after the photo's mean is taken out if asked for.

    Raises LabelStoreError if they are not finite.
    """
    if not np.isfinite(tokens).all():
        raise LabelStoreError("features are not finite: the encoder or its cache is broken")
    single = tokens.astype(np.float32)
    if is_centred:
        single = single - single.mean((0, 1))
    unit: Float[np.ndarray, "h w C"] = single / np.maximum(np.linalg.norm(single, axis=-1, keepdims=True), 1e-12)
    return unit


def choose_object(vector: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The connected foreground around the seed, the patch that stands out most.

    The foreground holds at most two corners of the grid; if both sides do, it holds the seed.
    """
    foreground = vector > vector.mean()
    seed = np.unravel_index(np.abs(vector).argmax(), vector.shape)
    corners = foreground[[0, 0, -1, -1], [0, -1, 0, -1]].sum()
    if corners >= 3 or not foreground[seed]:
        foreground, vector = ~foreground, -vector
    seed = np.unravel_index(vector.argmax(), vector.shape)
    components, _ = ndimage.label(foreground)
    chosen: Bool[np.ndarray, "h w"] = (components == components[seed]) & foreground
    return chosen


def overlap(one: Bool[np.ndarray, "h w"], other: Bool[np.ndarray, "h w"]) -> float:
    """Intersection over union; 0 for two empty masks."""
    return float((one & other).sum() / max(1, (one | other).sum()))
