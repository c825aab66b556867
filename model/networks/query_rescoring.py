"""How sure a query is of its object once its own mask, the semantic head and better queries have been heard.

Queries are taught one by one, so several draw one object and some draw what the semantic head calls stuff. All of this
is of static shape and without a sort, so that it is part of the graph.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

STABILITY_THRESHOLDS = (0.1, 0.9)
"""The two cuts of a mask's probabilities whose areas a sure mask hardly changes between."""
MATRIX_NMS_SIGMA = 2.0
"""How steeply a score falls with the overlap: Matrix NMS' sigma."""


def rescore_queries(
    chances: Float[Tensor, "B Q"], masks: Float[Tensor, "B Q h w"], things: Float[Tensor, "B h w"]
) -> Float[Tensor, "B Q"]:
    """Scores in 0..1 from each query's own chance of a well drawn object, its mask and the chance of things, a cell.

    The geometric mean of the chance, times the mask's stability, and of the mean chance of things inside; it decays
    where a better query draws the same. A query that draws nothing scores 0.
    """
    with _in_full_precision(masks.device.type):
        cells = (masks > 0.5).flatten(2).float()
        areas = cells.sum(2)
        shares = torch.einsum("bqn,bn->bq", cells, things.flatten(1).float()) / areas.clamp(min=1.0)
        scores = (chances.float() * _stability_score(masks) * shares).sqrt()
        return scores * matrix_nms_decay(scores, _mask_iou(cells, areas))


def _in_full_precision(device: str) -> AbstractContextManager[object]:
    """Half precision cannot count cells: it ends at 2,048, or long before."""
    is_half = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # `meta` knows neither
    return torch.autocast(device, enabled=False) if is_half else nullcontext()


def _stability_score(masks: Float[Tensor, "B Q h w"]) -> Float[Tensor, "B Q"]:
    """IoU of each mask cut low and cut high (Segment Anything, section 4 and appendix B)."""
    low, high = ((masks > cut).sum((2, 3)) for cut in STABILITY_THRESHOLDS)
    return high / low.clamp(min=1)


def _mask_iou(cells: Float[Tensor, "B Q N"], areas: Float[Tensor, "B Q"]) -> Float[Tensor, "B Q Q"]:
    """IoU of every two masks, of yes and no as numbers; 0 where both are empty."""
    shared = cells @ cells.transpose(1, 2)
    return shared / (areas[:, :, None] + areas[:, None] - shared).clamp(min=1.0)


def matrix_nms_decay(scores: Float[Tensor, "B Q"], ious: Float[Tensor, "B Q Q"]) -> Float[Tensor, "B Q"]:
    """What each score is to be multiplied by, for better ones that draw the same.

    Matrix NMS with its Gaussian (SOLOv2, section 3.3): a rival counts less the more it is itself a duplicate.
    """
    places = torch.arange(scores.shape[1], device=scores.device)
    rivals, own = scores[:, :, None], scores[:, None]
    is_better = (rivals > own) | ((rivals == own) & (places[:, None] < places))
    covered = ious * is_better
    excuse = covered.amax(1)[:, :, None]
    factors = torch.exp(MATRIX_NMS_SIGMA * (excuse * excuse - covered * covered))
    return factors.amin(1).clamp(max=1.0)
