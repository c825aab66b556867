"""What every network answers."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class NetworkOutput(NamedTuple):
    """The session's answer for a batch, static in shape; `model.network_io.NetworkOutput` says what each part is."""

    scores: Float[Tensor, "B D"]
    clusters: Int[Tensor, "B D"]
    boxes: Float[Tensor, "B D 4"]
    masks: Float[Tensor, "B D h w"]
    semantic: Float[Tensor, "B S+1 h w"]
