"""How a codebook is made; free of heavy imports, for the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError
from training.labels.clusters.stego_recipe import STEGO_PRESETS

Things = Literal["region", "crop"]
Token = Literal["class", "patch"]
Background = Literal["white", "kept"]
Seeding = Literal["restarts", "plusplus"]
Stuff = Literal["kmeans", "regions", "stego", "maps"]


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """What clusters depend on, beside the photos and masks that they are fitted on."""

    encoder_hash: str
    side_px: int = 448
    components: int = 64
    """Whitened dimensions."""
    thing_clusters: int = 64
    stuff_clusters: int = 27
    things: Things = "region"
    """What of a mask is clustered: the mean of the photo's whitened patches in it, or a picture of its own (`crop`)."""
    crop_px: int = 224
    """Side of a mask's own picture; this and the next four concern `crop` alone."""
    crop_background: Background = "white"
    """What lies around the object in its picture."""
    crop_token: Token = "class"
    """The class token, or the mean of the patch tokens."""
    crop_layer: int = -1
    """The block after which it is taken, from 0, or from the end if negative; after the last one the final norm."""
    crop_normalised: bool = False
    """Take vectors to unit length and compare their angles; else their distances, as published."""
    seeding: Seeding = "restarts"
    """Of k-means: the best of some random starts, or one k-means++ start."""
    stuff: Stuff = "regions"
    """Clusters of whitened patches, alone or seen together with the masks that they lie in, STEGO, or maps from a
    folder."""
    stego: str = "small"
    """Preset of STEGO."""
    stego_steps: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("side_px", "components", "thing_clusters", "stuff_clusters", "crop_px", "stego_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        closed = {"things": Things, "crop_background": Background, "crop_token": Token, "seeding": Seeding,
                  "stuff": Stuff}  # fmt: skip
        for name, kind in closed.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.stego not in STEGO_PRESETS:
            raise ConfigError(f"stego must be one of {', '.join(STEGO_PRESETS)}, got {self.stego!r}")
