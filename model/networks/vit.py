"""The vision transformer of DINO and DINOv2, with their parameter names."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.errors import CheckpointError, ConfigError

HEAD_DIM = 64


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of a DINO (no layer scale) or DINOv2 (with or without registers) encoder."""

    embed_dim: int
    depth: int
    patch_px: int
    grid_size: int
    """Side of the position grid, in patches."""
    num_registers: int
    has_layer_scale: bool

    def __post_init__(self) -> None:
        if self.embed_dim % HEAD_DIM:
            raise ConfigError(f"embed_dim {self.embed_dim} of the encoder is not a multiple of {HEAD_DIM}")


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_DIM
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        batch, count, width = tokens.shape
        # B N 3C -> 3 B heads N 64; unbind, since indexing zero-fills in the backward pass
        joint = self.qkv(tokens).reshape(batch, count, 3, self.heads, HEAD_DIM)
        query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, count, width))
        return output


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.fc2(functional.gelu(self.fc1(tokens)))
        return output


class Block(nn.Module):
    def __init__(self, width: int, has_layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width)
        self.ls1: nn.Module = LayerScale(width) if has_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2: nn.Module = LayerScale(width) if has_layer_scale else nn.Identity()

    def forward(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        output: Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return output


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_px: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_px, patch_px)

    def forward(self, normalized: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N C"]:
        tokens: Tensor = self.proj(normalized)
        return tokens.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT encoder for images whose sides are multiples of the patch; position embeddings are interpolated to them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.patch_embed = PatchEmbed(width, config.patch_px)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid_size**2, width))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, width))
        self.blocks = nn.ModuleList(Block(width, config.has_layer_scale) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, normalized: Float[Tensor, "B 3 H W"], layers: tuple[int, ...]) -> Float[Tensor, "L B N C"]:
        """Patch tokens, row by row, after each of the blocks `layers` (counted from 0), before the final norm."""
        rows, columns = (side // self.config.patch_px for side in normalized.shape[2:])
        grid = cut_grid(self.pos_embed[:, 1:], rows, columns)
        positions = torch.cat([self.pos_embed[:, :1], grid], dim=1)
        return self.run_blocks(self.patch_embed(normalized), positions, layers)

    def run_blocks(
        self, patches: Float[Tensor, "B N C"], positions: Float[Tensor, "1 N+1 C"], layers: tuple[int, ...]
    ) -> Float[Tensor, "L B N C"]:
        """As `forward`, from embedded patches and their position embeddings (class token first)."""
        batch = patches.shape[0]
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), patches], dim=1) + positions
        if self.config.num_registers:
            registers = self.register_tokens.expand(batch, -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in layers:
                outputs.append(tokens[:, 1 + self.config.num_registers :])
            if index == max(layers):
                break
        return torch.stack(outputs)


def infer_encoder_config(state: dict[str, Tensor]) -> EncoderConfig:
    """Infer the sizes of a DINO or DINOv2 encoder, with its stored position grid, from its state dict.

    Raises CheckpointError if it is not one.
    """
    try:
        embed_dim, _, patch_px, _ = state["patch_embed.proj.weight"].shape
        grid_size = math.isqrt(state["pos_embed"].shape[1] - 1)
        if 1 + grid_size**2 != state["pos_embed"].shape[1]:
            raise ValueError(f"{state['pos_embed'].shape[1]} positions are not a class token and a square grid")
        return EncoderConfig(
            embed_dim=embed_dim,
            depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
            patch_px=patch_px,
            grid_size=grid_size,
            num_registers=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
            has_layer_scale="blocks.0.ls1.gamma" in state,
        )
    except (KeyError, ValueError, IndexError, ConfigError) as error:
        raise CheckpointError(f"not a DINO or DINOv2 encoder: its tensors do not fit ({error})") from error


def cut_grid(patches: Float[Tensor, "1 M C"], rows: int, columns: int) -> Float[Tensor, "1 N C"]:
    """Return the top left rows x columns embeddings of a square of the longer side; see `interpolate_grid`.

    So a network that was trained on squares, in which images are padded, sees other shapes as the image in its square.
    """
    side = torch.sym_max(rows, columns)
    square = interpolate_grid(patches, side, side).unflatten(1, (side, side))
    cut: Tensor = square[:, :rows, :columns].flatten(1, 2)
    return cut


def interpolate_positions(positions: Float[Tensor, "1 M C"], rows: int, columns: int) -> Float[Tensor, "1 N C"]:
    """Interpolate the position embeddings of a square grid (class token first); see `interpolate_grid`."""
    return torch.cat([positions[:, :1], interpolate_grid(positions[:, 1:], rows, columns)], dim=1)


def interpolate_grid(patches: Float[Tensor, "1 M C"], rows: int, columns: int) -> Float[Tensor, "1 N C"]:
    """Interpolate embeddings of the patches of a square to rows x columns patches, bicubically.

    Interpolating to the stored size returns the stored values. There is no branch for that case: it would fix the size
    of an exported graph.
    """
    side = math.isqrt(patches.shape[1])
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)
