"""What both networks share: their base class, the tuple that they return, and ImageNet normalization of their input."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

PIXEL_MEAN = (123.675, 116.28, 103.53)
"""ImageNet's statistics for values of 0..255, as detectron2's `pixel_mean` and `pixel_std`."""
PIXEL_STD = (58.395, 57.12, 57.375)


class NetworkOutput(NamedTuple):
    """Output of a network for a batch, of static shape; `model.contract.RawOutputs` describes each field."""

    scores: Float[Tensor, "B D"]
    clusters: Int[Tensor, "B D"]
    boxes: Float[Tensor, "B D 4"]
    masks: Float[Tensor, "B D h w"]
    semantic: Float[Tensor, "B S+1 h w"]
    embeddings: Float[Tensor, "B E rows columns"] | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that the network has, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "NetworkOutput":
        """Return the output with each tensor changed."""
        return NetworkOutput(**{name: change(part) for name, part in self.parts.items()})


class Network(nn.Module):
    """Maps uint8 images, and their `sizes` (height, width) without padding, to a `NetworkOutput`."""

    side_multiple_px: ClassVar[int]
    """Sides of input sizes are multiples of this."""
    unexported_weights: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of weights that no output depends on: only training uses them, or nothing does."""

    @property
    def embedding_dim(self) -> int:
        """Size of the embeddings of patches; 0 if the network has none."""
        return 0


def normalize(pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Subtract ImageNet's mean and divide by its standard deviation.

    Computed in detectron2's units and order so that the result is identical to the last bit: a deep network of random
    weights amplifies a rounding difference a thousandfold.
    """
    # Filled on the device: a copy from the host could not be captured in a CUDA graph.
    mean, std = (
        torch.stack([torch.full((1, 1), value, device=pixels.device) for value in values])
        for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return (pixels.float() - mean) / std


def normalize_and_mask(pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B 3 H W"]:
    """Normalize images of `sizes` (height, width) and set the padding below and to the right of them to zero."""
    rows = torch.arange(pixels.shape[2], device=pixels.device)[:, None] < sizes[:, 0, None, None]  # B H 1
    columns = torch.arange(pixels.shape[3], device=pixels.device) < sizes[:, 1, None, None]  # B 1 W
    return torch.where((rows & columns)[:, None], normalize(pixels), 0.0)
