"""`useg label` and `useg visualize`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from threadpoolctl import threadpool_limits

from model.checkpoints.dino import DEFAULT_ENCODER
from model.contract import CONTRACT_FILE
from model.errors import ConfigError
from model.export.predictor import load_artifact_predictor, sample_photos
from model.files import hash_file
from training.data.dataset import PseudoLabelDataset
from training.data.encoders import fetch_encoder
from training.data.executors import ExecutorOptions, parse_shard
from training.data.label_config import PseudoLabelConfig, PseudoLabelOptions
from training.data.photos import hash_photos, scan_photos
from training.option_types import NonNegativeInt, PositiveInt
from training.pseudo_labels.codebook import load_codebook, use_codebook_settings
from training.pseudo_labels.pipeline import label_photos
from training.pseudo_labels.visualize import plot_labels, plot_predictions, save_figure

_FLAT = Parameter(name="*")
_OPTIONS = PseudoLabelOptions()
_LOCAL = ExecutorOptions()


def label(
    photos: Path,
    /,
    *,
    out: Path,
    encoder: str = DEFAULT_ENCODER,
    codebook: Path | None = None,
    features: Path | None = None,
    max_photos: PositiveInt | None = None,
    options: Annotated[PseudoLabelOptions, _FLAT] = _OPTIONS,
    execution: Annotated[ExecutorOptions, _FLAT] = _LOCAL,
    threads: PositiveInt = 2,
) -> dict[str, Any]:
    """Make panoptic pseudo-labels for a folder of photos.

    Writes COCO panoptic and instances JSON. The same command continues after an interruption. Prints counts as JSON;
    the exit status is 3 if photos were unreadable and left out.

    Parameters
    ----------
    photos
        Folder of unlabeled photos; subfolders are included.
    out
        Folder for the pseudo-labels, outside PHOTOS.
    encoder
        DINO or DINOv2 weights: a file, a URL, or `bundled`, the encoder of the bundled model, which needs no download.
        The default is the official DINOv2 ViT-S/14; downloads are kept in ~/.cache/useg.
    codebook
        Use this codebook.npz of other pseudo-labels instead of fitting one. Its clustering options replace the
        defaults; other values for them are an error.
    features
        Folder of the feature cache (default: OUT/features).
    max_photos
        Label at most this many photos, evenly spread over the sorted names (default: all).
    threads
        CPU threads per process.
    """
    torch.set_num_threads(threads)
    if out.resolve().is_relative_to(photos.resolve()):
        raise ConfigError(f"{out} lies in {photos}: its labels would be taken for photos")
    encoder_file = fetch_encoder(encoder).resolve()
    encoder_hash = hash_file(encoder_file)
    loaded = load_codebook(codebook) if codebook else None
    if loaded:
        options = use_codebook_settings(options, loaded, encoder_hash)
    dataset = PseudoLabelDataset(out.resolve())
    config = PseudoLabelConfig(  # before the scan, so that an invalid configuration is an error at once
        **vars(options),
        photos=str(photos.resolve()),
        photos_hash="",
        encoder=str(encoder_file),
        encoder_hash=encoder_hash,
        codebook_hash=loaded.digest if loaded else "",
    )
    scan = scan_photos(photos, max_photos=max_photos, cache_file=dataset.scan)
    with threadpool_limits(1, user_api="blas"):  # NumPy's BLAS threads and torch's would compete for the cores
        report = label_photos(
            scan.photos,
            replace(config, photos_hash=hash_photos(scan.photos)),
            dataset,
            (features or dataset.features).resolve(),
            loaded,
            executor=execution.make_executor(threads),
            shard=parse_shard(execution.shard),
        )
    left_out = {"skipped": scan.skipped, "duplicates": scan.duplicates, "other_files": scan.other_files}
    return asdict(report) | left_out


def visualize(
    source: Path,
    /,
    *,
    out: Path,
    photos: Path | None = None,
    count: PositiveInt = 24,
    seed: NonNegativeInt = 0,
    threads: PositiveInt = 2,
) -> dict[str, Any]:
    """Plot photos next to their pseudo-labels, or next to the predictions of an artifact.

    Parameters
    ----------
    source
        Folder of pseudo-labels or of an artifact.
    out
        Image to write; the suffix gives the format (.png, .jpg, .pdf, …).
    photos
        Folder of photos for an artifact, or of the labeled photos if they have moved.
    count
        Maximum number of photos.
    seed
        Random seed of the choice of photos.
    threads
        CPU threads.
    """
    if (source / CONTRACT_FILE).is_file():
        if not photos:
            raise ConfigError(f"{source} is an artifact: give --photos to predict")
        predictor = load_artifact_predictor(source, threads=threads)
        sampled = list(sample_photos(photos, count, seed))
        title = f"{predictor.contract.name} {predictor.contract.version}"
        save_figure(plot_predictions(title, sampled, predictor), out)
        return {"figure": str(out), "photos": len(sampled)}
    dataset = PseudoLabelDataset(source, photos)
    save_figure(plot_labels(dataset, count, seed), out)
    return {"figure": str(out), "photos": min(count, len(dataset.read_photos()))}
