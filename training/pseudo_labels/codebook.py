"""The codebook: cluster centroids, and how masks and pixels of a photo get a cluster from them.

`clustering.py` fits a codebook; this module stores and applies one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn

from model.embeddings import l2_normalize
from model.errors import ConfigError, DatasetError
from model.files import atomic_write, load_npz
from model.images import resize_map
from model.validation import parse_versioned_json
from training.data.features import PhotoFeatures
from training.data.label_config import MAX_OBJECTS, ClusteringConfig, CodebookConfig, PseudoLabelOptions
from training.pseudo_labels.consensus import FeatureProjections
from training.pseudo_labels.maskcut import MaskProposals

FORMAT_VERSION = 3
_HEAD, _PROJECTIONS = "stego_head.", "projections."
_MAX_CONSENSUS_SCORE = 9.0
"""Score of a consensus mask on which all four projections agree, with a contrast of 1."""


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Centroids of the clusters, one per row, and the whitening that is applied to features before."""

    config: CodebookConfig
    mean: Float[np.ndarray, "E"]
    projection: Float[np.ndarray, "E P"]
    """Principal axes, each divided by its standard deviation."""
    thing_centroids: Float[np.ndarray, "K D"]
    stuff_centroids: Float[np.ndarray, "S D"]
    """Of unit length."""
    stuff_in_masks: Float[np.ndarray, "S"]
    """Fraction of each stuff cluster's patches that lie in masks, over the photos it was fitted on."""
    patch_centroids: Float[np.ndarray, "M P"] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Patch clusters for objectness, finer than stuff. Empty unless fitted on consensus masks, as are the next two."""
    patch_objectness: Float[np.ndarray, "M"] = field(default_factory=lambda: np.zeros(0, np.float32))
    """Fraction of each patch cluster that MaskCut takes for objects."""
    score_thresholds: Float[np.ndarray, "O"] = field(default_factory=lambda: np.zeros(0, np.float32))
    """Objectness scores that leave 1, 2, … masks per photo on average."""
    stego_head: Mapping[str, np.ndarray] = field(default_factory=dict)
    """State dict of the STEGO head, if stuff comes from STEGO."""
    projections: FeatureProjections | None = None
    """Feature projections of the consensus masks that it was fitted on."""

    @property
    def has_objectness(self) -> bool:
        return len(self.patch_centroids) > 0

    @property
    def digest(self) -> str:
        """Hash of the content; the bytes of the file also depend on the time."""
        joined = hashlib.sha256()
        for name, array in sorted(self._arrays().items()):
            joined.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return joined.hexdigest()

    def save(self, path: Path) -> None:
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **self._arrays())

    def whiten(self, features: PhotoFeatures) -> Float[np.ndarray, "h w P"]:
        """Return the whitened patch features of a photo, of unit length."""
        return whiten(features.concat_layers(), self.mean, self.projection)

    def embed_masks(self, features: PhotoFeatures, masks: Bool[np.ndarray, "N h w"]) -> Float[np.ndarray, "N D"]:
        """Return the mean of the whitened patch features in each mask, of unit length."""
        whitened = self.whiten(features)
        means = np.array([whitened[mask].mean(0) for mask in masks], np.float32)
        return l2_normalize(means.reshape(-1, whitened.shape[-1]))

    def rank_by_objectness(self, features: PhotoFeatures, proposals: MaskProposals) -> MaskProposals:
        """Return consensus masks with objectness scores in 0..1, best first.

        The score is the geometric mean of the consensus score, relative to its maximum, and the mean objectness of the
        mask's patches: sky and ground have a high consensus and a low objectness.
        """
        objectness = self.patch_objectness[nearest_centroid(self.whiten(features), self.patch_centroids)]
        inside = proposals.binary
        mean = (inside * objectness).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1)
        scores = np.sqrt(np.clip(proposals.scores / _MAX_CONSENSUS_SCORE, 0.0, 1.0) * mean)
        order = np.argsort(-scores, kind="stable")
        return MaskProposals(soft=proposals.soft[order], scores=scores[order].astype(np.float32))

    def select_things(self, features: PhotoFeatures, proposals: MaskProposals, objects_per_image: int) -> MaskProposals:
        """Return the masks for the panoptic map, best first. Of masks without objectness scores, all are returned."""
        if not self.has_objectness:
            return proposals
        ranked = self.rank_by_objectness(features, proposals)
        return ranked.top_k(MAX_OBJECTS, self.score_thresholds[objects_per_image - 1])

    def assign_things(self, features: PhotoFeatures, masks: Bool[np.ndarray, "N h w"]) -> Int[np.ndarray, "N"]:
        """Return the thing cluster of each mask, counted from 1."""
        return nearest_centroid(self.embed_masks(features, masks), self.thing_centroids) + 1

    def embed_stuff(self, features: PhotoFeatures, proposals: MaskProposals) -> Float[np.ndarray, "h w D"]:
        """Return the vector of each patch whose nearest stuff centroid is its cluster."""
        match self.config.stuff:
            case "kmeans":
                return self.whiten(features)
            case "regions":
                return smooth_with_masks(self.whiten(features), proposals)
            case "stego":
                return self._stego.encode(features.final_tokens())

    def segment_stuff(self, features: PhotoFeatures, proposals: MaskProposals) -> Int32[np.ndarray, "H W"]:
        """Return the stuff cluster of every pixel, counted from 1, in the photo's own size.

        Similarities are upsampled before the best is taken, so that borders cross patches.
        """
        similarities = self.embed_stuff(features, proposals) @ self.stuff_centroids.T
        height, width = (length * features.patch_px for length in similarities.shape[:2])
        letterbox = features.letterbox
        best = np.full((letterbox.height, letterbox.width), -np.inf, np.float32)
        winners = np.zeros(best.shape, np.int32)
        for index in np.unique(similarities.argmax(-1)):
            plane = np.ascontiguousarray(similarities[..., index], dtype=np.float32)
            shown = resize_map(plane, height, width)[: letterbox.resized_height, : letterbox.resized_width]
            candidate = resize_map(shown, letterbox.height, letterbox.width)
            winners[candidate > best] = index + 1
            np.maximum(best, candidate, out=best)
        return winners

    @cached_property
    def _stego(self) -> "StegoHead":
        code_dim, width = self.stego_head["linear.weight"].shape[:2]
        head = StegoHead(width, code_dim, dropout=0.0)
        head.load_state_dict({name: torch.from_numpy(array) for name, array in self.stego_head.items()})
        return head.eval().requires_grad_(False)

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ["mean", "projection", "thing_centroids", "stuff_centroids", "stuff_in_masks"]
        names += ["patch_centroids", "patch_objectness", "score_thresholds"] if self.has_objectness else []
        arrays = {each: getattr(self, each) for each in names}
        arrays |= {_HEAD + name: array for name, array in self.stego_head.items()}
        if self.projections:
            arrays |= {_PROJECTIONS + name: array for name, array in asdict(self.projections).items()}
        config = {"format_version": FORMAT_VERSION, **asdict(self.config)}
        return arrays | {"config": np.array(json.dumps(config))}


def load_codebook(path: Path) -> Codebook:
    """Raises DatasetError if the file is missing, damaged or of another format version."""
    try:
        arrays = load_npz(path)
        if "config" not in arrays:
            raise ValueError("it has no `config`, as files before format version 3; run `useg label` again")
        config = str(arrays.pop("config"))
        head, projections = (_pop_prefixed(arrays, prefix) for prefix in (_HEAD, _PROJECTIONS))
        return Codebook(
            config=parse_versioned_json(CodebookConfig, config, FORMAT_VERSION, "; run `useg label` again"),
            stego_head=head,
            projections=FeatureProjections(**projections) if projections else None,
            **arrays,
        )
    except (ValueError, TypeError, ConfigError) as error:
        raise DatasetError(f"{path} is not a readable codebook: {error}") from error


def _pop_prefixed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


def use_codebook_settings(options: PseudoLabelOptions, codebook: Codebook, encoder_hash: str) -> PseudoLabelOptions:
    """Return the options with the clustering settings of a codebook.

    Raises ConfigError if an option is neither the default nor the codebook's, or if the encoder is another one.
    """
    defaults = {each.name: each.default for each in fields(ClusteringConfig)}
    settings = {name: getattr(codebook.config, name) for name in defaults}
    changed = [f"{name} {value}" for name, value in settings.items()
               if getattr(options, name) not in (defaults[name], value)]  # fmt: skip
    if codebook.config.encoder_hash != encoder_hash:
        changed.append(f"encoder {codebook.config.encoder_hash[:12]}")
    if changed:
        raise ConfigError(f"the codebook was fitted with {', '.join(changed)}: leave these options out, or fit another")
    return replace(options, **settings)


def whiten(
    tokens: Float[np.ndarray, "*N E"], mean: Float[np.ndarray, "E"], projection: Float[np.ndarray, "E P"]
) -> Float[np.ndarray, "*N P"]:
    """Return whitened tokens of unit length."""
    return l2_normalize(tokens @ projection - mean @ projection)


def nearest_centroid(vectors: Float[np.ndarray, "*N P"], centroids: Float[np.ndarray, "K P"]) -> Int[np.ndarray, "*N"]:
    """Return the index of the centroid of unit length that is most similar by cosine."""
    nearest: Int[np.ndarray, "*N"] = (vectors @ centroids.T).argmax(-1)
    return nearest


def smooth_with_masks(tokens: Float[np.ndarray, "h w P"], proposals: MaskProposals) -> Float[np.ndarray, "h w P"]:
    """Return tokens of unit length, each the mean of itself and the mean feature of the masks that it lies in.

    The masks of a patch are weighted by their squared scores; a patch in no mask stays as it is.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    inside = proposals.binary.reshape(len(proposals.soft), len(flat)).astype(np.float32)
    means = (inside @ flat) / np.maximum(inside.sum(1, keepdims=True), 1.0)
    weights = inside * np.maximum(proposals.scores, 0.0)[:, None] ** 2
    smoothed: Float[np.ndarray, "h w P"] = (flat + l2_normalize(weights.T @ means)).reshape(tokens.shape)
    return l2_normalize(smoothed)


class StegoHead(nn.Module):
    """STEGO's head: features to codes by a linear and a two-layer branch, added; 1x1 convolutions."""

    def __init__(self, width: int, code_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Conv2d(width, code_dim, 1)
        self.nonlinear = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, code_dim, 1))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Each branch drops channels of its own."""
        codes: Tensor = self.linear(self.dropout(features)) + self.nonlinear(self.dropout(features))
        return codes

    @torch.inference_mode()
    def encode(self, tokens: Float[np.ndarray, "h w C"]) -> Float[np.ndarray, "h w D"]:
        """Return the codes of one photo. Difference: they are not averaged with those of the mirrored photo."""
        maps = torch.from_numpy(np.ascontiguousarray(tokens)).permute(2, 0, 1)
        codes: Float[np.ndarray, "h w D"] = self(maps[None])[0].permute(1, 2, 0).numpy()
        return codes
