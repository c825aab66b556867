"""The semantic head: every cell's logits, from all levels of the pyramid."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.network.resnet import NormedConv

_LEVELS = ("p2", "p3", "p4", "p5")


class ReluConv(NormedConv):
    """3x3 convolution, group norm, ReLU."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, 3, norm="group")

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return functional.relu(super().forward(input))


class SemanticHead(nn.Module):
    """Each level brought to stride 4 by steps of convolution and doubling, then summed.

    Panoptic Feature Pyramid Networks, section 4.1; detectron2/modeling/meta_arch/semantic_seg.py. Unlike there, the
    logits stay at stride 4: whoever needs pixels enlarges them.
    """

    def __init__(self, inner: int, width: int, classes: int) -> None:
        super().__init__()
        for index, name in enumerate(_LEVELS):
            steps: list[nn.Module] = []
            for step in range(max(1, index)):
                steps.append(ReluConv(inner if step == 0 else width, width))
                if index:
                    steps.append(nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
            self.add_module(name, nn.Sequential(*steps))
        self.predictor = nn.Conv2d(width, classes, 1)

    def forward(self, levels: tuple[Float[Tensor, "B C h w"], ...]) -> Float[Tensor, "B S+1 h w"]:
        """Logits at the stride of p2, from p2 to p5; further levels are ignored."""
        risen = [self.get_submodule(name)(maps) for name, maps in zip(_LEVELS, levels, strict=False)]
        logits: Tensor = self.predictor(torch.stack(risen).sum(0))
        return logits
