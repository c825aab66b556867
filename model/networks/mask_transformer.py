"""Queries that look at a frozen encoder's patches, and the masks they draw: our default network.

In the manner of EoMT and PMT (frozen encoder, plain transformer blocks, masks as query times pixel), with two
differences: queries attend to patches without patches attending to each other again, which trains 2.6 times faster on
a CPU at our size, and a small RGB stem gives the masks the edges that 14-pixel patches lack.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from model.errors import ConfigError
from model.networks.interface import NetworkOutput
from model.networks.query_rescoring import rescore_queries
from model.networks.vit import EncoderConfig, Mlp, VisionTransformer

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MASK_STRIDE_PX = 4
"""Of masks and semantic maps; the stem halves the picture twice."""
_HEADS = 8
_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the trained part."""

    side_px: int
    thing_clusters: int
    stuff_clusters: int
    queries: int = 64
    width: int = 256
    layers: int = 3
    mask_dim: int = 64
    """Channels in which queries and pixels meet."""
    embedding: int = 0
    """Size of what queries say of their objects' features, for clusters made later; 0: nothing."""
    trained_clusters: int = 0
    """Thing clusters that the labels had, where the answer's were made later, from embeddings; 0: the same."""

    def __post_init__(self) -> None:
        if self.side_px % MASK_STRIDE_PX:
            raise ConfigError(f"side {self.side_px} px is no multiple of the mask stride, {MASK_STRIDE_PX} px")
        if self.width % _HEADS or self.mask_dim % _GROUPS:
            raise ConfigError(f"widths {self.width} and {self.mask_dim} must be multiples of {_HEADS} and {_GROUPS}")
        if self.trained_clusters and not self.embedding:
            raise ConfigError("clusters can be made later only from embeddings: fit with them")

    @property
    def map_side(self) -> int:
        return self.side_px // MASK_STRIDE_PX


class AuxOutput(NamedTuple):
    """What the queries say after one decoder block, for supervision at patch resolution."""

    classes: Float[Tensor, "B Q K+1"]
    masks: Float[Tensor, "B Q g g"]


class DecoderOutput(NamedTuple):
    """All logits. Class K is "none"; semantic class 0 is "things"."""

    classes: Float[Tensor, "B Q K+1"]
    quality: Float[Tensor, "B Q"]
    masks: Float[Tensor, "B Q h w"]
    semantic: Float[Tensor, "B S+1 h w"]
    layers: tuple[AuxOutput, ...]
    embeddings: Float[Tensor, "B Q D"] | None = None
    """Of any length: only directions are taught."""


