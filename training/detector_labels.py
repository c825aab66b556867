"""Replaces the masks of pseudo-labels by those of a detector: the paper's baselines without a universal network."""

from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np

from model.checkpoints.dino import load_encoder
from model.files import atomic_write
from model.formats.rle import decode_rle
from model.images import read_image
from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.data.features import FeatureStore
from training.data.label_config import PseudoLabelConfig, to_json
from training.data.panoptic_labels import ImageLabel, merge_panoptic, remove_overlaps
from training.data.photos import PhotoFile
from training.evaluation.predictors import Predictor
from training.pseudo_labels.codebook import ClusterAssigner, load_codebook
from training.pseudo_labels.maskcut import load_proposals

SCORE_THRESHOLD = 0.5
"""Minimum score of a detection in the panoptic map, as in detectron2's `combine_semantic_and_instance_outputs`."""


@dataclass(frozen=True, kw_only=True)
class DetectorLabelsReport:
    """Size of the labels."""

    photos: int
    masks: int


def build_detector_labels(
    detector: Predictor,
    dataset: PseudoLabelDataset,
    out: PseudoLabelDataset,
    features: Path,
    score_threshold: float = SCORE_THRESHOLD,
) -> DetectorLabelsReport:
    """Fill `out` with the detector's masks, clustered by the codebook of `dataset`, and with its kind of stuff.

    The masks of such labels are the paper's "CutLER+" (the detections of a class-agnostic detector, clustered), and
    their panoptic maps are "CutLER+STEGO" if the stuff is STEGO's (U2Seg, section 4). Every detection becomes an
    instance with its score; those of at least `score_threshold` are in the panoptic map if at least half visible.
    Raises ConfigError if `out` has labels of another detector or dataset.
    """
    codebook = load_codebook(dataset.codebook)
    config = replace(
        dataset.read_config(),
        mask_source="detector",
        detector_hash=detector.digest,
        codebook_hash=codebook.digest,
    )
    out.lock_config(config)
    with atomic_write(out.codebook) as sibling:
        copyfile(dataset.codebook, sibling)
    photos = [_to_photo_file(photo, Path(config.photos)) for photo in dataset.read_photos()]
    encoder = load_encoder(config.encoder, config.side_px)
    feature_store = FeatureStore.open(features, encoder, config.encoder_hash, config)
    feature_store.fill_all(photos)
    labeler = _DetectorLabeler(
        detector=detector,
        dataset=dataset,
        config=config,
        score_threshold=score_threshold,
        features=feature_store,
        assigner=ClusterAssigner(codebook, config, dataset.folder / f"detector-{detector.digest[:16]}"),
    )
    records = out.write_labels(config, photos, labeler.dependencies, labeler.label)
    return DetectorLabelsReport(photos=len(photos), masks=sum(len(record.instances) for record in records))


@dataclass(frozen=True, kw_only=True)
class _DetectorLabeler:
    """Labels a photo with the masks of a detector."""

    detector: Predictor
    dataset: PseudoLabelDataset
    config: PseudoLabelConfig
    score_threshold: float
    features: FeatureStore
    assigner: ClusterAssigner

    @property
    def dependencies(self) -> dict[str, Any]:
        """What labels depend on, besides the photos."""
        provenance = {"photos", "photos_hash", "encoder", "stuff_maps_dir", "data_source"}
        settings = {name: value for name, value in to_json(self.config).items() if name not in provenance}
        return settings | {"score_threshold": self.score_threshold}

    def label(self, photo: PhotoFile) -> ImageLabel:
        """Return the label of one photo, at its own size."""
        features, config = self.features.load(photo), self.config
        detections = self.detector.predict(read_image(photo.path).image, photo.digest).detections
        masks = np.array([decode_rle(each.rle) for each in detections], bool)
        masks = masks.reshape(-1, photo.height, photo.width)
        scores = np.array([each.score for each in detections])
        patches = np.array([features.patches_in_mask(mask) for mask in masks], bool).reshape(-1, *features.grid_size)
        things = self.assigner.assign_things(features, patches).tolist()
        stuff = self.assigner.segment_stuff(features, load_proposals(self.dataset.proposals(photo.digest)))
        visible = remove_overlaps(masks & (scores >= self.score_threshold)[:, None, None])
        return ImageLabel(
            panoptic=merge_panoptic(visible, things, stuff, config.thing_clusters, self.assigner.thing_like),
            masks=masks,
            things=things,
            scores=scores.tolist(),
            is_in_panoptic=[bool(mask.any()) for mask in visible],
        )


def _to_photo_file(photo: LabeledPhoto, folder: Path) -> PhotoFile:
    height, width = read_image(photo.path).image.shape[:2]
    name = photo.path.relative_to(folder).as_posix()
    return PhotoFile(path=photo.path, name=name, digest=photo.digest, height=height, width=width)
