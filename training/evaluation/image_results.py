"""Compares predictions with labels: one pass over the images, in one process or several.

The result of an image has counts and RLEs, no pixel arrays; results are stored in files, which a killed run keeps.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float32
from pydantic import TypeAdapter

from model.errors import DatasetError
from model.files import hash_file, replace_file
from model.images import read_image
from model.postprocessing.panoptic import PatchEmbeddings
from model.progress import track
from training.data.executors import ALL_SHARDS, LocalExecutor
from training.evaluation.datasets.ground_truth import (
    GroundTruthDataset,
    GroundTruthImage,
    GroundTruthLabels,
    GroundTruthObject,
    crop_center,
)
from training.evaluation.overlap import OverlapMatrix, StoredArray, compute_overlap, merge_ground_truth_stuff
from training.evaluation.predictors import MIN_SCORE, ClusterMap, PredictedObject, Predictor, load_predictor

_MIN_EXAMPLE_PATCHES = 0.5
"""Smaller labeled segments are no examples of their category."""
RESULTS_VERSION = 4
"""Of the files of image results."""
_IMAGES_PER_FILE = 16
"""A killed run loses at most the results of this many images: some seconds of work."""
_HASH_DIGITS = 16
_PREDICTOR_SUFFIXES = (".json", ".npz", ".onnx", ".safetensors")
"""Files of a predictor's folder that its predictions depend on."""


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """The prediction for one image, compared with its ground truth."""

    image_id: int
    digest: str
    """sha256 of the image file."""
    size: tuple[int, int]
    """Height, width."""
    panoptic: OverlapMatrix | None
    """None if the dataset has no panoptic labels."""
    semantic: OverlapMatrix | None
    """None if only objects are labeled."""
    objects: tuple[GroundTruthObject, ...]
    detections: tuple[PredictedObject, ...]
    """Empty if no objects are labeled."""
    labeled_embeddings: Annotated[Float32[np.ndarray, "S E"] | None, StoredArray(np.float32)] = None
    """Of the labeled segments that are no crowds, with the masks of the labels; zeros for tiny ones."""
    labeled_categories: tuple[int, ...] = ()
    """Category index of each of them."""


_RESULTS = TypeAdapter(tuple[ImageResult, ...])


def evaluate_image(image: GroundTruthImage, dataset: GroundTruthDataset, predictor: Predictor) -> ImageResult:
    """Run the predictor on one image and compare the prediction with the ground truth."""
    decoded = read_image(image.path)
    digest = hash_file(image.path)
    labels = image.annotation.read(decoded.height, decoded.width)
    prediction = predictor.predict(decoded.image, digest)
    labeled_categories, labeled_embeddings = _embed_labels(labels, decoded.height, decoded.width, prediction.patches)
    return ImageResult(
        image_id=image.image_id,
        digest=digest,
        size=(decoded.height, decoded.width),
        panoptic=_compare(prediction.panoptic, labels, dataset) if dataset.kind == "panoptic" else None,
        semantic=_compare(prediction.semantic, labels, dataset),
        objects=labels.objects,
        detections=() if dataset.kind == "semantic" else prediction.detections,
        labeled_embeddings=labeled_embeddings,
        labeled_categories=labeled_categories,
    )


def evaluate_all(predictor: Predictor, dataset: GroundTruthDataset) -> list[ImageResult]:
    """Evaluate every image in this process; `evaluate_in_parallel` uses several."""
    return [evaluate_image(image, dataset, predictor) for image in track(dataset.images, "evaluate", unit="image")]


def read_image_results(path: Path) -> tuple[ImageResult, ...]:
    """Raises DatasetError if the file is missing or invalid."""
    try:
        return _RESULTS.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} contains no image results ({error}): delete it and rerun") from error


@dataclass(frozen=True, kw_only=True)
class EvaluationWorker:
    """Evaluates groups of images and stores the results: a later run, in any process or machine, reuses them."""

    predictor_folder: Path
    """A run, an artifact or pseudo-labels."""
    threads: int
    dataset: GroundTruthDataset
    """The dataset without its images, which are passed in groups."""
    results_folder: Path
    unit: ClassVar[str] = "image"

    def work(self, stage: Literal["evaluate"], images: Sequence[GroundTruthImage]) -> Iterator[int]:
        """Evaluate these images unless their results exist; yields the numbers of images that are done."""
        path = self.result_path(images)
        if path.is_file():
            yield len(images)
            return
        results: list[ImageResult] = []
        for image in images:
            results.append(evaluate_image(image, self.dataset, self.predictor))
            yield 1
        replace_file(path, _RESULTS.dump_json(tuple(results)))

    def result_path(self, images: Sequence[GroundTruthImage]) -> Path:
        """Return the file for the results of these images; its name is a hash of everything they depend on."""
        files = [path.stat() for image in images for path in (image.path, *image.annotation.files)]
        content = [
            RESULTS_VERSION, self.predictor_hash, MIN_SCORE, repr(self.dataset), [repr(image) for image in images],
            [(stat.st_size, stat.st_mtime_ns) for stat in files],
        ]  # fmt: skip
        name = sha256(json.dumps(content).encode()).hexdigest()[:_HASH_DIGITS]
        return self.results_folder / f"{name}.json"

    @cached_property
    def predictor(self) -> Predictor:
        return load_predictor(self.predictor_folder, threads=self.threads)

    @cached_property
    def predictor_hash(self) -> str:
        """One hash over the files of the predictor."""
        files = sorted(path for path in self.predictor_folder.iterdir() if path.suffix in _PREDICTOR_SUFFIXES)
        return sha256("".join(map(hash_file, files)).encode()).hexdigest()


def evaluate_in_parallel(
    worker: EvaluationWorker, images: Sequence[GroundTruthImage], executor: LocalExecutor, shard: slice = ALL_SHARDS
) -> list[ImageResult]:
    """Evaluate the images, or the groups of one shard, and return their results in order."""
    starts = range(0, len(images), _IMAGES_PER_FILE)
    groups = [images[start : start + _IMAGES_PER_FILE] for start in starts][shard]
    executor.run(worker, "evaluate", groups)
    return [result for group in groups for result in read_image_results(worker.result_path(group))]


def _embed_labels(
    labels: GroundTruthLabels, height: int, width: int, patches: PatchEmbeddings | None
) -> tuple[tuple[int, ...], Float32[np.ndarray, "S E"] | None]:
    """Return the category index and the embedding of each labeled segment that is no crowd."""
    if patches is None:
        return (), None
    labels = labels.draw_segments(height, width)
    assert labels.label_map is not None, "labels without a label map"
    segments = [segment for segment in labels.segments if segment not in labels.crowds]
    embeddings = patches.pool_segments(labels.label_map, segments, _MIN_EXAMPLE_PATCHES)
    return tuple(labels.segments[segment] for segment in segments), embeddings


def _compare(predicted: ClusterMap, labels: GroundTruthLabels, dataset: GroundTruthDataset) -> OverlapMatrix | None:
    if labels.label_map is None:
        return None
    predicted_map, ground_truth_map = predicted.label_map, labels.label_map
    if dataset.crop_px is not None:
        predicted_map = crop_center(predicted_map, dataset.crop_px)
        ground_truth_map = crop_center(ground_truth_map, dataset.crop_px)
    overlap = compute_overlap(predicted_map, predicted.clusters, ground_truth_map, labels.segments, labels.crowds)
    return replace(merge_ground_truth_stuff(overlap, dataset.taxonomy.num_things), embeddings=predicted.embeddings)
