"""ResNet-50 with its feature pyramid (FPN), and a plain ViT with its own (SimpleFPN), with detectron2's names.

Pyramids have strides of 4 to 64 px.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.networks.vit import EncoderConfig, VisionTransformer, interpolate_positions

Norm = Literal["batch", "frozen", "group", "layer", "none"]

STAGE_BLOCKS = (3, 4, 6, 3)
"""Residual blocks of res2 to res5."""
STAGE_STRIDES_PX = (4, 8, 16, 32)
"""Output strides of res2 to res5."""
FPN_STRIDES_PX = (4, 8, 16, 32, 64)
"""Strides of p2 to p6."""
PATCH_STRIDE_PX = 16
"""Side of the area that one ViT patch covers in the input of `SimpleFPN`."""


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


class FPN(nn.Module):
    """Top-down pathway over a backbone (Feature Pyramid Networks, section 3; detectron2/modeling/backbone/fpn.py)."""

    def __init__(self, bottom_up: ResNet, channels: int, norm: Norm) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        for level, inner in enumerate(bottom_up.channels, start=2):
            self.add_module(f"fpn_lateral{level}", NormedConv(inner, channels, 1, norm=norm))
            self.add_module(f"fpn_output{level}", NormedConv(channels, channels, 3, norm=norm))

    def forward(self, normalized: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], ...]:
        """Feature maps p2 to p6; p6 is p5 subsampled by 2."""
        stages = self.bottom_up(normalized)
        above: Tensor | None = None
        levels: list[Tensor] = []
        for level, maps in reversed(list(enumerate(stages, start=2))):
            merged: Tensor = self.get_submodule(f"fpn_lateral{level}")(maps)
            if above is not None:
                merged = merged + functional.interpolate(above, scale_factor=2.0, mode="nearest")
            levels.insert(0, self.get_submodule(f"fpn_output{level}")(merged))
            above = merged
        return (*levels, functional.max_pool2d(levels[-1], 1, 2))


class SimpleFPN(nn.Module):
    """Feature maps p2 to p6 from the last map of a ViT, with detectron2's parameter names.

    Exploring Plain Vision Transformer Backbones for Object Detection (ViTDet), section 3;
    detectron2/modeling/backbone/vit.py. Differences:

    - The heads need strides of exactly 4 to 32, but DINOv2's patches have 14 px. So the input is resized by 14/16 and a
      patch covers 16 px of it; a DINO or DINOv2 state dict loads into `net` unchanged.
    - Attention is global in all blocks, without relative positions.
    - The map is taken after the final norm, where DINOv2's features are meant to be read.

    Position embeddings are interpolated to the padded input, and padding takes part in attention: unlike with a ResNet,
    the amount of padding changes the output.
    """

    def __init__(self, encoder: EncoderConfig, channels: int) -> None:
        super().__init__()
        self.net = VisionTransformer(encoder)
        width, half, quarter = encoder.embed_dim, encoder.embed_dim // 2, encoder.embed_dim // 4
        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(width, half, 2, 2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
            *_make_output(quarter, channels),
        )
        self.simfp_3 = nn.Sequential(nn.ConvTranspose2d(width, half, 2, 2), *_make_output(half, channels))
        self.simfp_4 = nn.Sequential(*_make_output(width, channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2, 2), *_make_output(width, channels))

    def forward(self, normalized: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], ...]:
        """Feature maps p2 to p6; p6 is p5 subsampled by 2."""
        maps = self.encode(normalized)
        levels = [stage(maps) for stage in (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)]
        return (*levels, functional.max_pool2d(levels[-1], 1, 2))

    def encode(self, normalized: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The ViT's last map, at stride 16."""
        rows, columns = (length // PATCH_STRIDE_PX for length in normalized.shape[2:])
        patch_px = self.net.config.patch_px
        if patch_px != PATCH_STRIDE_PX:
            size = (rows * patch_px, columns * patch_px)
            normalized = functional.interpolate(normalized, size=size, mode="bilinear", align_corners=False)
        positions = interpolate_positions(self.net.pos_embed, rows, columns)
        last = self.net.config.depth - 1
        tokens: Tensor = self.net.norm(self.net.run_blocks(self.net.patch_embed(normalized), positions, (last,))[0])
        maps: Tensor = tokens.transpose(1, 2).unflatten(2, (rows, columns))
        return maps


def _make_output(inner: int, outer: int) -> tuple[nn.Module, nn.Module]:
    return NormedConv(inner, outer, 1, norm="layer"), NormedConv(outer, outer, 3, norm="layer")
