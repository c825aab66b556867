"""Labelled pictures that help to name clusters and are not scored, whatever their set's own layout and classes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from pycocotools import mask as coco

from model.errors import ConfigError
from training.evaluation.datasets.ground_truth import (
    Annotation,
    GroundTruthDataset,
    GroundTruthLabels,
    GroundTruthObject,
)
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import CooccurrenceCounts, count_cooccurrences, evaluate_all, label_spaces
from training.evaluation.matching.cluster_matching import VoteThresholds
from training.evaluation.predictors import Predictor


@dataclass(frozen=True, kw_only=True)
class AuxiliaryCounts:
    """What they say."""

    truth: str
    """The name of their set."""
    digests: tuple[str, ...]
    """The sha256 of each photo's file."""
    tables: CooccurrenceCounts


@dataclass(frozen=True, kw_only=True)
class TranslatedAnnotation:
    """A label in the categories of another set; where it is a list of objects, they are painted, small over large."""

    annotation: Annotation
    places: dict[int, int]
    """Of categories in the other set's taxonomy, by their place in its own; those that it lacks become void."""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.annotation.files

    def read(self, height: int, width: int) -> GroundTruthLabels:
        known = self.annotation.read(height, width)
        objects = tuple(
            replace(each, category=self.places[each.category]) for each in known.objects if each.category in self.places
        )
        if known.label_map is None:
            segments = {number: each.category for number, each in enumerate(objects, start=1)}
            crowds = frozenset(number for number, each in enumerate(objects, start=1) if each.is_crowd)
            return GroundTruthLabels(
                label_map=_paint(objects, height, width), segments=segments, crowds=crowds, objects=objects
            )
        segments = {segment: self.places[place] for segment, place in known.segments.items() if place in self.places}
        return replace(known, segments=segments, objects=objects)


def count_auxiliary(
    source: Predictor, witnesses: GroundTruthDataset, truth: GroundTruthDataset, thresholds: VoteThresholds
) -> AuxiliaryCounts:
    """Hold the source against every picture of a set, counted in the categories of `truth`.

    Raises ConfigError if the sets share no category.
    """
    translated = translate_dataset(witnesses, truth.taxonomy)
    comparisons = evaluate_all(source, translated, "witnesses")
    tables = count_cooccurrences(comparisons, label_spaces(source, truth), thresholds)
    if translated.kind != "panoptic":  # things are laid alike in both maps
        tables = replace(tables, panoptic=tables.semantic)
    return AuxiliaryCounts(truth=witnesses.name, digests=tuple(each.digest for each in comparisons), tables=tables)


def translate_dataset(truth: GroundTruthDataset, taxonomy: Taxonomy) -> GroundTruthDataset:
    """The set in other categories: a category goes to that of its name, else to that of its group's name.

    Things stay things and stuff stays stuff. Raises ConfigError if none has a place, or no shape is known of objects.
    """
    if truth.kind == "boxes":
        raise ConfigError(f"{truth.name} knows objects by their boxes alone: pictures that help to name need masks")
    own = truth.taxonomy
    groups = own.groups or own.names
    places = {
        place: found
        for place, names in enumerate(zip(own.names, groups, strict=True))
        if (found := _find(names, taxonomy, is_thing=own.is_thing(place))) is not None
    }
    if not places:
        raise ConfigError(f"{truth.name} and the scored set have no category in common")
    pictures = tuple(
        replace(each, annotation=TranslatedAnnotation(annotation=each.annotation, places=places))
        for each in truth.images
    )
    return replace(truth, taxonomy=taxonomy, images=pictures)


def _find(names: Sequence[str], taxonomy: Taxonomy, *, is_thing: bool) -> int | None:
    """The place of the first of these names that the taxonomy has."""
    known = {name: place for place, name in enumerate(taxonomy.names) if taxonomy.is_thing(place) == is_thing}
    return next((known[name] for name in names if name in known), None)


def _paint(objects: Sequence[GroundTruthObject], height: int, width: int) -> Int32[np.ndarray, "H W"]:
    plane = np.zeros((height, width), np.int32)
    for number in sorted(range(len(objects)), key=lambda place: -objects[place].area):
        plane[coco.decode(objects[number].rle).astype(bool)] = number + 1
    return plane
