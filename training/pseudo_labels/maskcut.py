"""The eigenvector that cuts a graph in two: one graph with SciPy, or many at once with torch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import linalg, ndimage
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor
from torch.nn import functional

from model.errors import LabelStoreError
from model.files import atomic_write, load_npz

logger = logging.getLogger(__name__)

WEAK_EDGE = 1e-5
"""Weight between patches that are not near (CutLER's)."""
_TOLERANCE = 1e-6
_BATCH_TOLERANCE = 2e-6
"""Of a residual in single precision."""
_LARGE = 1200
"""Nodes above which weights are held in single precision: a product with them is bound by memory."""
_SUBSPACE = 8
"""Lanczos vectors between restarts: 10 products in the mean to converge, ARPACK's own 20 need 22."""
_STEPS = 48
_RESTARTS = 12
_DRY = 1e-6


def fiedler_vector(is_near: Bool[np.ndarray, "P P"]) -> Float[np.ndarray, "P"]:
    """The second smallest generalised eigenvector of a binary graph, of unit length, its largest entry positive.

    (D - W) x = l D x is solved as the second largest eigenvector of D^-1/2 W D^-1/2, the first being known, by Lanczos
    iteration; docs/experiments has the measured agreement with a dense solver, and the time.
    """
    precision = np.float32 if len(is_near) > _LARGE else np.float64
    edges = is_near.astype(precision)
    root = np.sqrt(_degrees(is_near))
    first = root / np.linalg.norm(root)

    def multiply(vector: Float[np.ndarray, "P"]) -> Float[np.ndarray, "P"]:
        flat = vector.ravel() / root
        near = edges @ flat.astype(precision)
        product: Float[np.ndarray, "P"] = ((1.0 - WEAK_EDGE) * near + WEAK_EDGE * flat.sum()) / root
        # Plus the vector itself: no eigenvalue is negative, and the known one becomes 0. Were all nodes near, there
        # would be nothing else left, and ARPACK refuses a matrix of zeros.
        product += vector.ravel() - 2.0 * first * (first @ vector.ravel())
        return product

    start = np.random.default_rng(0).standard_normal(len(root))
    operator = LinearOperator(edges.shape, matvec=multiply, dtype=np.float64)
    try:
        _, vectors = eigsh(operator, k=1, which="LA", v0=start, rng=0, ncv=min(_SUBSPACE, len(root)), tol=_TOLERANCE)
    except ArpackError:
        logger.debug("Lanczos failed on %d nodes; solved densely", len(root))
        return fiedler_vector_dense(is_near)
    return _fix_sign(vectors[:, 0] / root)


def fiedler_vector_dense(is_near: Bool[np.ndarray, "P P"]) -> Float[np.ndarray, "P"]:
    """The same as CutLER computes it, by a dense generalised solver; of cubic cost."""
    degrees = np.diag(_degrees(is_near))
    weights = np.where(is_near, 1.0, WEAK_EDGE)
    _, vectors = linalg.eigh(degrees - weights, degrees, subset_by_index=[1, 2])
    return _fix_sign(vectors[:, 0])


def solve_cuts(is_near: Bool[Tensor, "B P P"]) -> Float[Tensor, "B P"]:
    """The same as `fiedler_vector` for a batch of graphs, wherever they lie; fp32.

    Lanczos iteration with full reorthogonalisation, restarted from its best vector until the worst of the batch has
    converged.
    """
    edges = is_near.float()
    root = ((1.0 - WEAK_EDGE) * edges.sum(-1) + WEAK_EDGE * edges.shape[-1]).sqrt()
    first = root / root.norm(dim=-1, keepdim=True)

    def multiply(vector: Float[Tensor, "B P"]) -> Float[Tensor, "B P"]:
        flat = vector / root
        near = torch.bmm(edges, flat.unsqueeze(-1)).squeeze(-1)
        # Plus the vector itself: no eigenvalue is negative, and a direction that ran dry, with its zero, never wins.
        return ((1.0 - WEAK_EDGE) * near + WEAK_EDGE * flat.sum(-1, keepdim=True)) / root + vector

    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(edges.shape[-1], generator=generator).to(edges.device).expand(len(edges), -1)
    for _ in range(_RESTARTS):
        basis, products = _span(multiply, first, vector)
        # B K P -> B K K
        values, mixtures = torch.linalg.eigh(basis @ products.mT)
        best = mixtures[..., -1:].mT
        vector, image = (best @ basis).squeeze(1), (best @ products).squeeze(1)
        if ((image - values[:, -1:] * vector).norm(dim=-1) < _BATCH_TOLERANCE).all():
            break
    answer = functional.normalize(vector / root, dim=-1)
    largest = answer.gather(-1, answer.abs().argmax(-1, keepdim=True))
    oriented: Float[Tensor, "B P"] = answer * largest.sign()
    return oriented


def _span(
    multiply: Callable[[Float[Tensor, "B P"]], Float[Tensor, "B P"]],
    first: Float[Tensor, "B P"],
    start: Float[Tensor, "B P"],
) -> tuple[Float[Tensor, "B K P"], Float[Tensor, "B K P"]]:
    """An orthonormal Krylov basis from `start` on, orthogonal to the known eigenvector, and its products."""
    steps = min(_STEPS, start.shape[-1] - 1)
    basis = torch.zeros(len(start), 1 + steps, start.shape[-1], device=start.device)
    products = torch.zeros_like(basis)
    basis[:, 0] = first
    vector = start
    for step in range(1, 1 + steps):
        for _ in range(2):  # once leaves what rounding brings back
            known = basis[:, :step]
            vector = vector - ((vector.unsqueeze(1) @ known.mT) @ known).squeeze(1)
        length = vector.norm(dim=-1, keepdim=True)
        basis[:, step] = torch.where(length > _DRY, vector / length.clamp(min=_DRY), 0.0)
        products[:, step] = vector = multiply(basis[:, step])
    return basis[:, 1:], products[:, 1:]


def _degrees(is_near: Bool[np.ndarray, "P P"]) -> Float[np.ndarray, "P"]:
    degrees: Float[np.ndarray, "P"] = (1.0 - WEAK_EDGE) * is_near.sum(1) + WEAK_EDGE * len(is_near)
    return degrees


def _fix_sign(vector: Float[np.ndarray, "P"]) -> Float[np.ndarray, "P"]:
    """Of unit length, its largest entry positive."""
    length = np.linalg.norm(vector) * np.sign(vector[np.abs(vector).argmax()])
    oriented: Float[np.ndarray, "P"] = vector / length
    return oriented


MIN_AREA_FRACTION = 0.01
MAX_IOU = 0.5

EigenSolver = Callable[[Bool[np.ndarray, "P P"]], Float[np.ndarray, "P"]]
"""From a graph to the eigenvector that cuts it."""


@dataclass(frozen=True, kw_only=True)
class MaskCutConfig:
    """What MaskCut depends on."""

    maskcut_n: int = 3
    """Most masks a photo."""
    threshold: float = 0.3
    """Cosine above which two patches are near; 0.15 in the paper, on DINO's keys."""
    is_centred: bool = False
    """Take out the photo's mean feature first: a graph whose patches are all near has no second part."""
    is_faithful: bool = False
    """Filter as the public code does: the first mask always stays, a dropped one does not end the search (the same
    problem is solved again, and passes), and area is that of the mask before earlier ones are taken out."""


def maskcut(
    tokens: Float[np.ndarray, "h w C"], plan: MaskCutConfig, solve: EigenSolver = fiedler_vector
) -> Bool[np.ndarray, "N h w"]:
    """Disjoint masks, most salient first; N may be 0.

    MaskCut: iterated normalised cut on the cosine affinity (CutLER, section 3.1, and its public maskcut.py). Unlike
    it: `fiedler_vector` fixes the eigenvector's sign, where the public code takes a solver's, and with it the side
    that the
    corner rule sees; a photo whose patches are all near to each other has no mask, where the public code cuts it at
    random; and unless the plan is faithful, a mask that a filter drops ends the search.
    Raises LabelStoreError if `tokens` are not finite.
    """
    height, width, _ = tokens.shape
    flat = l2_normalize_tokens(tokens, is_centred=plan.is_centred).reshape(height * width, -1)
    painted, previous = np.zeros((2, height, width), bool)
    found: list[Bool[np.ndarray, "h w"]] = []
    for cut in range(plan.maskcut_n):
        is_near = flat @ flat.T > plan.threshold
        if is_near.all():
            break
        mask = select_object(solve(is_near).reshape(height, width))
        fresh = mask & ~painted
        is_small = (mask if plan.is_faithful else fresh).sum() <= MIN_AREA_FRACTION * mask.size
        is_exempt = plan.is_faithful and cut == 0
        if not is_exempt and (is_small or mask_iou(mask, previous) > MAX_IOU):
            if not plan.is_faithful:
                break
            previous = np.zeros_like(mask)
            continue
        found.append(fresh)
        painted, previous = painted | mask, mask
        flat = np.where(mask.reshape(-1, 1), np.float32(0.0), flat)
    kept = [mask for mask in found if mask.any()]
    return np.array(kept, bool).reshape(len(kept), height, width)


def l2_normalize_tokens(tokens: Float[np.ndarray, "h w C"], *, is_centred: bool) -> Float[np.ndarray, "h w C"]:
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


def select_object(vector: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
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


def mask_iou(one: Bool[np.ndarray, "h w"], other: Bool[np.ndarray, "h w"]) -> float:
    """Intersection over union; 0 for two empty masks."""
    return float((one & other).sum() / max(1, (one | other).sum()))


_LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class MaskProposals:
    """Masks on the patch grid, best first; they may overlap."""

    soft: Float[np.ndarray, "N h w"]
    """The share of votes for each patch, 0..1; 0 or 1 if there was no vote."""
    scores: Float[np.ndarray, "N"]
    """Higher is better; comparable between photos."""

    @property
    def binary(self) -> Bool[np.ndarray, "N h w"]:
        """Patches with most of the votes."""
        return self.soft > 0.5

    def top_k(self, count: int, least_score: float) -> "MaskProposals":
        """The first `count` of those that score well enough."""
        kept = np.flatnonzero(self.scores >= least_score)[:count]
        return MaskProposals(soft=self.soft[kept], scores=self.scores[kept])

    def write(self, path: Path) -> None:
        votes = np.round(self.soft * _LEVELS).astype(np.uint8)
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez_compressed(stream, votes=votes, scores=self.scores)


def proposals_from_masks(masks: Bool[np.ndarray, "N h w"]) -> MaskProposals:
    """Hard masks in the order of their finding: the second scores half of the first, the third a third."""
    scores = 1.0 / np.arange(1, 1 + len(masks), dtype=np.float32)
    return MaskProposals(soft=masks.astype(np.float32), scores=scores)


def remove_overlaps(masks: Bool[np.ndarray, "N H W"]) -> Bool[np.ndarray, "N H W"]:
    """Masks, best first, without what belongs to a better one; empty if that is more than half of it."""
    taken = np.zeros(masks.shape[1:], bool)
    apart = np.zeros_like(masks)
    for place, mask in enumerate(masks):
        free = mask & ~taken
        if 2 * free.sum() >= mask.sum():
            apart[place] = free
            taken |= free
    return apart


def load_proposals(path: Path) -> MaskProposals:
    """Raises LabelStoreError if the file is missing or broken."""
    try:
        stored = load_npz(path)
        return MaskProposals(soft=stored["votes"].astype(np.float32) / _LEVELS, scores=stored["scores"])
    except (ValueError, KeyError) as error:
        raise LabelStoreError(f"{path} holds no masks: {error}") from error
