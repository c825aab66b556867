"""The default network: a frozen ViT encoder, a transformer decoder of queries, and masks as query times pixel.

Similar to EoMT and PMT (frozen encoder, plain transformer blocks), with two differences: queries attend to patches, but
patches do not attend to each other again, which trains 2.6 times faster on a CPU at our size; and a small RGB stem adds
the edges that patches of 14 pixels lack.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from model.errors import ConfigError
from model.networks.boxes import masks_to_boxes
from model.networks.interface import Network, NetworkOutput, normalize
from model.networks.vit import EncoderConfig, Mlp, VisionTransformer, cut_grid

MASK_STRIDE_PX = 4
"""Stride of masks and semantic maps: the stem halves the image twice."""
STABILITY_THRESHOLDS = (0.1, 0.9)
"""Two thresholds of the mask probabilities: the areas above them are nearly equal for a confident mask."""
MATRIX_NMS_SIGMA = 2.0
"""How steeply a score decays with the overlap: sigma of Matrix NMS."""
_HEADS = 8
_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the trained part."""

    side_px: int
    """Side of the square input."""
    thing_clusters: int
    stuff_clusters: int
    num_queries: int = 64
    hidden_dim: int = 256
    num_layers: int = 3
    mask_dim: int = 64
    """Channels of the mask embeddings: a mask is the dot product of a query's and a pixel's."""

    def __post_init__(self) -> None:
        if self.side_px % MASK_STRIDE_PX:
            raise ConfigError(f"side {self.side_px} px is not a multiple of the mask stride, {MASK_STRIDE_PX} px")


class AuxOutput(NamedTuple):
    """Logits after one decoder block, at patch resolution, for auxiliary losses."""

    class_logits: Float[Tensor, "B Q K+1"]
    mask_logits: Float[Tensor, "B Q rows columns"]


class DecoderOutput(NamedTuple):
    """Logits of the decoder. Class K is "no object"; semantic class 0 is "things"."""

    class_logits: Float[Tensor, "B Q K+1"]
    iou_logits: Float[Tensor, "B Q"]
    """Predicted IoU of each mask with its object."""
    mask_logits: Float[Tensor, "B Q h w"]
    semantic_logits: Float[Tensor, "B S+1 h w"]
    aux_outputs: tuple[AuxOutput, ...]


def embedding_layers(depth: int) -> tuple[int, int]:
    """Two blocks of the third quarter and after it, 7 and 9 of twelve: middle blocks have the best semantics."""
    return 2 * depth // 3 - 1, 5 * depth // 6 - 1


