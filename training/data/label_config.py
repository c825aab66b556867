"""How STEGO is trained; free of heavy imports, for the command line."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from model.errors import ConfigError
from training.choices import (
    MASKCUT_FEATURES,
    PROPOSAL_METHODS,
    REFINEMENT_METHODS,
    MaskCutFeatures,
    ProposalMethod,
    RefinementMethod,
)


@dataclass(frozen=True, kw_only=True)
class CorrelationTerm:
    """One of the three correlation losses."""

    weight: float
    shift: float
    """Feature similarity above which codes are pulled together, and below which they are pushed apart."""


@dataclass(frozen=True, kw_only=True)
class StegoConfig:
    """The recipe; lambda and b of the paper are the terms' weights and shifts."""

    itself: CorrelationTerm
    """A picture with itself."""
    neighbour: CorrelationTerm
    """With one of its nearest neighbours."""
    stranger: CorrelationTerm
    """With other pictures of the batch."""
    dimensions: int = 70
    """Of the code."""
    dropout: float = 0.1
    """Share of the channels."""
    samples: int = 11
    """Points along each side of the random grid in a picture."""
    neighbours: int = 7
    """Nearest pictures among which a positive is drawn."""
    shuffles: int = 5
    """Permutations of the batch that make strangers."""
    steps: int = 5000
    batch: int = 16
    learning_rate: float = 5e-4
    probe_learning_rate: float = 5e-3
    is_centred: bool = True
    """Feature similarities lose their mean over the second picture: small objects are not drowned by large ones."""
    is_clamped: bool = True
    """Codes are pushed apart until they are orthogonal and no further."""
    is_capped: bool = False
    """Codes more alike than 0.8 gain nothing."""
    checkpoint_every: int = 500
    """Steps."""

    def __post_init__(self) -> None:
        for name in ("dimensions", "samples", "neighbours", "shuffles", "steps", "batch", "learning_rate",
                     "probe_learning_rate", "checkpoint_every"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} of STEGO must be positive, got {getattr(self, name)}")
        if self.batch < 2:
            raise ConfigError("a batch of one picture has no strangers: STEGO needs two or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in 0..1, got {self.dropout}")


_SMALL = StegoConfig(
    itself=CorrelationTerm(weight=0.67, shift=0.08),
    neighbour=CorrelationTerm(weight=0.25, shift=0.02),
    stranger=CorrelationTerm(weight=0.63, shift=0.66),
)
STEGO_PRESETS = {
    "small": _SMALL,
    "small-10-3": replace(_SMALL, stranger=CorrelationTerm(weight=0.63, shift=0.16)),
    "base": replace(
        _SMALL,
        itself=CorrelationTerm(weight=0.1, shift=0.12),
        neighbour=CorrelationTerm(weight=1.0, shift=0.2),
        stranger=CorrelationTerm(weight=0.1538476246415498, shift=1.0),
    ),
    "cityscapes": replace(
        _SMALL,
        itself=CorrelationTerm(weight=1.0, shift=0.45828472207),
        neighbour=CorrelationTerm(weight=0.577453483136995, shift=0.1754346515479633),
        stranger=CorrelationTerm(weight=0.9058762625226623, shift=0.31361241889448443),
    ),
    "shipped": replace(
        _SMALL,
        itself=CorrelationTerm(weight=0.67, shift=0.18),
        neighbour=CorrelationTerm(weight=0.25, shift=0.12),
        stranger=CorrelationTerm(weight=0.63, shift=0.46),
    ),
    "tiny": replace(_SMALL, dimensions=8, steps=4, batch=2, checkpoint_every=2),
}
"""The published sets of hyper-parameters (mhamilton723/STEGO: checkpoints cocostuff27_vit_small_1_31_22 and _10_3,
cocostuff27_vit_base_5, cityscapes_vit_base_1, and the values in the shipped configuration); `tiny` shows that
everything turns, within seconds."""


MAX_OBJECTS = 12
"""Masks of a vote that one photo's panoptic map may hold."""


