"""A trained detector's masks in the place of a store's: the paper's baselines, which train no universal network."""

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

LEAST_SCORE = 0.5
"""Of a detection that is drawn into the panoptic map, as detectron2 combines."""


@dataclass(frozen=True, kw_only=True)
class DetectorLabelsReport:
    """What was composed."""

    photos: int
    masks: int


def build_detector_labels(
    detector: Predictor,
    store: PseudoLabelDataset,
    out: PseudoLabelDataset,
    features: Path,
    least_score: float = LEAST_SCORE,
) -> DetectorLabelsReport:
    """Fill `out` with the detector's masks, clustered by the codebook of `store`, over that store's kind of stuff.

    "CutLER+" is such a store's masks (a detector of one class, its detections clustered afterwards), "CutLER+STEGO" its
    panoptic labels where stuff is STEGO's (U2Seg, section 4). Every detection is kept as a mask with its score; those
    of `least_score`, each at least half free of surer ones, are drawn. Raises ConfigError if `out` is another store.
    """
    codebook = load_codebook(store.codebook)
    config = replace(
        store.read_config(),
        mask_source="detector",
        detector_hash=detector.digest,
        codebook_hash=codebook.digest,
    )
    out.lock_config(config)
    with atomic_write(out.codebook) as sibling:
        copyfile(store.codebook, sibling)
    photos = [_inspect(photo, Path(config.photos)) for photo in store.read_photos()]
    encoder = load_encoder(config.encoder, config.side_px)
    feature_store = FeatureStore.open(features, encoder, config.encoder_hash, config)
    feature_store.fill_all(photos)
    labeler = _DetectorLabeler(
        detector=detector,
        store=store,
        config=config,
        least_score=least_score,
        features=feature_store,
        assigner=ClusterAssigner(codebook, config, store.folder / f"detector-{detector.digest[:16]}"),
    )
    records = out.write_labels(config, photos, labeler.dependencies, labeler.label)
    return DetectorLabelsReport(photos=len(photos), masks=sum(len(record.instances) for record in records))


@dataclass(frozen=True, kw_only=True)
class _DetectorLabeler:
    """Labels a photo with the masks of a detector."""

    detector: Predictor
    store: PseudoLabelDataset
    config: PseudoLabelConfig
    least_score: float
    features: FeatureStore
    assigner: ClusterAssigner

    @property
    def dependencies(self) -> dict[str, Any]:
        """What labels depend on, besides the photos."""
        provenance = {"photos", "photos_hash", "encoder", "stuff_maps_dir", "data_source"}
        settings = {name: value for name, value in to_json(self.config).items() if name not in provenance}
        return settings | {"least_score": self.least_score}

    def label(self, photo: PhotoFile) -> ImageLabel:
        """Return the panoptic label of one photo, in its own size."""
        features, config = self.features.load(photo), self.config
        found = self.detector.predict(read_image(photo.path).image, photo.digest).detections
        masks = np.array([decode_rle(each.rle) for each in found], bool)
        masks = masks.reshape(-1, photo.height, photo.width)
        scores = np.array([each.score for each in found])
        covered = np.array([features.patches_in_mask(mask) for mask in masks], bool).reshape(-1, *features.grid_size)
        things = self.assigner.assign_things(features, covered).tolist()
        stuff = self.assigner.segment_stuff(features, load_proposals(self.store.proposals(photo.digest)))
        painted = remove_overlaps(masks & (scores >= self.least_score)[:, None, None])
        return ImageLabel(
            panoptic=merge_panoptic(painted, things, stuff, config.thing_clusters, self.assigner.thing_like),
            masks=masks,
            things=things,
            scores=scores.tolist(),
            is_in_panoptic=[bool(mask.any()) for mask in painted],
        )


def _inspect(photo: LabeledPhoto, folder: Path) -> PhotoFile:
    height, width = read_image(photo.path).image.shape[:2]
    name = photo.path.relative_to(folder).as_posix()
    return PhotoFile(path=photo.path, name=name, digest=photo.digest, height=height, width=width)
