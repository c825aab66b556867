"""Rescoring of queries by mask stability, agreement with the semantic head, and soft (matrix) NMS.

Queries are supervised one by one, so several may predict one object, and some predict what the semantic head calls
stuff. Everything here has a static shape and needs no sort, so it is part of the exported graph.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

STABILITY_THRESHOLDS = (0.1, 0.9)
"""Two thresholds of the mask probabilities: the areas above them are nearly equal for a confident mask."""
MATRIX_NMS_SIGMA = 2.0
"""How steeply a score decays with the overlap: sigma of Matrix NMS."""


def rescore_queries(
    scores: Float[Tensor, "B Q"], masks: Float[Tensor, "B Q h w"], things: Float[Tensor, "B h w"]
) -> Float[Tensor, "B Q"]:
    """Combine each query's score with its mask (probabilities) and the probability of things at each pixel.

    The new score is the geometric mean of the score times the stability of the mask and of the mean probability of
    things inside it. It decays where a query of higher score predicts the same mask. An empty mask scores 0.
    """
    with _full_precision(masks.device.type):
        pixels = (masks > 0.5).flatten(2).float()
        areas = pixels.sum(2)
        thing_fractions = torch.einsum("bqn,bn->bq", pixels, things.flatten(1).float()) / areas.clamp(min=1.0)
        rescored = (scores.float() * _stability_score(masks) * thing_fractions).sqrt()
        return rescored * matrix_nms_decay(rescored, _mask_iou(pixels, areas))


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Disable autocast: half precision cannot count beyond 2,048 pixels, bfloat16 not even beyond 256."""
    is_half = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" supports neither
    return torch.autocast(device, enabled=False) if is_half else nullcontext()


def _stability_score(masks: Float[Tensor, "B Q h w"]) -> Float[Tensor, "B Q"]:
    """IoU of each mask at a low and at a high threshold (Segment Anything, section 4 and appendix B)."""
    low, high = ((masks > threshold).sum((2, 3)) for threshold in STABILITY_THRESHOLDS)
    return high / low.clamp(min=1)


def _mask_iou(pixels: Float[Tensor, "B Q N"], areas: Float[Tensor, "B Q"]) -> Float[Tensor, "B Q Q"]:
    """IoU of every pair of binary masks; 0 where both are empty."""
    intersections = pixels @ pixels.transpose(1, 2)
    return intersections / (areas[:, :, None] + areas[:, None] - intersections).clamp(min=1.0)


def matrix_nms_decay(scores: Float[Tensor, "B Q"], ious: Float[Tensor, "B Q Q"]) -> Float[Tensor, "B Q"]:
    """Factor by which each score decays because of better-scored duplicates.

    Matrix NMS with the Gaussian kernel (SOLOv2, section 3.3): a rival counts less the more it is itself a duplicate.
    """
    order = torch.arange(scores.shape[1], device=scores.device)
    rivals, own = scores[:, :, None], scores[:, None]
    is_better = (rivals > own) | ((rivals == own) & (order[:, None] < order))
    overlaps = ious * is_better
    rival_overlaps = overlaps.amax(1)[:, :, None]
    factors = torch.exp(MATRIX_NMS_SIGMA * (rival_overlaps * rival_overlaps - overlaps * overlaps))
    return factors.amin(1).clamp(max=1.0)
