"""Matches clusters to categories from a few labeled regions: each cluster takes the most similar category."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from pycocotools import mask as coco

from model.checkpoints.dino import load_encoder
from model.errors import ConfigError
from model.files import hash_file
from model.images import read_image
from model.progress import track
from training.data.dataset import PseudoLabelDataset
from training.data.features import FeatureStore
from training.data.photos import PhotoFile
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage, GroundTruthLabels
from training.evaluation.image_results import hash_photo
from training.evaluation.matching.mapping_file import (
    ClusterAssignment,
    ClusterMapping,
    fingerprint_photos,
    list_categories,
)
from training.pseudo_labels.codebook import Codebook, load_codebook

PATCH_STUFF = ("regions", "kmeans")
"""Stuff methods whose clusters lie in the space of patch embeddings. For `regions` this holds because blending a
region's patches with the region itself keeps their mean direction."""
MIN_COSINE = 0.0
"""A cluster below it is more similar to the mean of all photos than to any category."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A labeled region of a photo."""

    photo: PhotoFile
    category: int
    """Category index in the taxonomy."""
    mask: Bool[np.ndarray, "H W"]


@dataclass(frozen=True, kw_only=True)
class Prototype:
    """The mean embedding of the regions of one category."""

    vector: Float[np.ndarray, "P"]
    """Unit length."""
    regions: int


def match_by_regions(
    labels: PseudoLabelDataset, dataset: GroundTruthDataset, count: int, seed: int, features: Path
) -> ClusterMapping:
    """Return a mapping for the clusters of the pseudo-labels' codebook, from up to `count` regions of the dataset.

    Raises ConfigError if the dataset has no masks, or if the codebook's clusters are not in the space of patches.
    """
    config, codebook = labels.read_config(), load_codebook(labels.codebook)
    if codebook.config.stuff not in PATCH_STUFF:
        raise ConfigError(
            f"matching by regions needs clusters of patch embeddings: stuff by {' or '.join(PATCH_STUFF)}"
        )
    regions = sample_regions(dataset, count, seed)
    encoder = load_encoder(config.encoder, config.side_px)
    store = FeatureStore.open(features, encoder, config.encoder_hash, config)
    photos = list({region.photo.digest: region.photo for region in regions}.values())
    store.fill_all(photos)
    vectors = [
        codebook.embed_masks(photo_features, photo_features.patches_in_mask(region.mask)[None])[0]
        for region in track(regions, "embed", unit="region")
        for photo_features in [store.load(region.photo)]
    ]
    prototypes = mean_prototypes([region.category for region in regions], vectors)
    name = f"{len(regions)} regions of {dataset.name}"
    return ClusterMapping(
        source=hash_file(labels.codebook),
        method="prototypes",
        matching=None,
        fitted_on=fingerprint_photos(name, [photo.digest for photo in photos]),
        thing_clusters=len(codebook.thing_centroids),
        stuff_clusters=len(codebook.stuff_centroids),
        num_things=dataset.taxonomy.num_things,
        categories=list_categories(dataset.taxonomy),
        clusters=match_prototypes(codebook, prototypes, dataset.taxonomy.num_things),
    )


def sample_regions(dataset: GroundTruthDataset, count: int, seed: int) -> list[Region]:
    """Return up to `count` regions, taking categories in turn so that each has some.

    At most one region per category and image, the largest; crowds are left out.
    Raises ConfigError if the dataset has no masks.
    """
    if dataset.kind == "boxes":
        raise ConfigError(f"{dataset.name} has only boxes: matching by regions needs masks")
    found: dict[int, list[Region]] = {}
    order = np.random.default_rng(seed).permutation(len(dataset.images))
    for position in track(order.tolist(), "regions", unit="image"):
        image = dataset.images[position]
        photo = _inspect(image)
        for category, mask in _largest_masks(image.annotation.read(photo.height, photo.width)).items():
            if len(found.setdefault(category, [])) < count:
                found[category].append(Region(photo=photo, category=category, mask=mask))
    turns = range(max(map(len, found.values()), default=0))
    return [found[category][turn] for turn in turns for category in sorted(found) if turn < len(found[category])][
        :count
    ]


def mean_prototypes(categories: Sequence[int], vectors: Iterable[Float[np.ndarray, "P"]]) -> dict[int, Prototype]:
    """Return the prototype of each category that has a region."""
    grouped: dict[int, list[Float[np.ndarray, "P"]]] = {}
    for category, vector in zip(categories, vectors, strict=True):
        grouped.setdefault(category, []).append(vector)
    sums = {category: np.sum(group, axis=0) for category, group in grouped.items()}
    return {
        category: Prototype(vector=total / np.linalg.norm(total).clip(1e-12), regions=len(grouped[category]))
        for category, total in sums.items()
    }


def match_prototypes(
    codebook: Codebook, prototypes: dict[int, Prototype], num_things: int
) -> dict[int, ClusterAssignment]:
    """Assign each cluster the category of the nearest prototype, things among things and stuff among stuff."""
    assignments = {}
    for cluster, vector in enumerate([*codebook.thing_centroids, *codebook.stuff_centroids], start=1):
        is_thing = cluster <= len(codebook.thing_centroids)
        cosines = {
            category: float(vector @ prototype.vector)
            for category, prototype in prototypes.items()
            if (category < num_things) == is_thing
        }
        best = max(cosines, key=cosines.__getitem__, default=None)
        if best is None or cosines[best] < MIN_COSINE:
            assignments[cluster] = ClusterAssignment(category=None, purity=0.0, support=0)
        else:
            purity, support = round(cosines[best], 4), prototypes[best].regions
            assignments[cluster] = ClusterAssignment(category=best + 1, purity=purity, support=support)
    return assignments


def _inspect(image: GroundTruthImage) -> PhotoFile:
    height, width = read_image(image.path).image.shape[:2]
    return PhotoFile(path=image.path, name=image.path.name, digest=hash_photo(image), height=height, width=width)


def _largest_masks(labels: GroundTruthLabels) -> dict[int, Bool[np.ndarray, "H W"]]:
    """Return the largest region of each category."""
    if labels.label_map is not None:
        kept = [segment for segment in labels.segments if segment not in labels.crowds]
        masks = [(labels.segments[segment], labels.label_map == segment) for segment in kept]
    else:
        objects = [each for each in labels.objects if not each.is_crowd and each.rle is not None]
        masks = [(each.category, coco.decode(each.rle).astype(bool)) for each in objects]
    return {category: mask for category, mask in sorted(masks, key=lambda each: int(each[1].sum())) if mask.any()}
