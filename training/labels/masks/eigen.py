"""The eigenvector that cuts a graph in two: one graph with SciPy, or many at once with torch."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import linalg
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor
from torch.nn import functional

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


def solve_cut(is_near: Bool[np.ndarray, "P P"]) -> Float[np.ndarray, "P"]:
    """The second smallest generalised eigenvector of a binary graph, of unit length, its largest entry positive.

    (D - W) x = l D x is solved as the second largest eigenvector of D^-1/2 W D^-1/2, the first being known, by Lanczos
    iteration; LOG.md has the measured agreement with a dense solver, and the time.
    """
    precision = np.float32 if len(is_near) > _LARGE else np.float64
    edges = is_near.astype(precision)
    root = np.sqrt(_sum_weights(is_near))
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
        return solve_densely(is_near)
    return _orient(vectors[:, 0] / root)


def solve_densely(is_near: Bool[np.ndarray, "P P"]) -> Float[np.ndarray, "P"]:
    """The same as CutLER computes it, by a dense generalised solver; of cubic cost."""
    degrees = np.diag(_sum_weights(is_near))
    weights = np.where(is_near, 1.0, WEAK_EDGE)
    _, vectors = linalg.eigh(degrees - weights, degrees, subset_by_index=[1, 2])
    return _orient(vectors[:, 0])


def solve_cuts(is_near: Bool[Tensor, "B P P"]) -> Float[Tensor, "B P"]:
    """The same as `solve_cut` for a batch of graphs, wherever they lie; fp32.

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


def _sum_weights(is_near: Bool[np.ndarray, "P P"]) -> Float[np.ndarray, "P"]:
    degrees: Float[np.ndarray, "P"] = (1.0 - WEAK_EDGE) * is_near.sum(1) + WEAK_EDGE * len(is_near)
    return degrees


def _orient(vector: Float[np.ndarray, "P"]) -> Float[np.ndarray, "P"]:
    """Of unit length, its largest entry positive."""
    length = np.linalg.norm(vector) * np.sign(vector[np.abs(vector).argmax()])
    oriented: Float[np.ndarray, "P"] = vector / length
    return oriented
