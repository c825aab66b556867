"""The feature pyramid: one width of channels at strides 4 to 64."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.networks.resnet import LayerNorm2d, Norm, NormedConv, ResNet
from model.networks.vit import EncoderConfig, VisionTransformer, interpolate_positions

FPN_STRIDES_PX = (4, 8, 16, 32, 64)
"""Of p2 to p6."""
SIDE_MULTIPLE_PX = 32
"""Pictures come padded to this, so that each level is exactly twice the next."""


class FPN(nn.Module):
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


PATCH_STRIDE_PX = 16
"""What a patch covers of the picture."""


class SimpleFPN(nn.Module):
    """p2 to p6 from the last map of a ViT alone, under detectron2's parameter names.

    Exploring Plain Vision Transformer Backbones for Object Detection (ViTDet), section 3; detectron2/modeling/backbone/
    vit.py. The heads count on strides of exactly 4 to 32, DINOv2's patches have 14 px: so the transformer sees the
    picture at 14/16 of its size, and a patch covers 16 px. (Strides of 3.5 to 28 would need other heads, and kernels
    resampled to 16 px would be weights of another encoder; this way a DINO or DINOv2 state dict fits below `net` as it
    is.) Unlike ViTDet: attention is global in all blocks, without relative positions, and the map is taken after the
    final norm, since DINOv2's tokens are made to be read there.

    Stored positions are stretched over the pixels given, padding included, and padding is attended to: what lies there
    is zero and changes nothing, but how much of it there is does, unlike with a ResNet far from it.
    """

    def __init__(self, shape: EncoderConfig, width: int) -> None:
        super().__init__()
        self.net = VisionTransformer(shape)
        half, quarter = shape.width // 2, shape.width // 4
        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(shape.width, half, 2, 2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
            *_make_output(quarter, width),
        )
        self.simfp_3 = nn.Sequential(nn.ConvTranspose2d(shape.width, half, 2, 2), *_make_output(half, width))
        self.simfp_4 = nn.Sequential(*_make_output(shape.width, width))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2, 2), *_make_output(shape.width, width))

    def forward(self, normalised: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], ...]:
        """p2 to p6; p6 is every second cell of p5."""
        return self.spread(self.encode(normalised))

    def spread(self, maps: Float[Tensor, "B C h w"]) -> tuple[Float[Tensor, "B C h w"], ...]:
        """p2 to p6 from the transformer's last map."""
        levels = [stage(maps) for stage in (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)]
        return (*levels, functional.max_pool2d(levels[-1], 1, 2))

    def encode(self, normalised: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The transformer's last map, at stride 16."""
        rows, columns = (length // PATCH_STRIDE_PX for length in normalised.shape[2:])
        patch_px = self.net.shape.patch_px
        if patch_px != PATCH_STRIDE_PX:
            seen = (rows * patch_px, columns * patch_px)
            normalised = functional.interpolate(normalised, size=seen, mode="bilinear", align_corners=False)
        positions = interpolate_positions(self.net.pos_embed, rows, columns)
        last = self.net.shape.depth - 1
        tokens: Tensor = self.net.norm(self.net.attend(self.net.patch_embed(normalised), positions, (last,))[0])
        maps: Tensor = tokens.transpose(1, 2).unflatten(2, (rows, columns))
        return maps


def _make_output(inner: int, width: int) -> tuple[nn.Module, nn.Module]:
    return NormedConv(inner, width, 1, norm="layer"), NormedConv(width, width, 3, norm="layer")
