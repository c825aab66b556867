"""ResNet-50 with detectron2's parameter names."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Norm = Literal["batch", "frozen", "group", "layer", "none"]

STAGE_BLOCKS = (3, 4, 6, 3)
"""Residual blocks of res2 to res5."""
STAGE_STRIDES_PX = (4, 8, 16, 32)
"""Output strides of res2 to res5."""


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and affine parameters (detectron2/layers/batch_norm.py)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        reference = nn.BatchNorm2d(channels)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(reference, name).detach().clone())

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return functional.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel (ViTDet; `LayerNorm` in detectron2/layers/batch_norm.py)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_NORMS: dict[Norm, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm,
    "group": partial(nn.GroupNorm, 32),
    "layer": LayerNorm2d,
    "none": nn.Identity,
}


class NormedConv(nn.Conv2d):
    """Convolution with "same" padding and a norm; it has a bias only if the norm is "none"."""

    def __init__(self, inner: int, outer: int, kernel: int, *, stride: int = 1, norm: Norm) -> None:
        super().__init__(inner, outer, kernel, stride, kernel // 2, bias=norm == "none")
        self.norm = _NORMS[norm](outer)

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D i j"]:
        normed: Tensor = self.norm(super().forward(input))
        return normed


class Stem(nn.Module):
    """7x7 convolution and max pooling, to a quarter of the input's size."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = NormedConv(3, width, 7, stride=2, norm=norm)

    def forward(self, normalized: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return functional.max_pool2d(functional.relu(self.conv1(normalized)), 3, 2, 1)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with a shortcut; the 3x3 has the stride, as in torchvision, unlike the paper."""

    def __init__(self, inner: int, width: int, outer: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        self.shortcut = NormedConv(inner, outer, 1, stride=stride, norm=norm) if inner != outer else nn.Identity()
        self.conv1 = NormedConv(inner, width, 1, norm=norm)
        self.conv2 = NormedConv(width, width, 3, stride=stride, norm=norm)
        self.conv3 = NormedConv(width, outer, 1, norm=norm)

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D i j"]:
        inner = functional.relu(self.conv2(functional.relu(self.conv1(maps))))
        return functional.relu(self.conv3(inner) + self.shortcut(maps))


class ResNet(nn.Module):
    """The four stages of ResNet-50 (detectron2/modeling/backbone/resnet.py)."""

    def __init__(self, stem_out_channels: int, bottleneck_channels: int, out_channels: int, norm: Norm) -> None:
        """Each stage doubles the channels of res2: `bottleneck_channels` inside its blocks, `out_channels` after."""
        super().__init__()
        self.stem = Stem(stem_out_channels, norm)
        inner = stem_out_channels
        stages = []
        for index, count in enumerate(STAGE_BLOCKS):
            narrow, wide, stride = bottleneck_channels << index, out_channels << index, 1 if index == 0 else 2
            first = Bottleneck(inner, narrow, wide, stride=stride, norm=norm)
            rest = [Bottleneck(wide, narrow, wide, stride=1, norm=norm) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
            inner = wide
        self.res2, self.res3, self.res4, self.res5 = stages
        self.channels = tuple(out_channels << index for index in range(len(STAGE_BLOCKS)))

    def forward(self, normalized: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], ...]:
        """Feature maps of res2 to res5, at strides 4 to 32."""
        maps = self.stem(normalized)
        outputs = []
        for stage in (self.res2, self.res3, self.res4, self.res5):
            maps = stage(maps)
            outputs.append(maps)
        return tuple(outputs)
