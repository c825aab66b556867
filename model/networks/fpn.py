"""Feature pyramids at strides 4 to 64, over ResNet-50 (FPN) and over a plain ViT (SimpleFPN)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.networks.resnet import LayerNorm2d, Norm, NormedConv, ResNet
from model.networks.vit import EncoderConfig, VisionTransformer, interpolate_positions

FPN_STRIDES_PX = (4, 8, 16, 32, 64)
"""Strides of p2 to p6."""
PATCH_STRIDE_PX = 16
"""Side of the area that one ViT patch covers in the input of `SimpleFPN`."""


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
