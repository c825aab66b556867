"""The embedding of patches: whitened features of the middle of the encoder, fitted to unlabeled photos."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from model.backends.onnx_to_torch import load_torch_network
from model.checkpoints.dino import is_same_encoder
from model.contract import Contract, InputSize
from model.embeddings import CategoryExamples, fit_whitening
from model.images import letterbox_image
from model.networks.interface import normalize
from model.networks.mask_transformer import MASK_STRIDE_PX, MaskTransformer, PatchEmbedding, embedding_layers
from model.networks.vit import VisionTransformer

logger = logging.getLogger(__name__)

EMBEDDING_DIM = 64
MAX_PHOTOS = 200
"""Photos that are sufficient to fit the embedding."""
_PATCHES_PER_PHOTO = 250


class NamedEmbedding(NamedTuple):
    """The embedding of an artifact and its examples."""

    artifact: Path
    contract: Contract
    """With the names that apply to the artifact."""

    @property
    def examples(self) -> CategoryExamples | None:
        """The examples, for a network with other clusters: names that users gave to clusters do not apply to it."""
        examples = self.contract.examples
        return replace(examples, except_clusters=()) if examples else None

    def load(self, encoder: VisionTransformer) -> PatchEmbedding | None:
        """Return the embedding for this encoder.

        None, after a warning, if the artifact has no examples or another encoder, whose features are not comparable.
        """
        network = load_torch_network(self.contract, self.artifact) if self.contract.examples else None
        if not isinstance(network, MaskTransformer) or network.embedding is None:
            logger.warning("%s has no examples: segments get the category of their cluster", self.artifact)
            return None
        if not is_same_encoder(network.encoder.state_dict(), encoder.state_dict()):
            logger.warning("%s has another encoder: its examples cannot be taken over", self.artifact)
            return None
        return network.embedding


@torch.no_grad()
def fit_patch_embedding(
    encoder: VisionTransformer, photos: Iterable[UInt8[np.ndarray, "H W 3"]], side_px: int
) -> PatchEmbedding | None:
    """Return the embedding whose values have mean 0 and variance 1 on patches of these photos; None without photos.

    They are the principal components with the largest variance.
    """
    generator = np.random.default_rng(0)
    samples = []
    for photo in photos:
        pixels, letterbox = letterbox_image(photo, [InputSize.square(side_px)], MASK_STRIDE_PX)
        features = encoder(normalize(torch.from_numpy(pixels[None])), embedding_layers(encoder.config.depth))
        rows, columns = (-(-side // encoder.config.patch_px) for side in letterbox.size)
        width = side_px // encoder.config.patch_px
        inside = (np.arange(rows)[:, None] * width + np.arange(columns)).ravel()
        chosen = generator.permutation(inside)[:_PATCHES_PER_PHOTO]
        samples.append(PatchEmbedding.join(features)[0, torch.from_numpy(chosen)])
    if not samples:
        return None
    sample = torch.cat(samples).double().numpy()
    dim = min(EMBEDDING_DIM, len(sample) - 1)
    mean, projection = fit_whitening(sample, dim)
    embedding = PatchEmbedding(encoder.config, dim)
    embedding.projection.weight.copy_(torch.from_numpy(projection.T))
    embedding.projection.bias.copy_(torch.from_numpy(-mean @ projection))
    return embedding.eval().requires_grad_(False)
