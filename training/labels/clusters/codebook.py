"""The codebook of pseudo-classes: how a feature becomes a cluster, in one file that later runs can take."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from model.contract import reject_unknown
from model.errors import ConfigError, LabelStoreError
from model.files import read_arrays, replace_file
from training.labels.clusters.codebook_recipe import CodebookConfig
from training.labels.clusters.views import TokenViews

FORMAT_VERSION = 2
_HEAD, _VIEWS = "head.", "views."


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Clusters are rows, counted from 0."""

    config: CodebookConfig
    mean: Float[np.ndarray, "E"]
    projection: Float[np.ndarray, "E P"]
    """Principal axes, each divided by its deviation."""
    things: Float[np.ndarray, "K D"]
    stuff: Float[np.ndarray, "S D"]
    """Of unit length; S is 0 where stuff comes as maps."""
    inside: Float[np.ndarray, "S"]
    """The share of each stuff cluster's patches that lie in masks, over the photos that it was fitted on."""
    parts: Float[np.ndarray, "M P"] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Kinds of patches, finer than stuff; none but for a vote, as the next two."""
    salient: Float[np.ndarray, "M"] = field(default_factory=lambda: np.zeros(0))
    """The share of each kind's patches that MaskCut takes for objects."""
    least_scores: Float[np.ndarray, "O"] = field(default_factory=lambda: np.zeros(0))
    """Scores that leave 1, 2, … masks a photo in the mean."""
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Weights of STEGO's head, if stuff is its."""
    views: TokenViews | None = None
    """What a vote looks at, if it was fitted on one; older codebooks lack them."""

    @property
    def digest(self) -> str:
        """A hash of the content; the file's bytes also hold the time."""
        joined = hashlib.sha256()
        for name, array in sorted(self._list_arrays().items()):
            joined.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return joined.hexdigest()

    def write(self, path: Path) -> None:
        with replace_file(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **self._list_arrays())

    def _list_arrays(self) -> dict[str, np.ndarray]:
        facts = {"format_version": FORMAT_VERSION, **asdict(self.config)}
        names = ["mean", "projection", "things", "stuff", "inside"]
        names += ["parts", "salient", "least_scores"] if len(self.parts) else []
        arrays = {each: getattr(self, each) for each in names}
        arrays |= {_HEAD + name: array for name, array in self.head.items()}
        arrays |= {_VIEWS + name: array for name, array in asdict(self.views).items()} if self.views else {}
        return arrays | {"facts": np.array(json.dumps(facts))}


def read_codebook(path: Path) -> Codebook:
    """Raises LabelStoreError if the file is missing, no codebook or of another version."""
    try:
        arrays = read_arrays(path)
        facts: dict[str, Any] = json.loads(str(arrays.pop("facts")))
        if (version := facts.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"its format is version {version}, not {FORMAT_VERSION}")
        reject_unknown(facts, CodebookConfig)
        head, views = (_take(arrays, start) for start in (_HEAD, _VIEWS))
        seen = TokenViews(**views) if views else None
        return Codebook(config=CodebookConfig(**facts), head=head, views=seen, **arrays)
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise LabelStoreError(f"{path} is no codebook that can be read: {error}") from error


def _take(arrays: dict[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, under the rest of their names; they are gone from `arrays`."""
    return {name.removeprefix(start): arrays.pop(name) for name in list(arrays) if name.startswith(start)}


def adopt(book: Codebook, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options completed by the codebook's own. Raises ConfigError if they contradict it."""
    own = asdict(book.config)
    if changed := sorted(name for name in own if name in options and options[name] != own[name]):
        told = ", ".join(f"{name} {own[name]}" for name in changed)
        raise ConfigError(f"the codebook was made with {told}: leave these options out, or fit another")
    return {**own, **options, "codebook": book.digest}


def select_config(config: CodebookConfig) -> CodebookConfig:
    """The codebook's part of a larger configuration."""
    return CodebookConfig(**{each.name: getattr(config, each.name) for each in fields(CodebookConfig)})
