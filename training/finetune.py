"""A run that was trained without labels, taught the categories of a labelled set by a share of its pictures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from model.checkpoints.dino import load_encoder
from model.checkpoints.runs import WEIGHT_FILES, read_run_info
from model.contract import CONTRACT_FILE, Category, read_contract
from model.errors import ConfigError
from model.files import hash_file
from model.images import read_image
from model.networks.mask_transformer import DecoderConfig
from model.validation import parse
from training.data.dataset import PseudoLabelDataset
from training.data.features import fill_cache, open_cache
from training.data.label_config import PseudoLabelConfig
from training.data.panoptic_labels import ImageLabel, PanopticLabel
from training.data.photos import PhotoFile, hash_photos
from training.evaluation.datasets.ground_truth import GroundTruthDataset, GroundTruthImage, GroundTruthLabels
from training.evaluation.image_results import hash_photo
from training.evaluation.matching.mapping_file import ClusterAssignment, ClusterMapping, fingerprint_photos
from training.mask_transformer.config import MaskTransformerTrainConfig
from training.progress import track
from training.train import train

STORE_FOLDER = "annotations"
NAMES_FILE = "names.json"


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """What was taught."""

    step: int
    images: int
    names: str
    """File of names, for `useg-train eval`; it knows the pictures, so that none of them is scored."""
    losses: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FinetuneStart:
    """What is fine-tuned."""

    shape: DecoderConfig
    encoder: Path
    """File of its encoder, which stays as it is."""


def load_finetune_start(folder: Path, encoder: Path | None = None) -> FinetuneStart:
    """A run, or an artifact with the file of the encoder that it was made with: that is not whole in an artifact.

    Raises ConfigError if it is no mask transformer, or if the encoder is missing, superfluous or another.
    """
    if not (folder / CONTRACT_FILE).is_file():
        if encoder is not None:
            raise ConfigError(f"{folder} is a run and has its encoder: leave {encoder} out")
        card = read_run_info(folder)
        return FinetuneStart(
            shape=_require_decoder(folder, card.network, card.network_config), encoder=folder / card.encoder_file
        )
    contract = read_contract(folder)
    origin = contract.provenance.get("encoder", {})
    if encoder is None:
        raise ConfigError(f"{folder} is an artifact: give the --encoder that it was made with ({origin.get('origin')})")
    if hash_file(encoder) != origin.get("sha256"):
        raise ConfigError(f"{encoder} is not the encoder of {folder}, whose sha256 is {origin.get('sha256')}")
    decoder = contract.network_config.get("decoder")
    shape = parse(DecoderConfig, decoder) if decoder else None
    return FinetuneStart(shape=_require_decoder(folder, contract.network, shape), encoder=encoder)


def finetune(
    start: Path,
    truth: GroundTruthDataset,
    fraction: float,
    out: Path,
    recipe: MaskTransformerTrainConfig,
    features: Path | None = None,
    encoder: Path | None = None,
) -> FinetuneReport:
    """Fit to that share of the set, from the weights of `start`; what `train` says of being killed holds here.

    The paper's protocol (section 4.5): the heads of classes begin anew, the rest goes on from where it was.
    Raises ConfigError if the set is not panoptic, and what `load_finetune_start` raises.
    """
    opened = load_finetune_start(start, encoder)
    side_px = opened.shape.side_px
    network = load_encoder(str(opened.encoder), side_px)
    store = PseudoLabelDataset(out / STORE_FOLDER)
    pictures = sample_images(truth, fraction, recipe.seed)
    photos = write_ground_truth_labels(truth, pictures, opened.encoder, side_px, store)
    folder = features or store.features
    fill_cache(open_cache(folder, hash_file(opened.encoder), side_px), photos, network, side_px)
    shaped = replace(recipe, queries=opened.shape.num_queries, layers=opened.shape.num_layers)
    report = train(store, folder, out, shaped, start=start)
    weights = hash_file(out / WEIGHT_FILES["mask_transformer"])
    ground_truth_mapping(truth, store, weights).write(out / NAMES_FILE)
    return FinetuneReport(step=report.step, images=len(pictures), names=str(out / NAMES_FILE), losses=report.losses)


def _require_decoder(folder: Path, network: str, shape: object) -> DecoderConfig:
    if not isinstance(shape, DecoderConfig):
        raise ConfigError(f"{folder} is a {network}: a mask transformer can be fine-tuned")
    return shape


def sample_images(truth: GroundTruthDataset, fraction: float, seed: int) -> list[GroundTruthImage]:
    """That share of the set, at least one picture, in the set's order.

    Raises ConfigError if the share is not in 0..1, or if the set does not label every pixel.
    """
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"fraction must lie above 0 and at most at 1, got {fraction}")
    if truth.kind != "panoptic":
        raise ConfigError(f"{truth.name} knows {truth.kind} alone: fine-tuning takes a set with panoptic labels")
    count = max(1, round(fraction * len(truth.images)))
    drawn = np.random.default_rng(seed).permutation(len(truth.images))[:count]
    return [truth.images[place] for place in sorted(drawn)]


def write_ground_truth_labels(
    truth: GroundTruthDataset,
    images: Sequence[GroundTruthImage],
    encoder: Path,
    side_px: int,
    store: PseudoLabelDataset,
) -> list[PhotoFile]:
    """Fill the store with these pictures' labels, category n of the set, counted from 1, being cluster n.

    Groups, and what the set does not label, are void. What is there of it is taken as it is; raises ConfigError if that
    is another store.
    """
    folder = Path(os.path.commonpath([picture.path.resolve().parent for picture in images]))
    photos = {_inspect(picture, folder): picture for picture in track(images, "scan")}
    config = PseudoLabelConfig(
        photos=str(folder),
        photos_hash=hash_photos(list(photos)),
        encoder=str(encoder.resolve()),
        encoder_hash=hash_file(encoder),
        side_px=side_px,
        mask_source="ground-truth",
        thing_clusters=truth.taxonomy.num_things,
        stuff_clusters=len(truth.taxonomy.names) - truth.taxonomy.num_things,
        data_source=f"{len(photos)} pictures of {truth.name}, labelled by people",
    )
    store.lock_config(config)
    dependencies = {"annotations": truth.name, "classes": truth.taxonomy.title}
    store.write_labels(config, list(photos), dependencies, lambda photo: _read(photos[photo], photo))
    return list(photos)


def ground_truth_mapping(truth: GroundTruthDataset, store: PseudoLabelDataset, source: str) -> ClusterMapping:
    """The set's own names for the clusters of such a store, knowing the photos, so that none is scored later."""
    names = truth.taxonomy.names
    return ClusterMapping(
        source=source,
        method="given",
        matching=None,
        fitted_on=fingerprint_photos(truth.name, [photo.digest for photo in store.read_photos()]),
        thing_clusters=truth.taxonomy.num_things,
        stuff_clusters=len(names) - truth.taxonomy.num_things,
        num_things=truth.taxonomy.num_things,
        categories=tuple(Category(id=number, name=name) for number, name in enumerate(names, start=1)),
        clusters={
            number: ClusterAssignment(category=number, purity=1.0, support=0) for number in range(1, len(names) + 1)
        },
    )


