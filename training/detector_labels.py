"""A trained detector's masks in the place of a store's: the paper's baselines, which train no universal network."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Self

import numpy as np

from model.checkpoints.state_dicts import load_encoder
from model.files import atomic_write
from model.formats.rle import decode_rle
from model.images import read_image
from training.data.dataset import LabeledPhoto, PseudoLabelConfig, PseudoLabelDataset
from training.data.features import fill_cache, open_cache
from training.data.panoptic_labels import (
    ImageLabel,
    ImageRecords,
    find_thing_like_stuff,
    merge_panoptic,
    plan_chunks,
    remove_stale,
)
from training.data.photos import PhotoFile
from training.evaluation.predictors import Predictor
from training.progress import Progress
from training.pseudo_labels.clustering import CodebookInputs, make_mask_embedder, make_stuff_segmenter
from training.pseudo_labels.codebook import Codebook, StuffSegmenter, load_codebook
from training.pseudo_labels.kmeans import nearest_centroid
from training.pseudo_labels.mask_embeddings import MaskEmbedder
from training.pseudo_labels.maskcut import load_proposals, remove_overlaps
from training.pseudo_labels.photo_features import load_photo_features

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
    config = replace(
        store.read_config(),
        proposals="detector",
        detector=detector.digest,
        tokens="patches",
        maskcut_subtract_mean=False,
        maskcut_reference_filters=False,
        codebook=load_codebook(store.codebook).digest,
    )
    out.lock_config(config)
    with atomic_write(out.codebook) as sibling:
        copyfile(store.codebook, sibling)
    composer = _DetectorLabeler.open(detector, store, config, features, least_score)
    shards = plan_chunks(composer.material.photos, composer.causes)
    with Progress("build_detector_labels", len(composer.material.photos), unit="photo") as progress:
        for shard in shards:
            if not shard.is_complete(out.shards):
                shard.write(out.shards, map(composer.label, shard.photos))
            progress.advance(len(shard.photos))
    records = ImageRecords(folder=out.shards, shards=shards)
    out.write_index(config, records)
    remove_stale(out.shards, shards)
    masks = sum(len(record.instances) for record in records)
    return DetectorLabelsReport(photos=len(composer.material.photos), masks=masks)


@dataclass(frozen=True, kw_only=True)
class _DetectorLabeler:
    """All that turns a photo into a label."""

    detector: Predictor
    config: PseudoLabelConfig
    least_score: float
    material: CodebookInputs
    codebook: Codebook
    describer: MaskEmbedder
    stuff: StuffSegmenter

    @classmethod
    def open(
        cls,
        detector: Predictor,
        store: PseudoLabelDataset,
        config: PseudoLabelConfig,
        features: Path,
        least_score: float,
    ) -> Self:
        """Fills the cache with the features of the store's photos."""
        encoder = load_encoder(config.encoder, config.side_px)
        photos = [_inspect(photo, Path(config.photos)) for photo in store.read_photos()]
        cache = open_cache(features, config.encoder_hash, config.side_px)
        fill_cache(cache, photos, encoder, config.side_px)
        material = CodebookInputs(
            photos=photos,
            view=partial(load_photo_features, cache, side_px=config.side_px),
            found=lambda view: load_proposals(store.masks(view.photo.digest)),
            encoder=encoder,
            encoder_source=config.encoder,
            maps=Path(config.maps),
            scratch=store.folder / f"detector-{detector.digest[:16]}",
        )
        book = load_codebook(store.codebook)
        return cls(
            detector=detector,
            config=config,
            least_score=least_score,
            material=material,
            codebook=book,
            describer=make_mask_embedder(book, material),
            stuff=make_stuff_segmenter(book, material, has_crf=config.stuff_crf),
        )

    @property
    def causes(self) -> dict[str, str | int | float]:
        """What labels depend on, beside the photos."""
        elsewhere = {"photos", "photos_hash", "encoder", "maps", "note"}
        causes = {name: value for name, value in asdict(self.config).items() if name not in elsewhere}
        return causes | {"least_score": self.least_score}

    def label(self, photo: PhotoFile) -> ImageLabel:
        """The panoptic label of one photo, in its own size."""
        view = self.material.view(photo)
        found = self.detector.predict(read_image(photo.path).image, photo.digest).detections
        masks = np.array([decode_rle(each.rle) for each in found], bool)
        masks = masks.reshape(-1, photo.height, photo.width)
        scores = np.array([each.score for each in found])
        covered = np.array([view.cover(mask) for mask in masks]).reshape(-1, *view.cut(view.maps[0]).shape[:2])
        vectors = self.describer.embed(view, covered)
        things = (
            nearest_centroid(vectors, self.codebook.things, is_spherical=self.describer.is_spherical) + 1
        ).tolist()
        painted = remove_overlaps(masks & (scores >= self.least_score)[:, None, None])
        thing_like = find_thing_like_stuff(self.codebook.inside, self.config.max_stuff_in_things, self.config.merge)
        stuff = self.stuff.label_pixels(view)
        return ImageLabel(
            panoptic=merge_panoptic(painted, things, stuff, self.config.thing_clusters, thing_like),
            masks=masks,
            things=things,
            scores=scores.tolist(),
            is_in_panoptic=[bool(mask.any()) for mask in painted],
        )


def _inspect(photo: LabeledPhoto, folder: Path) -> PhotoFile:
    height, width = read_image(photo.path).image.shape[:2]
    name = photo.path.relative_to(folder).as_posix()
    return PhotoFile(path=photo.path, name=name, digest=photo.digest, height=height, width=width)