@dataclass(frozen=True, kw_only=True)
class MaskDiscoveryConfig:
    """What masks depend on, beside the photos and the encoder."""

    proposals: ProposalMethod = "vote"
    """What several views of the features agree on, or MaskCut; the next five concern MaskCut alone."""
    tokens: MaskCutFeatures = "patches"
    """What is cut: the encoder's output, or, as published, the keys of its last attention on the stretched photo."""
    maskcut_n: int = 3
    """Most masks a photo."""
    threshold: float = 0.3
    """Cosine above which two patches are near; 0.15 as published, on DINO's keys."""
    maskcut_subtract_mean: bool = False
    """Take out each photo's mean token first; without it, all keys of DINOv2 are near to each other."""
    maskcut_reference_filters: bool = False
    """Filter masks as the public code does, see MaskCutConfig in training/pseudo_labels/maskcut.py."""
    objects: int = 7
    """Masks of a vote that make the panoptic map, in the mean over the photos: the likeliest things of all, at most 12
    of one photo."""
    refinement: RefinementMethod = "guided"
    """How masks find the borders in the picture."""

    def __post_init__(self) -> None:
        for name in ("maskcut_n", "objects"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.objects > MAX_OBJECTS:
            raise ConfigError(f"objects must be at most {MAX_OBJECTS}, got {self.objects}")
        if not 0.0 < self.threshold < 1.0:
            raise ConfigError(f"threshold must lie between 0 and 1, got {self.threshold}")
        for name, words in (
            ("proposals", PROPOSAL_METHODS),
            ("tokens", MASKCUT_FEATURES),
            ("refinement", REFINEMENT_METHODS),
        ):
            if getattr(self, name) not in words:
                raise ConfigError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        if self.proposals == "vote" and (
            self.tokens != "patches" or self.maskcut_subtract_mean or self.maskcut_reference_filters
        ):
            raise ConfigError("keys, centring and the public code's filters go with MaskCut, not with a vote")


ThingEmbedding = Literal["region", "crop"]
CropToken = Literal["class", "patch"]
CropBackground = Literal["white", "kept"]
KmeansInit = Literal["restarts", "plusplus"]
StuffMethod = Literal["kmeans", "regions", "stego", "maps"]


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """What clusters depend on, beside the photos and masks that they are fitted on."""

    encoder_hash: str
    side_px: int = 448
    pca_dim: int = 64
    """Whitened dimensions."""
    thing_clusters: int = 64
    stuff_clusters: int = 27
    things: ThingEmbedding = "region"
    """What of a mask is clustered: the mean of the photo's whitened patches in it, or a picture of its own (`crop`)."""
    crop_px: int = 224
    """Side of a mask's own picture; this and the next four concern `crop` alone."""
    crop_background: CropBackground = "white"
    """What lies around the object in its picture."""
    crop_token: CropToken = "class"
    """The class token, or the mean of the patch tokens."""
    crop_layer: int = -1
    """The block after which it is taken, from 0, or from the end if negative; after the last one the final norm."""
    crop_l2_normalize: bool = False
    """Take vectors to unit length and compare their angles; else their distances, as published."""
    kmeans_init: KmeansInit = "restarts"
    """Of k-means: the best of some random starts, or one k-means++ start."""
    stuff: StuffMethod = "regions"
    """Clusters of whitened patches, alone or seen together with the masks that they lie in, STEGO, or maps from a
    folder."""
    stego: str = "small"
    """Preset of STEGO."""
    stego_steps: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("side_px", "pca_dim", "thing_clusters", "stuff_clusters", "crop_px", "stego_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        closed = {
            "things": ThingEmbedding,
            "crop_background": CropBackground,
            "crop_token": CropToken,
            "kmeans_init": KmeansInit,
            "stuff": StuffMethod,
        }
        for name, kind in closed.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.stego not in STEGO_PRESETS:
            raise ConfigError(f"stego must be one of {', '.join(STEGO_PRESETS)}, got {self.stego!r}")
