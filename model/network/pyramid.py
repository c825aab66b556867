"""The feature pyramid: one width of channels at strides 4 to 64."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.network.resnet import Norm, NormedConv, ResNet

STRIDES_PX = (4, 8, 16, 32, 64)
"""Of p2 to p6."""
SIDE_MULTIPLE_PX = 32
"""Pictures come padded to this, so that each level is exactly twice the next."""


class Pyramid(nn.Module):
    """Top-down pathway over a backbone (Feature Pyramid Networks, section 3; detectron2/modeling/backbone/fpn.py)."""

    def __init__(self, bottom_up: ResNet, width: int, norm: Norm) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        for level, channels in enumerate(bottom_up.channels, start=2):
            self.add_module(f"fpn_lateral{level}", NormedConv(channels, width, 1, norm=norm))
            self.add_module(f"fpn_output{level}", NormedConv(width, width, 3, norm=norm))

    def forward(self, normalised: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], ...]:
        """p2 to p6; p6 is every second cell of p5."""
        stages = self.bottom_up(normalised)
        above: Tensor | None = None
        levels: list[Tensor] = []
        for level, maps in reversed(list(enumerate(stages, start=2))):
            merged: Tensor = self.get_submodule(f"fpn_lateral{level}")(maps)
            if above is not None:
                merged = merged + functional.interpolate(above, scale_factor=2.0, mode="nearest")
            levels.insert(0, self.get_submodule(f"fpn_output{level}")(merged))
            above = merged
        return (*levels, functional.max_pool2d(levels[-1], 1, 2))
