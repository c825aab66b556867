"""Non-maximum suppression of static shape."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.network.boxes import compare


def suppress(
    boxes: Float[Tensor, "B N 4"],
    is_used: Bool[Tensor, "B N"],
    threshold: float,
    sweeps: int,
    groups: Int[Tensor, "B N"] | None = None,
) -> Bool[Tensor, "B N"]:
    """Which boxes stay, given best first: those that no better box that stays overlaps beyond `threshold`.

    Greedy suppression walks down the list; here every sweep decides all boxes at once, from what the sweep before kept.
    The first starts from all boxes. A box that should stay is right one sweep after the last of its better rivals, or
    from the start if it has none; one that should not, one sweep after the first of those rivals that should. What is
    right stays so: with as many sweeps as the slowest box takes, its chain, the answer is the greedy one. Cut short, it
    differs in the slower boxes alone: after an even number of sweeps all boxes that should stay do, with others beside
    them; after an odd number none stays that should not, but some are missing. Rounding may tip an overlap within a
    last bit of the threshold either way, as it may between two machines.
    """
    order = torch.arange(boxes.shape[1], device=boxes.device)
    is_rival = (compare(boxes) > threshold) & (order[:, None] < order)
    if groups is not None:
        is_rival = is_rival & (groups[:, :, None] == groups[:, None])
    rivals = is_rival.transpose(1, 2).to(boxes.dtype)  # B N N; row i marks the better rivals of box i
    keep = is_used
    for _ in range(sweeps):
        staying = torch.matmul(rivals, keep.to(boxes.dtype)[..., None])[..., 0]
        keep = is_used & (staying < 0.5)
    return keep
