"""The networks there are."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.networks.mask_transformer import MaskTransformer
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.roi_heads import MASK_SIZE

Network = MaskTransformer | PanopticCascade


def list_unexported_weights(network: Network) -> tuple[str, ...]:
    """Beginnings of the names of weights that no answer depends on: training uses them, or the encoder has them."""
    match network:
        case MaskTransformer():
            return ("encoder.norm.", "decoder.patch_mask.", "decoder.embedding_head.")
        case PanopticCascade():
            return ()


@dataclass(frozen=True, kw_only=True)
class CascadeFlops:
    """The parts of a cascade's count, in floating-point operations."""

    backbone: int
    """With its pyramid."""
    proposals: int
    box_heads: int
    mask_head: int
    semantic: int
    suppression: int
    """All sweeps, of proposals and detections; what is multiplied outside of the other parts."""

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def count_flops(network: nn.Module, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> int:
    """Floating-point operations of the convolutions and matrix products of one answer, attention included.

    Two for each multiplication with its addition, by torch's counter. Like detectron2's own analysis it leaves out the
    sampling of RoIs, resizing, norms and what is done to each element. On the device "meta" nothing is computed.
    """
    return int(_run(network, pixels, sizes).get_total_flops())


def split_flops(network: PanopticCascade, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> CascadeFlops:
    """The count of `count_flops`, part by part."""
    counter = _run(network, pixels, sizes)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    def read(*modules: str) -> int:
        return sum(by_module.get(f"{type(network).__name__}.{module}", 0) for module in modules)

    stages = range(len(network.roi_heads.box_head))
    box_modules = [f"roi_heads.{kind}.{stage}" for kind in ("box_head", "box_predictor") for stage in stages]
    parts = {
        "backbone": read("backbone"),
        "proposals": read("proposal_generator"),
        "box_heads": read(*box_modules),
        "mask_head": read("roi_heads.mask_head"),
        "semantic": read("sem_seg_head"),
    }
    return CascadeFlops(**parts, suppression=counter.get_total_flops() - sum(parts.values()))


def count_dynamic(shape: CascadeConfig, height: int, width: int, proposals: int, detections: int) -> CascadeFlops:
    """What the same network costs where shapes follow the picture, as in detectron2; at least one of each is found.

    The box heads see the proposals found, the mask head the detections found, suppression multiplies nothing. The mask
    predictor draws every cluster's mask, as there.
    """
    limits = CascadeInferenceConfig()
    found = replace(
        limits,
        proposals=replace(limits.proposals, total=proposals),
        detections=replace(limits.detections, total=detections),
    )
    flops = split_flops(*_draw(shape, found, height, width))
    every_cluster = 2 * shape.mask_conv_dim * MASK_SIZE**2 * detections * (shape.mask_channels - 1)
    return replace(flops, suppression=0, mask_head=flops.mask_head + every_cluster)


def count_static(shape: CascadeConfig, limits: CascadeInferenceConfig, height: int, width: int) -> CascadeFlops:
    """What our network costs for one picture, whatever it shows."""
    return split_flops(*_draw(shape, limits, height, width))


def _draw(
    shape: CascadeConfig, limits: CascadeInferenceConfig, height: int, width: int
) -> tuple[PanopticCascade, Tensor, Tensor]:
    """A network and a picture without numbers."""
    with torch.device("meta"):
        network = PanopticCascade(shape, limits).eval()
        return network, torch.zeros(1, 3, height, width, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int64)


def _run(network: nn.Module, *inputs: Tensor) -> Any:
    counter = FlopCounterMode(display=False)
    # Fused attention on the CPU is unknown to the counter.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(*inputs)
    return counter
