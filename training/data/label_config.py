"""Configuration of pseudo-labels, stored with them as `label.json`.

The classes build on each other: `PseudoLabelOptions` are the options of `useg label`, `PseudoLabelConfig` adds what
the command finds out (hashes, paths). A function takes the smallest class that has what it needs.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from model.errors import ConfigError
from training.option_types import Fraction, NonNegativeInt, PositiveInt

_MASK_STRIDE_PX = 4
"""The networks' `MASK_STRIDE_PX`, repeated here because the command line imports this module without torch."""
MAX_OBJECTS = 12
"""Upper limit of consensus masks in the panoptic map of one photo."""

StegoPreset = Literal["small", "base", "tiny"]


@dataclass(frozen=True, kw_only=True)
class MaskDiscoveryConfig:
    """How object masks are found in the features of one photo."""

    proposals: Literal["consensus", "maskcut"] = "consensus"
    """Source of object masks. consensus: regions that several projections of the features agree on; maskcut: MaskCut
    (CutLER)."""
    maskcut_n: PositiveInt = 3
    """With `--proposals maskcut`: maximum number of masks per photo."""
    maskcut_tau: Fraction = 0.3
    """With `--proposals maskcut`: cosine similarity above which two patches are connected, in 0..1. CutLER uses 0.15 on
    the keys of DINO."""
    maskcut_features: Literal["patches", "keys"] = "patches"
    """With `--proposals maskcut`: features to cut. patches: the encoder's output; keys: the keys of its last attention
    layer, computed on the photo resized to a square, as published."""
    maskcut_subtract_mean: bool = False
    """With `--proposals maskcut`: subtract the photo's mean feature first. Needed for the keys of DINOv2, which are all
    similar to each other."""
    maskcut_reference_filters: bool = False
    """With `--proposals maskcut`: filter masks exactly as the published code: the first mask always stays, and a
    rejected mask does not end the search."""
    objects_per_image: Annotated[int, Parameter(validator=Number(gte=1, lte=MAX_OBJECTS))] = 7
    """With `--proposals consensus`: mean number of masks per photo that go into the panoptic map, 1..12. Masks with the
    highest objectness over all photos are taken, at most 12 of one photo."""

    def __post_init__(self) -> None:
        changed = self.maskcut_features != "patches" or self.maskcut_subtract_mean or self.maskcut_reference_filters
        if self.proposals == "consensus" and changed:
            raise ConfigError(
                "maskcut_features, maskcut_subtract_mean and maskcut_reference_filters need proposals maskcut"
            )


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig:
    """How masks and patches are clustered into thing and stuff clusters."""

    side_px: Annotated[int, Parameter(validator=Number(gte=_MASK_STRIDE_PX, modulo=_MASK_STRIDE_PX))] = 448
    """Side of the square that the encoder sees, in pixels; a multiple of the encoder's patch size and of 4."""
    layers: tuple[int, ...] = (-4, -1)
    """Encoder blocks whose patch features are concatenated for clustering, counted from 0, or from the last block if
    negative. The default is blocks 8 and 11 of a ViT-S or ViT-B."""
    pca_dim: PositiveInt = 64
    """Dimensions of the features after PCA whitening."""
    thing_clusters: PositiveInt = 64
    """Number of thing clusters."""
    stuff_clusters: PositiveInt = 27
    """Number of stuff clusters."""
    stuff: Literal["kmeans", "regions", "stego"] = "regions"
    """Source of stuff. kmeans: clusters of patch features; regions: the same after smoothing within masks; stego:
    STEGO, trained here."""
    stego_preset: StegoPreset = "small"
    """With `--stuff stego`: published hyper-parameters; `tiny` is a smoke test."""
    stego_steps: PositiveInt = 5000
    """With `--stuff stego`: training steps."""
    seed: NonNegativeInt = 0
    """Random seed of sampling, k-means and STEGO."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("layers must name at least one encoder block")


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(ClusteringConfig):
    """Everything that clusters depend on except photos and masks; stored in `codebook.npz`."""

    encoder_hash: str
    """SHA-256 of the encoder's file."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabelOptions(ClusteringConfig, MaskDiscoveryConfig):
    """The options of `useg label` that change the labels."""

    stuff_merge_rule: Literal["u2seg", "drop-thing-like"] = "drop-thing-like"
    """Stuff clusters that lie mostly inside masks: keep them as stuff elsewhere (u2seg, as published), or leave their
    pixels outside masks unlabeled (drop-thing-like)."""
    max_stuff_in_things: Fraction = 0.5
    """Fraction of a stuff cluster inside masks above which `drop-thing-like` drops it, 0..1."""
    data_source: str = ""
    """Where the photos come from, for the model card."""

    def __post_init__(self) -> None:
        ClusteringConfig.__post_init__(self)
        MaskDiscoveryConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class PseudoLabelConfig(PseudoLabelOptions):
    """Everything that labels depend on; stored as `label.json`."""

    photos: str
    """Folder of the photos, absolute."""
    photos_hash: str
    """SHA-256 over the names and contents of all photos."""
    encoder: str
    """Path of the encoder's file, absolute."""
    encoder_hash: str
    """SHA-256 of the encoder's file."""
    codebook_hash: str = ""
    """Hash of the codebook that was given; empty if one is fitted on these photos."""
    mask_source: Literal["discovery", "ground-truth"] = "discovery"
    """Where the masks come from: found in features as the options say, or annotated."""
    teacher_hash: str = ""
    """Hashes of the run that predicted the labels and of the labels that it was trained on, in self-training."""


@dataclass(frozen=True)
class CorrelationTerm:
    """Weight (lambda) and shift (b) of one of STEGO's three correlation losses."""

    weight: float
    shift: float
    """Feature similarity above which codes are pulled together, and below which they are pushed apart."""


@dataclass(frozen=True, kw_only=True)
class StegoConfig:
    """Hyper-parameters of STEGO; the defaults are those of its checkpoint cocostuff27_vit_small_1_31_22."""

    self_term: CorrelationTerm = CorrelationTerm(0.67, 0.08)
    """An image with itself."""
    knn_term: CorrelationTerm = CorrelationTerm(0.25, 0.02)
    """An image with one of its nearest neighbors."""
    random_term: CorrelationTerm = CorrelationTerm(0.63, 0.66)
    """An image with random other images of the batch."""
    code_dim: int = 70
    dropout: float = 0.1
    """Fraction of the channels."""
    samples: int = 11
    """Sample points along each side of an image."""
    num_neighbors: int = 7
    """Nearest images from which the positive is drawn."""
    num_shuffles: int = 5
    """Permutations of the batch that make the random pairs."""
    max_steps: int = 5000
    batch_size: int = 16
    learning_rate: float = 5e-4
    probe_learning_rate: float = 5e-3
    checkpoint_interval: int = 500
    """Steps between checkpoints."""


STEGO_PRESETS: dict[StegoPreset, StegoConfig] = {
    "small": StegoConfig(),
    "base": StegoConfig(
        self_term=CorrelationTerm(0.1, 0.12),
        knn_term=CorrelationTerm(1.0, 0.2),
        random_term=CorrelationTerm(0.1538476246415498, 1.0),
    ),
    "tiny": StegoConfig(code_dim=8, max_steps=4, batch_size=2, checkpoint_interval=2),
}
"""`base`: as the checkpoint cocostuff27_vit_base_5 of mhamilton723/STEGO; `tiny`: a smoke test."""
