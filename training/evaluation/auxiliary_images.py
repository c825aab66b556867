"""Auxiliary images: labeled images of another dataset that help to match clusters and are not evaluated."""

from dataclasses import dataclass, replace
from pathlib import Path

from model.errors import ConfigError
from training.evaluation.datasets.dataset_spec import DatasetFormat, DatasetSpec
from training.evaluation.datasets.ground_truth import (
    Annotation,
    GroundTruthDataset,
    GroundTruthLabels,
)
from training.evaluation.datasets.taxonomy import Taxonomy
from training.evaluation.image_results import ImageResult, evaluate_all, hash_photo
from training.evaluation.predictors import Predictor, load_predictor


@dataclass(frozen=True, kw_only=True)
class AuxiliaryImages:
    """Auxiliary images, in the categories of the evaluated dataset."""

    dataset: GroundTruthDataset
    pseudo_labels: Predictor | None = None
    """Of these images, in place of a predictor that only knows the evaluated ones."""

    def evaluate(self, predictor: Predictor) -> list[ImageResult]:
        """Evaluate every image. Raises ConfigError if the pseudo-labels have other clusters than the predictor."""
        if self.pseudo_labels and self.pseudo_labels.digest != predictor.digest:
            raise ConfigError("--aux-labels have other clusters: label both datasets with one codebook")
        results = evaluate_all(self.pseudo_labels or predictor, self.dataset)
        # Where only objects are labeled, the semantic map stands for the panoptic map: it has the same things.
        return [replace(each, panoptic=each.panoptic or each.semantic) for each in results]


@dataclass(frozen=True, kw_only=True)
class AuxiliarySpec:
    """Which labeled images help to match clusters."""

    aux_dataset: Path
    """An auxiliary dataset, file or folder: its images help to match clusters and are not evaluated."""
    aux_format: DatasetFormat | None = None
    """Layout of the auxiliary dataset, as --format."""
    aux_labels: Path | None = None
    """Pseudo-labels of the auxiliary images, if PREDICTOR is pseudo-labels."""

    def read(self, dataset: GroundTruthDataset, threads: int) -> AuxiliaryImages:
        """Raises ConfigError if it shares an image or no category with the dataset, or if it has only boxes."""
        translated = translate_dataset(
            DatasetSpec(folder=self.aux_dataset, format=self.aux_format).read(), dataset.taxonomy
        )
        digests = {hash_photo(image) for image in dataset.images}
        if shared := sum(hash_photo(image) in digests for image in translated.images):
            raise ConfigError(f"{shared} auxiliary images are images of the dataset itself: remove them")
        labels = load_predictor(self.aux_labels, threads=threads) if self.aux_labels else None
        return AuxiliaryImages(dataset=translated, pseudo_labels=labels)


@dataclass(frozen=True, kw_only=True)
class TranslatedAnnotation(Annotation):
    """A label in the categories of another dataset. Lists of objects become a label map, small objects on top."""

    annotation: Annotation
    categories: dict[int, int]
    """Category index in the other taxonomy by category index in its own; categories that are not listed become void."""

    def read(self, height: int, width: int) -> GroundTruthLabels:
        labels = self.annotation.read(height, width)
        objects = tuple(
            replace(each, category=self.categories[each.category])
            for each in labels.objects
            if each.category in self.categories
        )
        segments = {
            segment: self.categories[index] for segment, index in labels.segments.items() if index in self.categories
        }
        return replace(labels, segments=segments, objects=objects).draw_segments(height, width)


def translate_dataset(dataset: GroundTruthDataset, taxonomy: Taxonomy) -> GroundTruthDataset:
    """Return the dataset in other categories: each becomes the category of its name, or of its supercategory's name.

    Things stay things and stuff stays stuff. Raises ConfigError if no category is shared, or if objects have only
    boxes.
    """
    if dataset.kind == "boxes":
        raise ConfigError(f"{dataset.name} has only boxes: auxiliary images need masks")
    own = dataset.taxonomy
    known = {(name, taxonomy.is_thing(index)): index for index, name in enumerate(taxonomy.names)}
    categories: dict[int, int] = {}
    for index, names in enumerate(zip(own.names, own.groups or own.names, strict=True)):
        found = [known[name, own.is_thing(index)] for name in names if (name, own.is_thing(index)) in known]
        if found:
            categories[index] = found[0]
    if not categories:
        raise ConfigError(f"{dataset.name} and the evaluated dataset have no category in common")
    images = tuple(
        replace(
            image,
            annotation=TranslatedAnnotation(
                files=image.annotation.files, annotation=image.annotation, categories=categories
            ),
        )
        for image in dataset.images
    )
    return replace(dataset, taxonomy=taxonomy, images=images)
