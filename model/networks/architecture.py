"""The network type, the weights that inference does not use, and the cost of one image."""

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.networks.fpn import SIDE_MULTIPLE_PX as FPN_MULTIPLE_PX
from model.networks.mask_transformer import SIDE_MULTIPLE_PX as PATCH_MULTIPLE_PX
from model.networks.mask_transformer import MaskTransformer
from model.networks.panoptic_cascade import PanopticCascade

Network = MaskTransformer | PanopticCascade


def list_unexported_weights(network: Network) -> tuple[str, ...]:
    """Name prefixes of weights that no output depends on: only training uses them, or nothing does."""
    match network:
        case MaskTransformer():
            return ("encoder.norm.", "decoder.patch_mask.")
        case PanopticCascade():
            return ()


def embedding_dim(network: Network) -> int:
    """Return the size of the embeddings of patches; 0 if the network has none."""
    embedding = network.embedding if isinstance(network, MaskTransformer) else None
    return embedding.projection.out_features if embedding else 0


def side_multiple_px(network: Network) -> int:
    """Return what the sides of the network's input sizes must be multiples of."""
    match network:
        case MaskTransformer():
            return PATCH_MULTIPLE_PX
        case PanopticCascade():
            return FPN_MULTIPLE_PX


def count_flops(network: nn.Module, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> int:
    """Count the floating-point operations of a forward pass in convolutions, matrix products and attention.

    A multiplication with its addition counts as two, by torch's counter. Like detectron2's analysis it leaves out RoI
    sampling, resizing, norms and elementwise operations. On the device "meta" nothing is computed.
    """
    counter = FlopCounterMode(display=False)
    # The counter does not know fused attention on the CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(pixels, sizes)
    return int(counter.get_total_flops())
