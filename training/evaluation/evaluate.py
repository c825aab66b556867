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
from training.evaluation.class_mapping import (
    ClassMappingConfig,
    ClusterMapping,
    CrossFittedMapping,
    check_mapping,
    fingerprint_photos,
    fit_cluster_mapping,
    list_unmatched,
    map_clusters,
)
from training.evaluation.cluster_matching import MatchingConfig, label_spaces
from training.evaluation.dataset_metrics import (
    class_metrics,
    cluster_metrics,
    count_panoptic_all,
    count_semantic_all,
    image_metrics,
    instance_metrics,
    make_panoptic_metric,
    make_semantic_metric,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage
from training.evaluation.evaluation_report import EvaluationReport, EvaluationSummary, MatchingSummary
from training.evaluation.image_results import (
    ImageResult,
    evaluate_all,
    evaluate_image,
    hash_photo,
    read_image_results,
    write_image_results,
)
from training.evaluation.metrics.bootstrap import bootstrap
from training.evaluation.predictors import MIN_SCORE, Predictor, load_predictor

PROTOCOL = (
    "Things are matched among things and stuff among stuff. A segment of a cluster without a category is a false "
    "positive of the category that it covers most, and its pixels are errors; metrics that ignore unmapped clusters "
    "do not count it, as in the papers. Labeled and predicted stuff is one segment per category. Objects: "
    f"pycocotools, detections with a score of at least {MIN_SCORE}; detections without a category match no object of "
    "the metrics by category."
)
RESULTS_VERSION = 3
"""Of the files of image results."""
_IMAGES_PER_FILE = 16
"""A killed run loses at most the results of this many images: some seconds of work."""
_HASH_DIGITS = 16
_PREDICTOR_SUFFIXES = (".json", ".npz", ".onnx", ".safetensors")
"""Files of a predictor's folder that its predictions depend on."""


def fit_mapping(predictor: Predictor, dataset: GroundTruthDataset, config: MatchingConfig) -> ClusterMapping:
    """Fit a mapping of the predictor's clusters to categories on the whole dataset."""
    results = evaluate_all(predictor, dataset)
    return fit_cluster_mapping(results, dataset, label_spaces(predictor, dataset), config, predictor.digest)


def check_mapping_config(predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig) -> None:
    """Raise ConfigError if the given mapping does not fit, or was fitted on these images: before the long pass."""
    if config.mapping is not None:
        spaces = label_spaces(predictor, dataset)
        digests = [hash_photo(image) for image in dataset.images]
        check_mapping(config.mapping, spaces, dataset.taxonomy, digests, allow_overlap=config.allow_overlap)


def evaluate(
    predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig
) -> tuple[EvaluationReport, CrossFittedMapping]:
    """Evaluate in this process. Raises what `check_mapping_config` and `compute_report` raise."""
    check_mapping_config(predictor, dataset, config)
    return compute_report(evaluate_all(predictor, dataset), predictor, dataset, config)


def compute_report(
    results: Sequence[ImageResult], predictor: Predictor, dataset: GroundTruthDataset, config: ClassMappingConfig
) -> tuple[EvaluationReport, CrossFittedMapping]:
    """Return all metrics that the dataset's labels allow, and the mapping behind them."""
    spaces = label_spaces(predictor, dataset)
    mapping = map_clusters(results, dataset, spaces, config)
    panoptic = count_panoptic_all(results, mapping, spaces) if dataset.kind == "panoptic" else None
    is_dense = dataset.kind in ("panoptic", "semantic")
    semantic = count_semantic_all(results, mapping, spaces) if is_dense else None
    merged = count_semantic_all(results, mapping, spaces, merged_things=True) if is_dense else None
    instance, ap_per_category = instance_metrics(results, mapping, dataset)
    summary = EvaluationSummary(
        predictor=predictor.title,
        predictor_sha256=predictor.digest,
        dataset=dataset.name,
        classes=dataset.taxonomy.title,
        images=len(results),
        images_sha256=fingerprint_photos(dataset.name, [result.digest for result in results]).sha256,
        protocol=PROTOCOL,
        matching=_summarize_matching(results, mapping),
        panoptic=bootstrap(len(results), make_panoptic_metric(panoptic, spaces.num_things)) if panoptic else {},
        semantic=bootstrap(len(results), make_semantic_metric(semantic, spaces.num_things)) if semantic else {},
        semantic_merged_things=bootstrap(len(results), make_semantic_metric(merged, None)) if merged else {},
        instance=instance,
        skipped=dataset.skipped,
    )
    report = EvaluationReport(
        summary=summary,
        classes=class_metrics(dataset, panoptic, semantic, ap_per_category),
        clusters=cluster_metrics(results, mapping, spaces, dataset, config.matching),
        images=image_metrics(results, dataset, panoptic, semantic),
    )
    return report, mapping


def _summarize_matching(results: Sequence[ImageResult], mapping: CrossFittedMapping) -> MatchingSummary:
    return MatchingSummary(
        method=mapping.method,
        fitted_on=mapping.fitted_on,
        evaluated_on_fit_set=mapping.evaluated_on_fit_set,
        clusters=len(mapping.mappings[0].panoptic) - 1,
        unmatched_clusters=len(list_unmatched(results, mapping)),
    )


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
