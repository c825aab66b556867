"""Auxiliary images: labeled images of another dataset that help to match clusters and are not evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from model.errors import ConfigError
from training.evaluation.datasets.ground_truth import (
    Annotation,
    GroundTruthDataset,
    GroundTruthLabels,
)
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import evaluate_all
from training.evaluation.matching.cluster_matching import (
    CooccurrenceCounts,
    MatchingConfig,
    count_cooccurrences,
    label_spaces,
)
from training.evaluation.predictors import Predictor


@dataclass(frozen=True, kw_only=True)
class AuxiliaryCounts:
    """Co-occurrence counts of auxiliary images, in the categories of the evaluated dataset."""

    dataset: str
    """Name of their dataset."""
    digests: tuple[str, ...]
    """sha256 of each image file."""
    counts: CooccurrenceCounts
    examples: tuple[tuple[tuple[int, ...], Float32[np.ndarray, "S E"]], ...] = ()
    """Category indices and embeddings of the labeled segments of each image, if the network has embeddings."""


@dataclass(frozen=True, kw_only=True)
class TranslatedAnnotation:
    """A label in the categories of another dataset. Lists of objects become a label map, small objects on top."""

    annotation: Annotation
    categories: dict[int, int]
    """Category index in the other taxonomy by category index in its own; categories that are not listed become void."""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.annotation.files

    def read(self, height: int, width: int) -> GroundTruthLabels:
        labels = self.annotation.read(height, width)
        objects = tuple(
            replace(each, category=self.categories[each.category])
            for each in labels.objects
            if each.category in self.categories
        )
        if labels.label_map is None:
            return replace(labels, objects=objects).draw_segments(height, width)
        segments = {
            segment: self.categories[index] for segment, index in labels.segments.items() if index in self.categories
        }
        return replace(labels, segments=segments, objects=objects)


def count_auxiliary(
    predictor: Predictor, auxiliary: GroundTruthDataset, dataset: GroundTruthDataset, config: MatchingConfig
) -> AuxiliaryCounts:
    """Evaluate every auxiliary image and count co-occurrences in the categories of `dataset`.

    Raises ConfigError if the datasets share no category.
    """
    translated = translate_dataset(auxiliary, dataset.taxonomy)
    results = evaluate_all(predictor, translated, "auxiliary images")
    counts = count_cooccurrences(results, label_spaces(predictor, dataset), config)
    if translated.kind != "panoptic":  # the semantic map has the same things as the panoptic map
        counts = replace(counts, panoptic=counts.semantic)
    digests = tuple(result.digest for result in results)
    examples = tuple(
        (each.labeled_categories, each.labeled_embeddings) for each in results if each.labeled_embeddings is not None
    )
    return AuxiliaryCounts(dataset=auxiliary.name, digests=digests, counts=counts, examples=examples)


def translate_dataset(dataset: GroundTruthDataset, taxonomy: Taxonomy) -> GroundTruthDataset:
    """Return the dataset in other categories: each becomes the category of its name, or of its supercategory's name.

    Things stay things and stuff stays stuff. Raises ConfigError if no category is shared, or if objects have only
    boxes.
    """
    if dataset.kind == "boxes":
        raise ConfigError(f"{dataset.name} has only boxes: auxiliary images need masks")
    own = dataset.taxonomy
    groups = own.groups or own.names
    categories = {
        index: found
        for index, names in enumerate(zip(own.names, groups, strict=True))
        if (found := _find_category(names, taxonomy, is_thing=own.is_thing(index))) is not None
    }
    if not categories:
        raise ConfigError(f"{dataset.name} and the evaluated dataset have no category in common")
    images = tuple(
        replace(image, annotation=TranslatedAnnotation(annotation=image.annotation, categories=categories))
        for image in dataset.images
    )
    return replace(dataset, taxonomy=taxonomy, images=images)


def _find_category(names: Sequence[str], taxonomy: Taxonomy, *, is_thing: bool) -> int | None:
    """Return the category index of the first of these names that the taxonomy has."""
    known = {name: index for index, name in enumerate(taxonomy.names) if taxonomy.is_thing(index) == is_thing}
    return next((known[name] for name in names if name in known), None)
