"""The codebook of pseudo-classes: how a feature becomes a cluster, in one file that later runs can take."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from model.errors import ConfigError, LabelStoreError
from model.files import atomic_write, hash_file, load_npz
from model.images import Letterbox, read_image, resize_labels, resize_map
from model.validation import reject_unknown_keys
from training.data.label_config import MAX_OBJECTS, CodebookConfig
from training.data.photos import PhotoFile
from training.pseudo_labels.consensus import FeatureProjections
from training.pseudo_labels.kmeans import kmeans, nearest_centroid, whiten
from training.pseudo_labels.maskcut import MaskProposals
from training.pseudo_labels.photo_features import PhotoFeatures
from training.pseudo_labels.refinement import refine_stuff

FORMAT_VERSION = 2
_HEAD, _PROJECTIONS = "head.", "views."


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
    score_thresholds: Float[np.ndarray, "O"] = field(default_factory=lambda: np.zeros(0))
    """Scores that leave 1, 2, … masks a photo in the mean."""
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Weights of STEGO's head, if stuff is its."""
    views: FeatureProjections | None = None
    """What a vote looks at, if it was fitted on one; older codebooks lack them."""

    @property
    def digest(self) -> str:
        """A hash of the content; the file's bytes also hold the time."""
        joined = hashlib.sha256()
        for name, array in sorted(self._list_arrays().items()):
            joined.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return joined.hexdigest()

    def write(self, path: Path) -> None:
        with atomic_write(path) as sibling, sibling.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **self._list_arrays())

    def _list_arrays(self) -> dict[str, np.ndarray]:
        facts = {"format_version": FORMAT_VERSION, **asdict(self.config)}
        names = ["mean", "projection", "things", "stuff", "inside"]
        names += ["parts", "salient", "score_thresholds"] if len(self.parts) else []
        arrays = {each: getattr(self, each) for each in names}
        arrays |= {_HEAD + name: array for name, array in self.head.items()}
        arrays |= {_PROJECTIONS + name: array for name, array in asdict(self.views).items()} if self.views else {}
        return arrays | {"facts": np.array(json.dumps(facts))}


def load_codebook(path: Path) -> Codebook:
    """Raises LabelStoreError if the file is missing, no codebook or of another version."""
    try:
        arrays = load_npz(path)
        facts: dict[str, Any] = json.loads(str(arrays.pop("facts")))
        if (version := facts.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"its format is version {version}, not {FORMAT_VERSION}")
        reject_unknown_keys(CodebookConfig, facts)
        head, views = (_take(arrays, start) for start in (_HEAD, _PROJECTIONS))
        seen = FeatureProjections(**views) if views else None
        return Codebook(config=CodebookConfig(**facts), head=head, views=seen, **arrays)
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise LabelStoreError(f"{path} is no codebook that can be read: {error}") from error