def _inspect(picture: GroundTruthImage, folder: Path) -> PhotoFile:
    height, width = read_image(picture.path).image.shape[:2]
    name = picture.path.resolve().relative_to(folder).as_posix()
    return PhotoFile(path=picture.path, name=name, digest=hash_photo(picture), height=height, width=width)


def _read(picture: GroundTruthImage, photo: PhotoFile) -> ImageLabel:
    labels = picture.annotation.read(photo.height, photo.width)
    objects = [each for each in labels.objects if not each.is_crowd and each.rle is not None]
    masks = np.array([coco.decode(each.rle) for each in objects], bool).reshape(-1, photo.height, photo.width)
    things = [each.category + 1 for each in objects]
    return ImageLabel(panoptic=_number(labels), masks=masks, things=things, scores=None)


def _number(labels: GroundTruthLabels) -> PanopticLabel:
    """Segments counted from 1, their categories from 1."""
    assert labels.label_map is not None, "a panoptic set labels every picture's pixels"
    kept = [each for each in labels.segments if each not in labels.crowds]
    numbered = np.zeros(labels.label_map.shape, np.int32)
    categories = {}
    for number, segment in enumerate(kept, start=1):
        numbered[labels.label_map == segment] = number
        categories[number] = labels.segments[segment] + 1
    return PanopticLabel(label_map=numbered, categories=categories)