def normalize(pixels: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """ImageNet's mean and deviation taken out."""
    # Filled on the device: a copy from the host could not be recorded in a CUDA graph.
    mean, std = (
        torch.stack([torch.full((1, 1), value, device=pixels.device) for value in values])
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (pixels.float() / 255.0 - mean) / std


def intermediate_layers(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of the encoder: 2, 5, 8, 11 of twelve."""
    return tuple(quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4))


class MultiHeadAttention(nn.Module):
    """Multi-head attention of `seekers` to `sources`."""

    def __init__(self, width: int, heads: int = _HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, seekers: Float[Tensor, "B Q C"], sources: Float[Tensor, "B N C"]) -> Float[Tensor, "B Q C"]:
        query, key, value = (
            self._split(tokens) for tokens in (self.query(seekers), self.key(sources), self.value(sources))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output

    def _split(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B heads N c"]:
        split: Tensor = tokens.unflatten(2, (self.heads, -1))
        return split.transpose(1, 2)


class QueryBlock(nn.Module):
    """Queries look at the patches, then at each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross_norm = nn.LayerNorm(width)
        self.cross = MultiHeadAttention(width)
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = MultiHeadAttention(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, queries: Float[Tensor, "B Q C"], patches: Float[Tensor, "B N C"]) -> Float[Tensor, "B Q C"]:
        queries = queries + self.cross(self.cross_norm(queries), patches)
        normed = self.self_norm(queries)
        queries = queries + self.self_attention(normed, normed)
        output: Tensor = queries + self.mlp(self.mlp_norm(queries))
        return output


class PixelDecoder(nn.Module):
    """Patches and RGB edges to features at the mask stride."""

    def __init__(self, shape: DecoderConfig) -> None:
        super().__init__()
        narrow = shape.mask_dim
        self.map_side = shape.map_side
        self.stem = nn.Sequential(
            nn.Conv2d(3, narrow // 2, 3, 2, 1), nn.GELU(),
            nn.Conv2d(narrow // 2, narrow // 2, 3, 2, 1), nn.GELU(),
            nn.Conv2d(narrow // 2, narrow, 3, 1, 1),
        )  # fmt: skip
        self.rise = nn.ConvTranspose2d(shape.width, narrow, 2, 2)
        self.fuse_norm = nn.GroupNorm(_GROUPS, narrow)
        self.fuse = nn.Conv2d(narrow, narrow, 3, 1, 1)

    def forward(
        self, patches: Float[Tensor, "B C g g"], normalised: Float[Tensor, "B 3 S S"]
    ) -> Float[Tensor, "B c h w"]:
        coarse = upsample(self.rise(patches), self.map_side)
        mixed = functional.gelu(self.fuse_norm(coarse + self.stem(normalised)))
        fused: Tensor = mixed + self.fuse(mixed)
        return fused


class MaskDecoder(nn.Module):
    """The trained part: tapped encoder maps and the picture to class, mask, quality and semantic logits."""

    def __init__(self, shape: DecoderConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.shape = shape
        self.encoder_shape = encoder
        self.grid = encoder.grid
        taps = len(intermediate_layers(encoder.depth))
        self.tap_norms = nn.ModuleList(nn.LayerNorm(encoder.width) for _ in range(taps))
        self.laterals = nn.ModuleList(nn.Linear(encoder.width, shape.width) for _ in range(taps))
        self.position = nn.Parameter(torch.randn(1, encoder.grid**2, shape.width) * 0.02)
        self.patch_norm = nn.LayerNorm(shape.width)
        self.queries = nn.Parameter(torch.randn(1, shape.queries, shape.width))
        self.blocks = nn.ModuleList(QueryBlock(shape.width) for _ in range(shape.layers))
        self.query_norm = nn.LayerNorm(shape.width)
        self.class_head = nn.Linear(shape.width, (shape.trained_clusters or shape.thing_clusters) + 1)
        self.quality_head = nn.Linear(shape.width, 1)
        self.mask_head = nn.Sequential(
            nn.Linear(shape.width, shape.width), nn.GELU(), nn.Linear(shape.width, shape.mask_dim)
        )
        self.patch_mask = nn.Linear(shape.width, shape.mask_dim)
        self.pixels = PixelDecoder(shape)
        self.semantic_patches = nn.Linear(shape.width, shape.stuff_clusters + 1)
        self.semantic_pixels = nn.Conv2d(shape.mask_dim, shape.stuff_clusters + 1, 1)
        self.embedding_head = nn.Linear(shape.width, shape.embedding) if shape.embedding else None
        self.cluster_head = nn.Linear(shape.width, shape.thing_clusters) if shape.trained_clusters else None

    def forward(
        self, features: Float[Tensor, "T B N E"], normalised: Float[Tensor, "B 3 S S"], with_aux: bool = False
    ) -> DecoderOutput:
        """Logits for a batch; with `with_aux`, also those of each block, for training."""
        patches = self._gather(features)
        low = self.patch_mask(patches)
        queries = self.queries.expand(patches.shape[0], -1, -1)
        layers = []
        for block in self.blocks:
            queries = block(queries, patches)
            if with_aux:
                layers.append(self._read(queries, low))
        said = self.query_norm(queries)
        square = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        fine = self.pixels(square, normalised)
        semantic = self.semantic_patches(patches).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return DecoderOutput(
            classes=self._classify(said),
            quality=self.quality_head(said).squeeze(2),
            masks=torch.einsum("bqc,bchw->bqhw", self.mask_head(said), fine),
            semantic=upsample(semantic, self.shape.map_side) + self.semantic_pixels(fine),
            layers=tuple(layers),
            embeddings=self.embedding_head(said) if self.embedding_head is not None else None,
        )

    def _classify(self, said: Float[Tensor, "B Q C"]) -> Float[Tensor, "B Q K+1"]:
        """With clusters made later, theirs share the chance that the taught ones have together."""
        classes: Tensor = self.class_head(said)
        if self.cluster_head is None:
            return classes
        shares = self.cluster_head(said).log_softmax(-1)
        return torch.cat([shares + classes[..., :-1].logsumexp(-1, keepdim=True), classes[..., -1:]], -1)

    def _gather(self, features: Float[Tensor, "T B N E"]) -> Float[Tensor, "B N C"]:
        levels = zip(self.laterals, self.tap_norms, features.unbind(0), strict=True)
        summed = torch.stack([lateral(norm(level)) for lateral, norm, level in levels]).sum(0)
        patches: Tensor = self.patch_norm(summed + self.position)
        return patches

    def _read(self, queries: Float[Tensor, "B Q C"], low: Float[Tensor, "B N c"]) -> AuxOutput:
        said = self.query_norm(queries)
        masks = torch.einsum("bqc,bnc->bqn", self.mask_head(said), low)
        return AuxOutput(classes=self._classify(said), masks=masks.unflatten(2, (self.grid, self.grid)))


class MaskTransformer(nn.Module):
    """Encoder and decoder in one static graph: uint8 pictures to the raw answer of a session."""

    def __init__(self, encoder: VisionTransformer, decoder: MaskDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.taps = intermediate_layers(encoder.shape.depth)

    def forward(self, pixels: UInt8[Tensor, "B 3 S S"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        """Answers for pictures laid on ImageNet's mean colour, as in training; that, not `sizes`, ends them."""
        normalised = normalize(pixels)
        prediction = self.decoder(self.encoder(normalised, self.taps), normalised)
        return to_network_output(prediction)


def to_network_output(prediction: DecoderOutput) -> NetworkOutput:
    """Scores (`rescore_queries` of the chance of an object times its expected IoU), best clusters, boxes in input
    pixels, mask
    probabilities.
    """
    chances = prediction.classes.softmax(-1)
    masks = prediction.masks.sigmoid()
    things = prediction.semantic.softmax(1)[:, 0]
    return NetworkOutput(
        scores=rescore_queries((1.0 - chances[..., -1]) * prediction.quality.sigmoid(), masks, things),
        clusters=chances[..., :-1].argmax(-1),
        boxes=masks_to_boxes(masks > 0.5) * MASK_STRIDE_PX,
        masks=masks,
        semantic=prediction.semantic,
    )


def masks_to_boxes(masks: Bool[Tensor, "B D h w"]) -> Float[Tensor, "B D 4"]:
    """x0, y0, x1, y1 around each mask in cells; zeros for an empty one."""
    edges = []
    for present in (masks.any(2), masks.any(3)):  # columns, then rows
        cells = torch.arange(present.shape[2], device=masks.device)
        inside = present.any(2)
        first = torch.where(present, cells, present.shape[2]).amin(2)
        last = torch.where(present, cells + 1, 0).amax(2)
        edges.append((torch.where(inside, first, 0), last))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=2).float()


def upsample(maps: Float[Tensor, "B C g g"], side: int) -> Float[Tensor, "B C h w"]:
    return functional.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