def _take(arrays: dict[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, under the rest of their names; they are gone from `arrays`."""
    return {name.removeprefix(start): arrays.pop(name) for name in list(arrays) if name.startswith(start)}


def merge_options(book: Codebook, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options completed by the codebook's own. Raises ConfigError if they contradict it."""
    own = asdict(book.config)
    if changed := sorted(name for name in own if name in options and options[name] != own[name]):
        told = ", ".join(f"{name} {own[name]}" for name in changed)
        raise ConfigError(f"the codebook was made with {told}: leave these options out, or fit another")
    return {**own, **options, "codebook": book.digest}


def extract_codebook_config(config: CodebookConfig) -> CodebookConfig:
    """The codebook's part of a larger configuration."""
    return CodebookConfig(**{each.name: getattr(config, each.name) for each in fields(CodebookConfig)})


_PATCH_CLUSTERS = 128
_MIN_TOKENS_PER_CLUSTER = 8
"""Of a part, in the mean."""
_MAX_CONSENSUS_SCORE = 9.0
"""What a vote comes to if its four views agree wholly and the contrast is one."""

ForegroundFunction = Callable[[PhotoFeatures], Bool[np.ndarray, "h w"]]
"""The patches of a photo that stand out in it."""


@dataclass(frozen=True, kw_only=True)
class ObjectnessScorer:
    """Kinds of patches, many more than stuff has clusters, and how often each stands out."""

    mean: Float[np.ndarray, "E"]
    projection: Float[np.ndarray, "E P"]
    parts: Float[np.ndarray, "K P"]
    salient: Float[np.ndarray, "K"]
    """The share of each kind's patches, over many photos, that are salient."""

    def judge(self, view: PhotoFeatures, found: MaskProposals) -> MaskProposals:
        """The masks of a vote, the likeliest things first, scored in 0..1.

        A score is the geometric mean of the vote's share of what it may come to and of the salience of the patches'
        kinds: sky and ground agree in all views, and hardly ever stand out.
        """
        whitened = whiten(view.join(), self.mean, self.projection)
        salience = self.salient[nearest_centroid(whitened, self.parts)]
        inside = found.binary
        likely = (inside * salience).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1)
        scores = np.sqrt(np.clip(found.scores / _MAX_CONSENSUS_SCORE, 0.0, 1.0) * likely)
        order = np.argsort(-scores, kind="stable")
        return MaskProposals(soft=found.soft[order], scores=scores[order].astype(np.float32))


def fit_objectness(
    sample: Float[np.ndarray, "N E"],
    mean: Float[np.ndarray, "E"],
    projection: Float[np.ndarray, "E P"],
    views: Iterable[PhotoFeatures],
    salient: ForegroundFunction,
    seed: int,
) -> ObjectnessScorer:
    """Kinds of patches out of a sample of tokens, and how salient they are in some photos."""
    whitened = whiten(sample, mean, projection)
    parts = kmeans(whitened, min(_PATCH_CLUSTERS, max(1, len(whitened) // _MIN_TOKENS_PER_CLUSTER)), seed)
    counts = np.zeros((2, len(parts)), np.int64)
    for view in views:
        kinds = nearest_centroid(whiten(view.join(), mean, projection), parts)
        counts[0] += np.bincount(kinds.ravel(), minlength=len(parts))
        counts[1] += np.bincount(kinds[salient(view)], minlength=len(parts))
    shares = counts[1] / np.maximum(counts[0], 1)
    return ObjectnessScorer(mean=mean, projection=projection, parts=parts, salient=shares)


def compute_score_thresholds(scores: Sequence[Float[np.ndarray, "N"]]) -> Float[np.ndarray, "M"]:
    """The scores that leave 1, 2, … masks a photo in the mean, as many as a photo may hold."""
    ranked = np.sort(np.concatenate(scores))[::-1]
    if not len(ranked):
        return np.zeros(MAX_OBJECTS)
    places = np.arange(1, 1 + MAX_OBJECTS) * len(scores) - 1
    least: Float[np.ndarray, "M"] = ranked[np.minimum(places, len(ranked) - 1)]
    return least


_SUFFIXES = (".npy", ".png")
_NO_CLUSTER = 255
"""In a file: no cluster here; so is -1."""


class StuffSegmenter(Protocol):
    """Whatever says which stuff cluster lies where; clusters count from 1, 0 is none."""

    def label_pixels(self, view: PhotoFeatures) -> Int32[np.ndarray, "H W"]:
        """In the photo's own size."""
        ...

    def label_patches(self, view: PhotoFeatures) -> Int[np.ndarray, "h w"]:
        """One a patch that shows the photo."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClusterStuffSegmenter:
    """The centroid that a patch's token is most similar to."""

    embed: Callable[[PhotoFeatures], Float[np.ndarray, "h w D"]]
    centroids: Float[np.ndarray, "S D"]
    """Of unit length."""
    has_crf: bool = False
    """Move borders by a dense CRF."""

    def label_pixels(self, view: PhotoFeatures) -> Int32[np.ndarray, "H W"]:
        tokens = self.embed(view)
        if not self.has_crf:
            return segment_stuff(tokens, self.centroids, view.patch_px, view.letterbox)
        cosines = (tokens / np.linalg.norm(tokens, axis=-1, keepdims=True).clip(1e-12)) @ self.centroids.T
        return refine_stuff(read_image(view.photo.path).image, cosines, view.patch_px, view.letterbox)

    def label_patches(self, view: PhotoFeatures) -> Int[np.ndarray, "h w"]:
        nearest: Int[np.ndarray, "h w"] = (self.embed(view) @ self.centroids.T).argmax(-1) + 1
        return nearest


@dataclass(frozen=True, kw_only=True)
class PrecomputedStuff:
    """Maps of one folder, `.npy` or one-channel `.png`, a photo's under its name but for the suffix.

    Values are clusters counted from 0; -1 and 255 are none.
    """

    folder: Path
    clusters: int

    def label_pixels(self, view: PhotoFeatures) -> Int32[np.ndarray, "H W"]:
        """Raises LabelStoreError if the map is missing, broken, of another size or has other clusters."""
        photo, path = view.photo, self._find(view.photo)
        stored = _read_map(path)
        if stored.shape != (photo.height, photo.width):
            raise LabelStoreError(f"{path} is {stored.shape}, its photo {(photo.height, photo.width)}: (height, width)")
        is_none = (stored == _NO_CLUSTER) | (stored == -1)
        clusters = stored[~is_none]
        if clusters.size and not 0 <= clusters.min() <= clusters.max() < self.clusters:
            raise LabelStoreError(
                f"{path} holds clusters {clusters.min()} to {clusters.max()}: of {self.clusters} stuff clusters, "
                f"0 to {self.clusters - 1} were expected (and -1 or {_NO_CLUSTER} for none)"
            )
        return np.where(is_none, 0, stored.astype(np.int32) + 1).astype(np.int32)

    def label_patches(self, view: PhotoFeatures) -> Int[np.ndarray, "h w"]:
        rows, columns = (-(-length // view.patch_px) for length in view.letterbox.size)
        return resize_labels(self.label_pixels(view), rows, columns)

    def hash_map(self, photo: PhotoFile) -> str:
        """Over the bytes of the photo's map."""
        return hash_file(self._find(photo))

    def _find(self, photo: PhotoFile) -> Path:
        base = self.folder / PurePosixPath(photo.name)
        found = [path for suffix in _SUFFIXES if (path := base.with_suffix(suffix)).is_file()]
        if len(found) != 1:
            held = "both" if found else "neither"
            raise LabelStoreError(
                f"{self.folder} has {held} of {base.stem}.npy and {base.stem}.png for the photo {photo.name}: "
                "give one map a photo"
            )
        return found[0]


def segment_stuff(
    tokens: Float[np.ndarray, "h w P"], centroids: Float[np.ndarray, "S P"], patch_px: int, letterbox: Letterbox
) -> Int32[np.ndarray, "H W"]:
    """The stuff cluster of every pixel of the photo, counted from 1.

    Similarities are enlarged before the best is taken: borders run between patches and not along them.
    """
    similarities = tokens @ centroids.T
    height, width = tokens.shape[0] * patch_px, tokens.shape[1] * patch_px
    best = np.full((letterbox.height, letterbox.width), -np.inf, np.float32)
    winners = np.zeros(best.shape, np.int32)
    for index in np.unique(similarities.argmax(-1)):
        plane = np.ascontiguousarray(similarities[..., index], dtype=np.float32)
        placed = resize_map(plane, height, width)[: letterbox.resized_height, : letterbox.resized_width]
        challenger = resize_map(placed, letterbox.height, letterbox.width)
        winners[challenger > best] = index + 1
        np.maximum(best, challenger, out=best)
    return winners


def _read_map(path: Path) -> Int[np.ndarray, "H W"]:
    try:
        if path.suffix == ".npy":
            stored = np.load(path, allow_pickle=False)
        else:
            stored = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, ValueError, EOFError, cv2.error) as error:
        raise LabelStoreError(f"{path} is no label map: {error}") from error
    if stored is None or stored.ndim != 2 or not np.issubdtype(stored.dtype, np.integer):
        raise LabelStoreError(f"{path} is no label map: expected whole numbers, height x width")
    return np.asarray(stored)


def smooth_with_masks(tokens: Float[np.ndarray, "h w P"], found: MaskProposals) -> Float[np.ndarray, "h w P"]:
    """Tokens of unit length, each half itself and half the mean of the masks that it lies in; of unit length again.

    The masks of a patch count by the squares of their scores; a patch in none stays as it is.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    inside = found.binary.reshape(len(found.soft), len(flat)).astype(np.float32)
    means = (inside @ flat) / np.maximum(inside.sum(1, keepdims=True), 1.0)
    weights = inside * np.maximum(found.scores, 0.0)[:, None] ** 2
    blended: Float[np.ndarray, "h w P"] = (flat + _l2_normalize(weights.T @ means)).reshape(tokens.shape)
    return _l2_normalize(blended)


def _l2_normalize(vectors: Float[np.ndarray, "*N P"]) -> Float[np.ndarray, "*N P"]:
    unit: Float[np.ndarray, "*N P"] = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit
