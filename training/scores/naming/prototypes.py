"""Names for clusters from a few labelled regions: each takes the category whose regions look most like it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from pycocotools import mask as coco

from model.contract import Category
from model.errors import ConfigError
from model.files import hash_file
from model.pixels import read_photo
from model.weights.checkpoints import load_encoder
from training.features import fill_cache, open_cache
from training.labels.clusters.codebook import Codebook, read_codebook
from training.labels.clusters.descriptors import RegionDescriber
from training.labels.clusters.photo_view import open_view
from training.labels.store import LabelStore
from training.photos import PhotoFile
from training.progress import show
from training.scores.meetings.comparison import hash_photo
from training.scores.naming.names import Match, Names, describe_photos
from training.scores.sets.truth import TrueLabels, Truth, TruthPicture

PATCH_STUFF = ("regions", "kmeans")
"""Whose clusters lie where patches do: blended with its own region, a region's patches keep its mean direction."""
LEAST_COSINE = 0.0
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


def name_by_regions(store: LabelStore, truth: Truth, count: int, seed: int, features: Path) -> Names:
    """Names for the clusters of the store's codebook, from `count` regions of the set.

    Raises ConfigError if the set knows no masks, or if the codebook's clusters are not of whitened patches.
    """
    config, book = store.read_config(), read_codebook(store.codebook)
    if book.config.things != "region" or book.config.stuff not in PATCH_STUFF:
        raise ConfigError(f"names by likeness need clusters of patches: things by region, stuff by {PATCH_STUFF}")
    regions = draw_regions(truth, count, seed)
    cache = open_cache(features, config.encoder_hash, config.side_px)
    photos = list({region.photo.digest: region.photo for region in regions}.values())
    fill_cache(cache, photos, load_encoder(config.encoder, config.side_px), config.side_px)
    describer = RegionDescriber(mean=book.mean, projection=book.projection)
    vectors = [
        describer.describe(view, view.cover(region.mask)[None])[0]
        for region in show(regions, "describe", unit="region")
        for view in [open_view(cache, region.photo, config.side_px)]
    ]
    prototypes = average([region.category for region in regions], vectors)
    return Names(
        source=hash_file(store.codebook),
        method="prototypes",
        thresholds=None,
        fitted_on=describe_photos(f"{len(regions)} regions of {truth.name}", [photo.digest for photo in photos]),
        thing_clusters=len(book.things),
        stuff_clusters=len(book.stuff),
        things=truth.taxonomy.things,
        categories=tuple(Category(id=number, name=name) for number, name in enumerate(truth.taxonomy.names, start=1)),
        clusters=name_clusters(book, prototypes, truth.taxonomy.things),
    )


def draw_regions(truth: Truth, count: int, seed: int) -> list[Region]:
    """`count` regions, or all if there are fewer: category by category in turn, so that each has some.

    One of a category and picture, the largest; groups are left out. Raises ConfigError if the set knows no masks.
    """
    if truth.kind == "boxes":
        raise ConfigError(f"{truth.name} has boxes alone: names need regions with a mask")
    found: dict[int, list[Region]] = {}
    order = np.random.default_rng(seed).permutation(len(truth.pictures))
    for place in show(order.tolist(), "regions", unit="picture"):
        picture = truth.pictures[place]
        photo = _inspect(picture)
        for category, mask in _list_masks(picture.annotation.read(photo.height, photo.width)).items():
            if len(found.setdefault(category, [])) < count:
                found[category].append(Region(photo=photo, category=category, mask=mask))
    turns = range(max(map(len, found.values()), default=0))
    return [found[each][turn] for turn in turns for each in sorted(found) if turn < len(found[each])][:count]


def average(categories: Sequence[int], vectors: Iterable[Float[np.ndarray, "P"]]) -> dict[int, Prototype]:
    """The prototype of each category that has a region."""
    seen: dict[int, list[Float[np.ndarray, "P"]]] = {}
    for category, vector in zip(categories, vectors, strict=True):
        seen.setdefault(category, []).append(vector)
    sums = {category: np.sum(each, axis=0) for category, each in seen.items()}
    return {
        category: Prototype(vector=total / np.linalg.norm(total).clip(1e-12), regions=len(seen[category]))
        for category, total in sums.items()
    }


def name_clusters(book: Codebook, prototypes: dict[int, Prototype], things: int) -> dict[int, Match]:
    """The category of each cluster's nearest prototype, things among things and stuff among stuff.

    `share` is the cosine, `met` the number of the category's regions.
    """
    matches = {}
    for number, vector in enumerate([*book.things, *book.stuff], start=1):
        is_thing = number <= len(book.things)
        cosines = {
            each: float(vector @ known.vector) for each, known in prototypes.items() if (each < things) == is_thing
        }
        best = max(cosines, key=cosines.__getitem__, default=None)
        if best is None or cosines[best] < LEAST_COSINE:
            matches[number] = Match(category=None, share=0.0, met=0)
        else:
            matches[number] = Match(category=best + 1, share=round(cosines[best], 4), met=prototypes[best].regions)
    return matches


def _inspect(picture: TruthPicture) -> PhotoFile:
    height, width = read_photo(picture.path).image.shape[:2]
    digest = hash_photo(picture)
    return PhotoFile(path=picture.path, name=picture.path.name, digest=digest, height=height, width=width)


def _list_masks(labels: TrueLabels) -> dict[int, Bool[np.ndarray, "H W"]]:
    """The largest region of each category."""
    if labels.label_map is not None:
        kept = [each for each in labels.segments if each not in labels.crowds]
        masks = [(labels.segments[each], labels.label_map == each) for each in kept]
    else:
        objects = [each for each in labels.objects if not each.is_crowd and each.rle is not None]
        masks = [(each.category, coco.decode(each.rle).astype(bool)) for each in objects]
    return {category: mask for category, mask in sorted(masks, key=lambda each: int(each[1].sum())) if mask.any()}
