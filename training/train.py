"""Trains a network on pseudo-labels, and fine-tunes one on the categories of a fraction of a labeled dataset."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco

from model.checkpoints.dino import load_encoder
from model.checkpoints.runs import WEIGHT_FILES, read_run_info
from model.contract import CONTRACT_FILE, read_contract
from model.errors import BackendUnavailable, ConfigError
from model.files import hash_file
from model.images import read_image_size
from model.networks.mask_transformer import DecoderConfig
from model.postprocessing.panoptic import ids_to_positions
from model.progress import Progress, track
from model.validation import parse
from training.data.dataset import PseudoLabelDataset
from training.data.encoders import warn_about_other_encoder
from training.data.features import FeatureStore
from training.data.label_config import ClusteringConfig, PseudoLabelConfig
from training.data.panoptic_labels import ImageLabel, PanopticLabel
from training.data.photos import PhotoFile, hash_photos
from training.evaluation.class_mapping import (
    ClusterAssignment,
    ClusterMapping,
    fingerprint_photos,
    list_categories,
)
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.mask_transformer.task import MaskTransformerTask
from training.panoptic_cascade.config import CascadeTrainConfig
from training.panoptic_cascade.task import CascadeTask
from training.trainer.config import RunOptions
from training.trainer.task import TrainingTask
from training.trainer.trainer import Trainer, TrainReport

LABELS_FOLDER = "annotations"
MAPPING_FILE = "names.json"


def train(
    dataset: PseudoLabelDataset,
    options: RunOptions,
    config: MaskTransformerTrainConfig | CascadeTrainConfig,
    backbone_weights: str = "",
) -> TrainReport:
    """Train the network of the configuration and write a run; a run that exists is resumed.

    `backbone_weights` is the path or URL of a published ResNet-50 for a cascade.
    Raises BackendUnavailable without a CUDA device, and ConfigError if the network has no ResNet-50.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("torch finds no CUDA device: use --device cpu")
    if backbone_weights and getattr(config, "backbone", None) != "resnet50":
        raise ConfigError(f"{backbone_weights}: backbone weights need a panoptic cascade with --backbone resnet50")
    task: TrainingTask[Any]
    match config:
        case MaskTransformerTrainConfig():
            task = MaskTransformerTask(dataset, options.features or dataset.features, options.out, config)
            if options.init_weights:
                warn_about_other_encoder(options.init_weights, options.out / task.run_info.encoder_file)
        case CascadeTrainConfig():
            task = CascadeTask(dataset, config, backbone_weights)
    return Trainer[Any](task, options).train()


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """Result of fine-tuning."""

    step: int
    images: int
    """Images that the run was trained on."""
    names: str
    """Path of the cluster mapping for `useg eval`, which rejects an evaluation on the training images."""
    losses: dict[str, float]
    skipped: tuple[str, ...]
    """What was left out of the dataset's file, one line for each reason."""


def finetune(
    source: Path,
    dataset: GroundTruthDataset,
    fraction: float,
    out: Path,
    config: MaskTransformerTrainConfig,
    features: Path | None = None,
    encoder: Path | None = None,
) -> FinetuneReport:
    """Train on a fraction of a labeled dataset, from the weights of the run or artifact `source`; can be resumed.

    The paper's protocol (section 4.5): class heads are initialized again, all other weights are kept.
    Instances without stuff give a network without stuff clusters. Raises ConfigError if the dataset has no masks of
    objects, and as `load_finetune_source` does.
    """
    decoder, encoder = load_finetune_source(source, encoder)
    side_px = decoder.side_px
    labels = PseudoLabelDataset(out / LABELS_FOLDER)
    images = sample_images(dataset, fraction, config.seed)
    photos = write_ground_truth_labels(dataset, images, encoder, side_px, labels)
    features = features or labels.features
    # The last block is one of those that the decoder reads: no others are computed for clustering.
    last_block = ClusteringConfig(side_px=side_px, layers=(-1,))
    store = FeatureStore(features, load_encoder(str(encoder), side_px), hash_file(encoder), last_block)
    with Progress("features", len(photos), unit="photo") as progress:
        for count in store.fill(photos):
            progress.advance(count)
    config = replace(config, num_queries=decoder.num_queries, num_decoder_layers=decoder.num_layers)
    report = train(labels, RunOptions(out=out, features=features, init_weights=source), config)
    weights_hash = hash_file(out / WEIGHT_FILES["mask_transformer"])
    ground_truth_mapping(dataset, labels, weights_hash).write(out / MAPPING_FILE)
    return FinetuneReport(
        step=report.step,
        images=len(images),
        names=str(out / MAPPING_FILE),
        losses=report.losses,
        skipped=dataset.skipped,
    )