def intermediate_layers(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of the encoder: 2, 5, 8, 11 of twelve."""
    return tuple(quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4))


class MultiHeadAttention(nn.Module):
    """Multi-head attention of `queries` to `context`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, queries: Float[Tensor, "B Q C"], context: Float[Tensor, "B N C"]) -> Float[Tensor, "B Q C"]:
        query, key, value = (
            tokens.unflatten(2, (_HEADS, -1)).transpose(1, 2)  # B heads N c
            for tokens in (self.query(queries), self.key(context), self.value(context))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


class QueryBlock(nn.Module):
    """Cross-attention of queries to patches, self-attention among queries, MLP."""

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
    """Features at the mask stride, from patches and from the RGB image."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        narrow = config.mask_dim
        self.stem = nn.Sequential(
            nn.Conv2d(3, narrow // 2, 3, 2, 1), nn.GELU(),
            nn.Conv2d(narrow // 2, narrow // 2, 3, 2, 1), nn.GELU(),
            nn.Conv2d(narrow // 2, narrow, 3, 1, 1),
        )  # fmt: skip
        self.rise = nn.ConvTranspose2d(config.hidden_dim, narrow, 2, 2)
        self.fuse_norm = nn.GroupNorm(_GROUPS, narrow)
        self.fuse = nn.Conv2d(narrow, narrow, 3, 1, 1)

    def forward(
        self, patches: Float[Tensor, "B C rows columns"], normalized: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B c h w"]:
        edges = self.stem(normalized)
        coarse = upsample(self.rise(patches), edges.shape[2:])
        mixed = functional.gelu(self.fuse_norm(coarse + edges))
        fused: Tensor = mixed + self.fuse(mixed)
        return fused


class MaskDecoder(nn.Module):
    """The trained part: encoder features and the image to class, mask, IoU and semantic logits."""

    def __init__(self, config: DecoderConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_config = encoder
        self.grid_size = config.side_px // encoder.patch_px
        width, levels = config.hidden_dim, len(intermediate_layers(encoder.depth))
        self.tap_norms = nn.ModuleList(nn.LayerNorm(encoder.embed_dim) for _ in range(levels))
        self.laterals = nn.ModuleList(nn.Linear(encoder.embed_dim, width) for _ in range(levels))
        self.position = nn.Parameter(torch.randn(1, self.grid_size**2, width) * 0.02)
        self.patch_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(1, config.num_queries, width))
        self.blocks = nn.ModuleList(QueryBlock(width) for _ in range(config.num_layers))
        self.query_norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, config.thing_clusters + 1)
        self.quality_head = nn.Linear(width, 1)
        self.mask_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.mask_dim))
        self.patch_mask = nn.Linear(width, config.mask_dim)
        self.pixels = PixelDecoder(config)
        self.semantic_patches = nn.Linear(width, config.stuff_clusters + 1)
        self.semantic_pixels = nn.Conv2d(config.mask_dim, config.stuff_clusters + 1, 1)

    def forward(
        self, features: Float[Tensor, "L B N E"], normalized: Float[Tensor, "B 3 H W"], with_aux: bool = False
    ) -> DecoderOutput:
        """Compute logits for a batch; `with_aux` adds those after each block, for training."""
        grid = [side // self.encoder_config.patch_px for side in normalized.shape[2:]]
        patches = self._fuse_levels(features, grid)
        patch_embeddings = self.patch_mask(patches)
        queries = self.queries.expand(patches.shape[0], -1, -1)
        aux_outputs = []
        for block in self.blocks:
            queries = block(queries, patches)
            if with_aux:
                aux_outputs.append(self._predict_aux(queries, patch_embeddings, grid))
        hidden = self.query_norm(queries)
        fine = self.pixels(patches.transpose(1, 2).unflatten(2, grid), normalized)
        semantic = self.semantic_patches(patches).transpose(1, 2).unflatten(2, grid)
        return DecoderOutput(
            class_logits=self.class_head(hidden),
            iou_logits=self.quality_head(hidden).squeeze(2),
            mask_logits=torch.einsum("bqc,bchw->bqhw", self.mask_head(hidden), fine),
            semantic_logits=upsample(semantic, fine.shape[2:]) + self.semantic_pixels(fine),
            aux_outputs=tuple(aux_outputs),
        )

    def _fuse_levels(self, features: Float[Tensor, "L B N E"], grid: Sequence[int]) -> Float[Tensor, "B N C"]:
        levels = zip(self.laterals, self.tap_norms, features.unbind(0), strict=True)
        summed = torch.stack([lateral(norm(level)) for lateral, norm, level in levels]).sum(0)
        patches: Tensor = self.patch_norm(summed + cut_grid(self.position, *grid))
        return patches

    def _predict_aux(
        self, queries: Float[Tensor, "B Q C"], patch_embeddings: Float[Tensor, "B N c"], grid: Sequence[int]
    ) -> AuxOutput:
        hidden = self.query_norm(queries)
        masks = torch.einsum("bqc,bnc->bqn", self.mask_head(hidden), patch_embeddings)
        return AuxOutput(class_logits=self.class_head(hidden), mask_logits=masks.unflatten(2, grid))


class PatchEmbedding(nn.Module):
    """Features of two middle blocks, joined, whitened and scaled to unit length: the embeddings of patches.

    Its weights are not trained but fitted to photos (`model.export.export`).
    """

    def __init__(self, encoder: EncoderConfig, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * encoder.embed_dim, dim)

    def forward(self, features: Float[Tensor, "2 B N C"], grid: Sequence[int]) -> Float[Tensor, "B E rows columns"]:
        vectors = functional.normalize(self.projection(self.join(features)), dim=-1)
        embeddings: Tensor = vectors.transpose(1, 2).unflatten(2, grid)
        return embeddings

    @staticmethod
    def join(features: Float[Tensor, "2 B N C"]) -> Float[Tensor, "B N C*2"]:
        """Return the normalized features of both blocks."""
        return torch.cat(functional.layer_norm(features, features.shape[-1:]).unbind(0), dim=-1)


class MaskTransformer(Network):
    """Encoder and decoder in one graph; sides of images need not be those of the training."""

    side_multiple_px = 28
    """A multiple of DINOv2's patches and of the mask stride."""
    unexported_weights = ("encoder.norm.", "decoder.patch_mask.")

    def __init__(
        self, encoder: VisionTransformer, decoder: MaskDecoder, embedding: PatchEmbedding | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.embedding = embedding
        self.layers = intermediate_layers(encoder.config.depth)

    @property
    def embedding_dim(self) -> int:
        return self.embedding.projection.out_features if self.embedding else 0

    def forward(self, pixels: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> NetworkOutput:
        """Predict for images padded with ImageNet's mean color, as in training; `sizes` is not used."""
        normalized = normalize(pixels)
        if self.embedding is None:
            return to_network_output(self.decoder(self.encoder(normalized, self.layers), normalized))
        middle = embedding_layers(self.encoder.config.depth)
        layers = sorted({*self.layers, *middle})
        features = self.encoder(normalized, tuple(layers))
        output = self.decoder(torch.stack([features[layers.index(layer)] for layer in self.layers]), normalized)
        grid = [side // self.encoder.config.patch_px for side in normalized.shape[2:]]
        embeddings = self.embedding(torch.stack([features[layers.index(layer)] for layer in middle]), grid)
        return to_network_output(output)._replace(embeddings=embeddings)


def to_network_output(output: DecoderOutput) -> NetworkOutput:
    """Turn logits into scores, best clusters, boxes in input pixels, and mask probabilities.

    A score is `rescore_queries` of the probability of an object times the predicted IoU.
    """
    probabilities = output.class_logits.softmax(-1)
    masks = output.mask_logits.sigmoid()
    things = output.semantic_logits.softmax(1)[:, 0]
    return NetworkOutput(
        scores=rescore_queries((1.0 - probabilities[..., -1]) * output.iou_logits.sigmoid(), masks, things),
        clusters=probabilities[..., :-1].argmax(-1),
        boxes=masks_to_boxes(masks > 0.5) * MASK_STRIDE_PX,
        masks=masks,
        semantic=output.semantic_logits,
    )


def rescore_queries(
    scores: Float[Tensor, "B Q"], masks: Float[Tensor, "B Q h w"], things: Float[Tensor, "B h w"]
) -> Float[Tensor, "B Q"]:
    """Combine each query's score with its mask (probabilities) and the probability of things at each pixel.

    Queries are supervised one by one, so several may predict one object, and some predict what the semantic head calls
    stuff. Everything here has a static shape and needs no sort, so it is part of the exported graph.
    The new score is the geometric mean of the score times the stability of the mask and of the mean probability of
    things inside it. It decays where a query of higher score predicts the same mask. An empty mask scores 0.
    """
    with _full_precision(masks.device.type):
        pixels = (masks > 0.5).flatten(2).float()
        areas = pixels.sum(2)
        thing_fractions = torch.einsum("bqn,bn->bq", pixels, things.flatten(1).float()) / areas.clamp(min=1.0)
        rescored = (scores.float() * _stability_score(masks) * thing_fractions).sqrt()
        return rescored * matrix_nms_decay(rescored, _mask_iou(pixels, areas))


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Disable autocast: half precision cannot count beyond 2,048 pixels, bfloat16 not even beyond 256."""
    is_half = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" supports neither
    return torch.autocast(device, enabled=False) if is_half else nullcontext()


def _stability_score(masks: Float[Tensor, "B Q h w"]) -> Float[Tensor, "B Q"]:
    """IoU of each mask at a low and at a high threshold (Segment Anything, section 4 and appendix B)."""
    low, high = ((masks > threshold).sum((2, 3)) for threshold in STABILITY_THRESHOLDS)
    return high / low.clamp(min=1)


def _mask_iou(pixels: Float[Tensor, "B Q N"], areas: Float[Tensor, "B Q"]) -> Float[Tensor, "B Q Q"]:
    """IoU of every pair of binary masks; 0 where both are empty."""
    intersections = pixels @ pixels.transpose(1, 2)
    return intersections / (areas[:, :, None] + areas[:, None] - intersections).clamp(min=1.0)


def matrix_nms_decay(scores: Float[Tensor, "B Q"], ious: Float[Tensor, "B Q Q"]) -> Float[Tensor, "B Q"]:
    """Factor by which each score decays because of better-scored duplicates.

    Matrix NMS with the Gaussian kernel (SOLOv2, section 3.3): a rival counts less the more it is itself a duplicate.
    """
    order = torch.arange(scores.shape[1], device=scores.device)
    rivals, own = scores[:, :, None], scores[:, None]
    is_better = (rivals > own) | ((rivals == own) & (order[:, None] < order))
    overlaps = ious * is_better
    rival_overlaps = overlaps.amax(1)[:, :, None]
    factors = torch.exp(MATRIX_NMS_SIGMA * (rival_overlaps * rival_overlaps - overlaps * overlaps))
    return factors.amin(1).clamp(max=1.0)


def upsample(maps: Float[Tensor, "B C rows columns"], size: Sequence[int]) -> Float[Tensor, "B C h w"]:
    """Interpolate to `size` (rows, columns), bilinearly."""
    return functional.interpolate(maps, size=list(size), mode="bilinear", align_corners=False)
