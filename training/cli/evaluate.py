"""`useg eval`, `compare`, `match` and `gate`: the commands that use a labeled dataset."""

import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from model.cli import REJECTED, SKIPPED
from model.errors import ConfigError
from model.export.predictor import load_artifact_predictor, sample_photos
from model.files import replace_file
from training.data.executors import ALL_SHARDS, ExecutorOptions, parse_shard
from training.evaluation.class_mapping import ClassMappingConfig, check_mapping, fit_mapping, read_mapping
from training.evaluation.cluster_matching import AuxiliarySpec, MatchingConfig
from training.evaluation.dataset_metrics import compare_predictors
from training.evaluation.datasets.dataset_spec import DatasetSpec
from training.evaluation.evaluation_report import compute_report
from training.evaluation.html_report import render_gallery, write_html_report
from training.evaluation.image_results import EvaluationWorker, evaluate_in_parallel
from training.evaluation.predictors import load_predictor
from training.evaluation.promotion_gate import PromotionThresholds, check_drift, check_scores, check_similarity

RESULTS_FOLDER = "image-results"
_FLAT = Parameter(name="*")
_LOCAL = ExecutorOptions()
_MATCHING = MatchingConfig()
_DEFAULT_THRESHOLDS = PromotionThresholds()


def evaluate(
    predictor: Path,
    /,
    *,
    dataset: Annotated[DatasetSpec, _FLAT],
    matching: Annotated[MatchingConfig | None, _FLAT] = None,
    auxiliary: Annotated[AuxiliarySpec | None, _FLAT] = None,
    mapping: Path | None = None,
    allow_train_test_overlap: Annotated[bool, Parameter(negative="")] = False,
    execution: Annotated[ExecutorOptions, _FLAT] = _LOCAL,
    threads: PositiveInt = 2,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a run, an artifact or pseudo-labels on a labeled dataset.

    Prints PQ, mIoU and AP with 95 % confidence intervals as JSON. Without --mapping, each half of the images is
    evaluated with the categories that the other half gives to the clusters. With --out, the same command continues
    after an interruption.

    Parameters
    ----------
    predictor
        Folder of a run, an artifact or pseudo-labels.
    mapping
        Mapping file of `useg match`, fitted on other images.
    allow_train_test_overlap
        Allow evaluation on the images that the mapping was fitted on; without --mapping, fit it on these images.
        Metrics by category are then upper bounds, and the report says so.
    threads
        CPU threads per process.
    out
        Folder for report.json and report.html.
    """
    shard = parse_shard(execution.shard)
    if not out and (shard != ALL_SHARDS or execution.executor == "ray"):
        raise ConfigError("--shard and --executor ray store their results in a folder: give --out")
    if mapping and (matching or auxiliary):
        raise ConfigError("--mapping is fitted already: give the matching and auxiliary options to `useg match`")
    config = ClassMappingConfig(
        matching=matching or MatchingConfig(),
        mapping=read_mapping(mapping) if mapping else None,
        allow_overlap=allow_train_test_overlap,
    )
    labeled = dataset.read()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (out / RESULTS_FOLDER).resolve() if out else Path(temporary)  # in `out`, a killed run can continue
        worker = EvaluationWorker(
            predictor_folder=predictor.resolve(),
            threads=threads,
            dataset=replace(labeled, images=()),
            results_folder=folder,
        )
        check_mapping(worker.predictor, labeled, config)
        if auxiliary and shard == ALL_SHARDS:
            config = replace(config, auxiliary=auxiliary.read(labeled))
        results = evaluate_in_parallel(worker, labeled.images, execution.make_executor(threads), shard)
        if shard != ALL_SHARDS:
            return {"shard": execution.shard, "images": len(results)}
        report, mappings = compute_report(results, worker.predictor, labeled, config)
        if out:
            report.write(out)
            gallery = render_gallery(report.images, worker.predictor, labeled, mappings)
            write_html_report(report, gallery, out)
            shutil.rmtree(folder)
        return asdict(report.summary)


def compare(
    predictor: Path,
    /,
    *,
    baseline: Path,
    dataset: Annotated[DatasetSpec, _FLAT],
    matching: Annotated[MatchingConfig, _FLAT] = _MATCHING,
    auxiliary: Annotated[AuxiliarySpec | None, _FLAT] = None,
    threads: PositiveInt = 2,
) -> dict[str, Any]:
    """Compare two runs, artifacts or pseudo-labels on the same images by paired bootstrap.

    Prints each metric of both, and the difference with its 95 % confidence interval, as JSON.

    Parameters
    ----------
    predictor
        Folder of a run, an artifact or pseudo-labels.
    baseline
        Folder of what it is compared with.
    threads
        CPU threads.
    """
    labeled = dataset.read()
    new, old = (load_predictor(folder, threads=threads) for folder in (predictor, baseline))
    config = ClassMappingConfig(matching=matching, auxiliary=auxiliary.read(labeled) if auxiliary else None)
    differences = compare_predictors(new, old, labeled, config)
    return {
        "new": new.title,
        "baseline": old.title,
        "dataset": labeled.name,
        "images": len(labeled.images),
        "metrics": {name: asdict(difference) for name, difference in differences.items()},
        SKIPPED: labeled.skipped,
    }


def match(
    predictor: Path,
    /,
    *,
    dataset: Annotated[DatasetSpec, _FLAT],
    out: Path,
    matching: Annotated[MatchingConfig, _FLAT] = _MATCHING,
    auxiliary: Annotated[AuxiliarySpec | None, _FLAT] = None,
    threads: PositiveInt = 2,
) -> dict[str, Any]:
    """Give clusters and segments the categories of a labeled dataset: writes a mapping file.

    The predictor segments every image, and clusters are matched with the categories they overlap. If the network has
    embeddings, the file also has those of the labeled segments, and a segment takes the category of the most similar.

    Parameters
    ----------
    predictor
        Folder of a run, an artifact or pseudo-labels.
    out
        Mapping file to write (JSON), for `useg eval --mapping` and `useg names apply`.
    threads
        CPU threads.
    """
    labeled = dataset.read()
    config = ClassMappingConfig(matching=matching, auxiliary=auxiliary.read(labeled) if auxiliary else None)
    fitted = fit_mapping(load_predictor(predictor, threads=threads), labeled, config)
    fitted.write(out)
    return {
        "mapping": str(out),
        "images": fitted.fitted_on.images,
        "clusters": len(fitted.clusters),
        "matched": sum(each.category is not None for each in fitted.clusters.values()),
        "examples": sum(fitted.examples.counts) if fitted.examples else 0,
        "method": fitted.method,
        SKIPPED: labeled.skipped,
    }


def gate(
    new: Path,
    old: Path,
    /,
    *,
    photos: Path | None = None,
    drift_photos: Path | None = None,
    max_photos: PositiveInt = 200,
    dataset: Annotated[DatasetSpec | None, _FLAT] = None,
    thresholds: Annotated[PromotionThresholds, _FLAT] = _DEFAULT_THRESHOLDS,
    threads: PositiveInt = 2,
    out: Path | None = None,
) -> dict[str, Any]:
    """Check whether an artifact may replace another; exit status 4 with the reasons if not.

    With --dataset, its metrics must not drop; else both artifacts must segment --photos similarly. With
    --drift-photos, the new artifact's predictions must agree with its drift reference.

    Parameters
    ----------
    new
        Artifact to check.
    old
        Artifact that it is to replace.
    photos
        Folder of photos on which both artifacts are compared, if there is no --dataset.
    drift_photos
        Folder of photos that are not those of the drift reference, for example recent uploads; at least 200.
    max_photos
        Maximum number of photos to use of each folder.
    threads
        CPU threads.
    out
        JSON file for the result, also if the check fails.
    """
    if drift_photos and photos and drift_photos.resolve() == photos.resolve():
        raise ConfigError(f"--drift-photos must be other photos than --photos, both are {photos}")
    labeled = dataset.read() if dataset else None
    if labeled:
        new_predictor, old_predictor = (load_predictor(folder, threads=threads) for folder in (new, old))
        checks = check_scores(new_predictor, old_predictor, labeled, thresholds)
    elif photos:
        new_artifact, old_artifact = (load_artifact_predictor(folder, threads=threads) for folder in (new, old))
        pairs = (
            (old_artifact.segment(image), new_artifact.segment(image)) for _, image in sample_photos(photos, max_photos)
        )
        checks = check_similarity(pairs, thresholds)
    else:
        raise ConfigError("nothing to compare on: give --dataset or --photos")
    if drift_photos:
        artifact = load_artifact_predictor(new, threads=threads)
        sampled = (artifact.segment(image) for _, image in sample_photos(drift_photos, max_photos))
        checks += check_drift(sampled, artifact.contract, thresholds)
    reasons = [check.reason for check in checks if not check.is_passed]
    result: dict[str, Any] = {
        "passed": not reasons,
        "checks": [asdict(check) for check in checks],
        REJECTED: reasons,
        SKIPPED: labeled.skipped if labeled else (),
    }
    if out:
        replace_file(out, json.dumps(result, indent=2) + "\n")
    return result