def load_finetune_source(folder: Path, encoder: Path | None = None) -> tuple[DecoderConfig, Path]:
    """Return the decoder's sizes and the encoder file of a run, or of an artifact, which has no complete encoder.

    Raises ConfigError if it is not a mask transformer, or if the encoder file is missing, not needed or another.
    """
    network: str
    config: object
    if not (folder / CONTRACT_FILE).is_file():
        if encoder is not None:
            raise ConfigError(f"{folder} is a run and contains its encoder: omit --encoder")
        info = read_run_info(folder)
        network, config, encoder = info.network, info.network_config, folder / info.encoder_file
    else:
        contract = read_contract(folder)
        origin = contract.provenance.get("encoder", {})
        if encoder is None:
            raise ConfigError(f"{folder} is an artifact: pass the --encoder it was made with ({origin.get('origin')})")
        if hash_file(encoder) != origin.get("sha256"):
            raise ConfigError(f"{encoder} is not the encoder of {folder}, whose sha256 is {origin.get('sha256')}")
        stored = contract.network_config.get("decoder")
        network, config = contract.network, parse(DecoderConfig, stored) if stored else None
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"{folder} is a {network}: only a mask transformer can be fine-tuned")
    return config, encoder


def sample_images(dataset: GroundTruthDataset, fraction: float, seed: int) -> list[GroundTruthImage]:
    """Sample a fraction of the images, at least one, in the order of the dataset.

    Raises ConfigError if the fraction is not in 0..1, or if the dataset has no masks of objects.
    """
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"fraction must be above 0 and at most 1, got {fraction}")
    if dataset.kind not in ("panoptic", "masks"):
        raise ConfigError(f"{dataset.name} has only {dataset.kind} labels: fine-tuning needs panoptic labels or masks")
    count = max(1, round(fraction * len(dataset.images)))
    sampled = np.random.default_rng(seed).permutation(len(dataset.images))[:count]
    return [dataset.images[index] for index in sorted(sampled)]


def write_ground_truth_labels(
    dataset: GroundTruthDataset,
    images: Sequence[GroundTruthImage],
    encoder: Path,
    side_px: int,
    labels: PseudoLabelDataset,
) -> list[PhotoFile]:
    """Write the labels of these images in the format of pseudo-labels; cluster n is the n-th category.

    Crowds and unlabeled pixels are void. Labels that are already there are kept; raises ConfigError if they were made
    from other images.
    """
    folder = Path(os.path.commonpath([image.path.resolve().parent for image in images]))
    photos = {_to_photo_file(image, folder): image for image in track(images, "scan")}
    things = dataset.taxonomy.num_things
    config = PseudoLabelConfig(
        photos=str(folder),
        photos_hash=hash_photos(list(photos)),
        encoder=str(encoder.resolve()),
        encoder_hash=hash_file(encoder),
        side_px=side_px,
        mask_source="ground-truth",
        thing_clusters=things,
        stuff_clusters=len(dataset.taxonomy.names) - things,
        data_source=f"{len(photos)} images of {dataset.name} with human labels",
    )
    labels.lock_config(config)
    dependencies = {"annotations": dataset.name, "classes": dataset.taxonomy.title}
    labels.write_labels(config, list(photos), dependencies, lambda photo: _read_label(photos[photo], photo))
    return list(photos)


def ground_truth_mapping(dataset: GroundTruthDataset, labels: PseudoLabelDataset, source: str) -> ClusterMapping:
    """Return the mapping of such labels' clusters to the categories, with hashes of the training images."""
    names, things = dataset.taxonomy.names, dataset.taxonomy.num_things
    categories = list_categories(dataset.taxonomy)
    return ClusterMapping(
        source=source,
        method="given",
        matching=None,
        fitted_on=fingerprint_photos(dataset.name, [photo.digest for photo in labels.read_photos()]),
        thing_clusters=things,
        stuff_clusters=len(names) - things,
        num_things=things,
        categories=categories,
        clusters={each.id: ClusterAssignment(category=each.id, purity=1.0, support=0) for each in categories},
    )


def _to_photo_file(image: GroundTruthImage, folder: Path) -> PhotoFile:
    height, width = read_image_size(image.path)
    name = image.path.resolve().relative_to(folder).as_posix()
    return PhotoFile(path=image.path, name=name, digest=hash_file(image.path), height=height, width=width)


def _read_label(image: GroundTruthImage, photo: PhotoFile) -> ImageLabel:
    labels = image.annotation.read(photo.height, photo.width).draw_segments(photo.height, photo.width)
    assert labels.label_map is not None
    objects = [each for each in labels.objects if not each.is_crowd and each.rle is not None]
    present = set(np.unique(labels.label_map).tolist()) - labels.crowds
    kept = [segment for segment in labels.segments if segment in present]
    return ImageLabel(
        panoptic=PanopticLabel(
            label_map=ids_to_positions(labels.label_map, kept).astype(np.int32),
            categories={number: labels.segments[segment] + 1 for number, segment in enumerate(kept, start=1)},
        ),
        masks=np.array([coco.decode(each.rle) for each in objects], bool).reshape(-1, photo.height, photo.width),
        things=[each.category + 1 for each in objects],
        scores=None,
    )
