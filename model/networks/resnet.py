"""ResNet-50 under detectron2's parameter names."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Norm = Literal["batch", "frozen", "group", "layer", "none"]

STAGE_BLOCKS = (3, 4, 6, 3)
"""Of res2 to res5."""
STAGE_STRIDES_PX = (4, 8, 16, 32)
"""Of res2 to res5."""
_GROUPS = 32


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine part are constants (detectron2/layers/batch_norm.py)."""

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
    """Layer norm of each cell over its channels (ViTDet; detectron2/layers/batch_norm.py, `LayerNorm`)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """A convolution that keeps its size at stride 1, followed by its norm; it has a bias only without one."""

    def __init__(self, inner: int, outer: int, kernel: int, *, stride: int = 1, norm: Norm) -> None:
        super().__init__(inner, outer, kernel, stride, kernel // 2, bias=norm == "none")
        self.norm = make_norm(norm, outer)

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D i j"]:
        normed: Tensor = self.norm(super().forward(input))
        return normed


class Stem(nn.Module):
    """Pixels to features at a quarter of their size."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = NormedConv(3, width, 7, stride=2, norm=norm)

    def forward(self, normalised: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return functional.max_pool2d(functional.relu(self.conv1(normalised)), 3, 2, 1)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut; the 3x3 carries the stride, as in torchvision and not as in the paper."""

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

    def __init__(self, stem_out_channels: int, width: int, outer: int, norm: Norm) -> None:
        """`width` and `outer` are the inner and outer channels of res2; each stage doubles both."""
        super().__init__()
        self.stem = Stem(stem_out_channels, norm)
        inner = stem_out_channels
        stages = []
        for index, count in enumerate(STAGE_BLOCKS):
            narrow, wide, stride = width << index, outer << index, 1 if index == 0 else 2
            first = Bottleneck(inner, narrow, wide, stride=stride, norm=norm)
            rest = [Bottleneck(wide, narrow, wide, stride=1, norm=norm) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
            inner = wide
        self.res2, self.res3, self.res4, self.res5 = stages
        self.channels = tuple(outer << index for index in range(len(STAGE_BLOCKS)))

    def forward(self, normalised: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], ...]:
        """res2 to res5, at strides 4 to 32."""
        maps = self.stem(normalised)
        found = []
        for stage in (self.res2, self.res3, self.res4, self.res5):
            maps = stage(maps)
            found.append(maps)
        return tuple(found)


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The norm layer of that kind; "none" changes nothing."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "frozen":
            return FrozenBatchNorm(channels)
        case "group":
            return nn.GroupNorm(_GROUPS, channels)
        case "layer":
            return LayerNorm2d(channels)
        case "none":
            return nn.Identity()
