"""A source of answers held against labelled pictures: one pass, then everything from what it counted."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from model.files import hash_file
from training.data.executors import ALL_SHARDS, Executor, JobShard
from training.evaluation.dataset_metrics import (
    class_metrics,
    cluster_metrics,
    count_panoptic_all,
    count_semantic_all,
    image_metrics,
    instance_metrics,
    panoptic_metrics,
    semantic_metrics,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage
from training.evaluation.evaluation_report import EvaluationReport, EvaluationSummary, MatchingSummary
from training.evaluation.image_results import (
    IMAGES_PER_FILE,
    ImageResult,
    StoredImageResults,
    evaluate_all,
    evaluate_image,
    hash_photo,
    label_spaces,
    write_image_results,
)
from training.evaluation.matching.class_mapping import (
    CrossFittedMapping,
    MatchingConfig,
    check_mapping,
    fit_cluster_mapping,
    list_unmatched,
    map_clusters,
)
from training.evaluation.matching.mapping_file import ClusterMapping, fingerprint_photos
from training.evaluation.predictors import MIN_SCORE, Predictor, load_predictor

PROTOCOL = (
    "Things are matched among things and stuff among stuff. A segment of an unmatched cluster is a false positive of "
    "the category that it covers most, and its pixels are wrong; lenient figures let it go free, as the papers do. "
    "True and predicted stuff is one segment a category. Objects: pycocotools, detections scored "
    f"{MIN_SCORE} and better; detections of unmatched clusters cannot find a named object."
)


def fit_mapping(source: Predictor, truth: GroundTruthDataset, plan: MatchingConfig) -> ClusterMapping:
    """Names for the source's clusters, fitted on the whole set."""
    return fit_cluster_mapping(evaluate_all(source, truth), truth, label_spaces(source, truth), plan, source.digest)


def check_matching(source: Predictor, truth: GroundTruthDataset, plan: MatchingConfig) -> None:
    """Raise ConfigError, before the long pass, if the plan's names do not fit, or have seen these photos."""
    if plan.names is not None:
        digests = [hash_photo(each) for each in truth.images]
        check_mapping(plan.names, label_spaces(source, truth), truth.taxonomy, digests, is_same_set=plan.is_same_set)


def evaluate(
    source: Predictor, truth: GroundTruthDataset, plan: MatchingConfig
) -> tuple[EvaluationReport, CrossFittedMapping]:
    """Every metric that the set allows, and the class mappings behind them.

    Raises what `check_matching` and `compute_report` raise.
    """
    check_matching(source, truth, plan)
    return compute_report(evaluate_all(source, truth), source, truth, plan)


def compute_report(
    comparisons: Sequence[ImageResult], source: Predictor, truth: GroundTruthDataset, plan: MatchingConfig
) -> tuple[EvaluationReport, CrossFittedMapping]:
    """The same from comparisons that were made before."""
    spaces = label_spaces(source, truth)
    fit = map_clusters(comparisons, truth, spaces, plan)
    panoptic = count_panoptic_all(comparisons, fit, spaces) if truth.kind == "panoptic" else None
    has_regions = truth.kind in ("panoptic", "semantic")
    semantic = count_semantic_all(comparisons, fit, spaces) if has_regions else None
    gathered = count_semantic_all(comparisons, fit, spaces, things_as_one=True) if has_regions else None
    instance, precisions = instance_metrics(comparisons, fit, truth)
    summary = EvaluationSummary(
        source=source.title,
        source_sha256=source.digest,
        truth=truth.name,
        classes=truth.taxonomy.title,
        images=len(comparisons),
        photos_sha256=fingerprint_photos(truth.name, [each.digest for each in comparisons]).sha256,
        protocol=PROTOCOL,
        matching=_describe_matching(comparisons, fit),
        panoptic=panoptic_metrics(panoptic, spaces.things) if panoptic else {},
        semantic=semantic_metrics(semantic, spaces.things) if semantic else {},
        semantic_things_as_one=semantic_metrics(gathered, None) if gathered else {},
        instance=instance,
    )
    report = EvaluationReport(
        summary=summary,
        classes=class_metrics(truth, panoptic, semantic, precisions),
        clusters=cluster_metrics(comparisons, fit, spaces, truth, plan.thresholds),
        images=image_metrics(comparisons, truth, panoptic, semantic),
    )
    return report, fit


def _describe_matching(comparisons: Sequence[ImageResult], fit: CrossFittedMapping) -> MatchingSummary:
    return MatchingSummary(
        method=fit.method,
        fitted_on=fit.fitted_on,
        evaluated_on_fit_set=fit.evaluated_on_fit_set,
        clusters=len(fit.namings[0].panoptic) - 1,
        unmatched_clusters=len(list_unmatched(comparisons, fit)),
    )


FORMAT_VERSION = 1
_HASH_DIGITS = 16
_TELLING = (".json", ".npz", ".onnx", ".safetensors")
"""Files of a source that its answers depend on."""

Stage = Literal["evaluate"]
Group = Sequence[GroundTruthImage]


@dataclass(frozen=True, kw_only=True)
class EvaluationWorker:
    """Everything is on disk: whoever has the same goes on with it, in another process or on another machine."""

    source: Path
    """A run, an artifact or a store."""
    threads: int
    truth: GroundTruthDataset
    """The set without its pictures, which come in groups."""
    folder: Path
    """Of the files of comparisons."""
    unit: ClassVar[str] = "picture"

    def work(self, stage: Stage, images: Group) -> Iterator[int]:
        """Hold the source against these pictures, unless that was done before; gives how many are done."""
        path = self.place(images)
        if path.is_file():
            yield len(images)
            return
        comparisons: list[ImageResult] = []
        for each in images:
            comparisons.append(evaluate_image(each, self.truth, self.opened))
            yield 1
        write_image_results(path, comparisons)

    def place(self, images: Group) -> Path:
        """The file of these pictures, written or not; its name is the hash of all that it depends on."""
        files = [path.stat() for each in images for path in (each.path, *each.annotation.files)]
        content = [
            FORMAT_VERSION, self.made_from, MIN_SCORE, repr(self.truth), [repr(each) for each in images],
            [(each.st_size, each.st_mtime_ns) for each in files],
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:_HASH_DIGITS]
        return self.folder / f"{name}.json"

    @cached_property
    def opened(self) -> Predictor:
        return load_predictor(self.source, threads=self.threads)

    @cached_property
    def made_from(self) -> str:
        """One hash over the files of the source."""
        files = sorted(path for path in self.source.iterdir() if path.suffix in _TELLING)
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


def evaluate_images(
    examiner: EvaluationWorker, images: Sequence[GroundTruthImage], engine: Executor, part: JobShard = ALL_SHARDS
) -> StoredImageResults:
    """Every picture of the set in its order, or every so many of a part's groups."""
    groups = part.choose([images[start : start + IMAGES_PER_FILE] for start in range(0, len(images), IMAGES_PER_FILE)])
    engine.run(examiner, "evaluate", groups)
    return StoredImageResults(files=[examiner.place(each) for each in groups], places=range(sum(map(len, groups))))
