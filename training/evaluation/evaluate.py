"""Evaluates a predictor on a labeled dataset: one pass over the images, then all metrics from the results."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from model.files import hash_file
from training.data.executors import ALL_SHARDS, LocalExecutor
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage
from training.evaluation.image_results import (
    ImageResult,
    evaluate_image,
    read_image_results,
    write_image_results,
)
from training.evaluation.predictors import MIN_SCORE, Predictor, load_predictor

RESULTS_VERSION = 4
"""Of the files of image results."""
_IMAGES_PER_FILE = 16
"""A killed run loses at most the results of this many images: some seconds of work."""
_HASH_DIGITS = 16
_PREDICTOR_SUFFIXES = (".json", ".npz", ".onnx", ".safetensors")
"""Files of a predictor's folder that its predictions depend on."""


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
        write_image_results(path, results)

    def result_path(self, images: Sequence[GroundTruthImage]) -> Path:
        """Return the file for the results of these images; its name is a hash of everything they depend on."""
        files = [path.stat() for image in images for path in (image.path, *image.annotation.files)]
        content = [
            RESULTS_VERSION, self.predictor_hash, MIN_SCORE, repr(self.dataset), [repr(image) for image in images],
            [(stat.st_size, stat.st_mtime_ns) for stat in files],
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:_HASH_DIGITS]
        return self.results_folder / f"{name}.json"

    @cached_property
    def predictor(self) -> Predictor:
        return load_predictor(self.predictor_folder, threads=self.threads)

    @cached_property
    def predictor_hash(self) -> str:
        """One hash over the files of the predictor."""
        files = sorted(path for path in self.predictor_folder.iterdir() if path.suffix in _PREDICTOR_SUFFIXES)
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


def evaluate_in_parallel(
    worker: EvaluationWorker, images: Sequence[GroundTruthImage], executor: LocalExecutor, shard: slice = ALL_SHARDS
) -> list[ImageResult]:
    """Evaluate the images, or the groups of one shard, and return their results in order."""
    starts = range(0, len(images), _IMAGES_PER_FILE)
    groups = [images[start : start + _IMAGES_PER_FILE] for start in starts][shard]
    executor.run(worker, "evaluate", groups)
    return [result for group in groups for result in read_image_results(worker.result_path(group))]
