"""Names for clusters from a few labelled regions: each takes the category whose regions look most like it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from pycocotools import mask as coco

from model.checkpoints.state_dicts import load_encoder
from model.contract import Category
from model.errors import ConfigError
from model.files import hash_file
from model.images import read_image
from training.data.dataset import PseudoLabelDataset
from training.data.features import fill_cache, open_cache
from training.data.photos import PhotoFile
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage, GroundTruthLabels
from training.evaluation.image_results import hash_photo
from training.evaluation.matching.mapping_file import ClusterAssignment, ClusterMapping, fingerprint_photos
from training.progress import track
from training.pseudo_labels.codebook import Codebook, load_codebook
from training.pseudo_labels.mask_embeddings import MaskedAveragePoolEmbedder
from training.pseudo_labels.photo_features import load_photo_features

PATCH_STUFF = ("regions", "kmeans")
"""Whose clusters lie where patches do: blended with its own region, a region's patches keep its mean direction."""
MIN_COSINE = 0.0
"""Below, a cluster is nearer to the mean of all photos than to any category."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A labelled region of a photo."""

    photo: PhotoFile
    category: int
    """Its place in the taxonomy."""
    mask: Bool[np.ndarray, "H W"]


@dataclass(frozen=True, kw_only=True)
class Prototype:
    """How the regions of one category look."""

    vector: Float[np.ndarray, "P"]
    """Of unit length."""
    regions: int


def match_by_regions(
    store: PseudoLabelDataset, truth: GroundTruthDataset, count: int, seed: int, features: Path
) -> ClusterMapping:
    """Names for the clusters of the store's codebook, from `count` regions of the set.

    Raises ConfigError if the set knows no masks, or if the codebook's clusters are not of whitened patches.
    """
    config, book = store.read_config(), load_codebook(store.codebook)
    if book.config.things != "region" or book.config.stuff not in PATCH_STUFF:
        raise ConfigError(f"names by likeness need clusters of patches: things by region, stuff by {PATCH_STUFF}")
    regions = sample_regions(truth, count, seed)
    cache = open_cache(features, config.encoder_hash, config.side_px)
    photos = list({region.photo.digest: region.photo for region in regions}.values())
    fill_cache(cache, photos, load_encoder(config.encoder, config.side_px), config.side_px)
    describer = MaskedAveragePoolEmbedder(mean=book.mean, projection=book.projection)
    vectors = [
        describer.embed(view, view.cover(region.mask)[None])[0]
        for region in track(regions, "describe", unit="region")
        for view in [load_photo_features(cache, region.photo, config.side_px)]
    ]
    prototypes = mean_prototypes([region.category for region in regions], vectors)
    return ClusterMapping(
        source=hash_file(store.codebook),
        method="prototypes",
        thresholds=None,
        fitted_on=fingerprint_photos(f"{len(regions)} regions of {truth.name}", [photo.digest for photo in photos]),
        thing_clusters=len(book.things),
        stuff_clusters=len(book.stuff),
        things=truth.taxonomy.things,
        categories=tuple(Category(id=number, name=name) for number, name in enumerate(truth.taxonomy.names, start=1)),
        clusters=match_prototypes(book, prototypes, truth.taxonomy.things),
    )


def sample_regions(truth: GroundTruthDataset, count: int, seed: int) -> list[Region]:
    """`count` regions, or all if there are fewer: category by category in turn, so that each has some.

    One of a category and picture, the largest; groups are left out. Raises ConfigError if the set knows no masks.
    """
    if truth.kind == "boxes":
        raise ConfigError(f"{truth.name} has boxes alone: names need regions with a mask")
    found: dict[int, list[Region]] = {}
    order = np.random.default_rng(seed).permutation(len(truth.images))
    for place in track(order.tolist(), "regions", unit="picture"):
        picture = truth.images[place]
        photo = _inspect(picture)
        for category, mask in _list_masks(picture.annotation.read(photo.height, photo.width)).items():
            if len(found.setdefault(category, [])) < count:
                found[category].append(Region(photo=photo, category=category, mask=mask))
    turns = range(max(map(len, found.values()), default=0))
    return [found[each][turn] for turn in turns for each in sorted(found) if turn < len(found[each])][:count]


def mean_prototypes(categories: Sequence[int], vectors: Iterable[Float[np.ndarray, "P"]]) -> dict[int, Prototype]:
    """The prototype of each category that has a region."""
    seen: dict[int, list[Float[np.ndarray, "P"]]] = {}
    for category, vector in zip(categories, vectors, strict=True):
        seen.setdefault(category, []).append(vector)
    sums = {category: np.sum(each, axis=0) for category, each in seen.items()}
    return {
        category: Prototype(vector=total / np.linalg.norm(total).clip(1e-12), regions=len(seen[category]))
        for category, total in sums.items()
    }


def match_prototypes(book: Codebook, prototypes: dict[int, Prototype], things: int) -> dict[int, ClusterAssignment]:
    """The category of each cluster's nearest prototype, things among things and stuff among stuff.

    `purity` is the cosine, `support` the number of the category's regions.
    """
    matches = {}
    for number, vector in enumerate([*book.things, *book.stuff], start=1):
        is_thing = number <= len(book.things)
        cosines = {
            each: float(vector @ known.vector) for each, known in prototypes.items() if (each < things) == is_thing
        }
        best = max(cosines, key=cosines.__getitem__, default=None)
        if best is None or cosines[best] < MIN_COSINE:
            matches[number] = ClusterAssignment(category=None, purity=0.0, support=0)
        else:
            matches[number] = ClusterAssignment(
                category=best + 1, purity=round(cosines[best], 4), support=prototypes[best].regions
            )
    return matches


def _inspect(picture: GroundTruthImage) -> PhotoFile:
    height, width = read_image(picture.path).image.shape[:2]
    digest = hash_photo(picture)
    return PhotoFile(path=picture.path, name=picture.path.name, digest=digest, height=height, width=width)


def _list_masks(labels: GroundTruthLabels) -> dict[int, Bool[np.ndarray, "H W"]]:
    """The largest region of each category."""
    if labels.label_map is not None:
        kept = [each for each in labels.segments if each not in labels.crowds]
        masks = [(labels.segments[each], labels.label_map == each) for each in kept]
    else:
        objects = [each for each in labels.objects if not each.is_crowd and each.rle is not None]
        masks = [(each.category, coco.decode(each.rle).astype(bool)) for each in objects]
    return {category: mask for category, mask in sorted(masks, key=lambda each: int(each[1].sum())) if mask.any()}
