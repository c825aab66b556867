"""A trained detector's masks in the place of a store's: the paper's baselines, which train no universal network."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Self

import numpy as np

from model.files import replace_file
from model.pixels import read_photo
from model.rle import decode_outline
from model.weights.checkpoints import load_encoder
from training.features import fill_cache, open_cache
from training.labels.clusters.cluster import assign
from training.labels.clusters.codebook import Codebook, read_codebook
from training.labels.clusters.codebook_fit import Material, open_describer, open_stuff
from training.labels.clusters.descriptors import Describer
from training.labels.clusters.photo_view import open_view
from training.labels.clusters.stuff import StuffSource
from training.labels.masks.proposals import read_proposals, separate
from training.labels.merge import list_thing_like, merge
from training.labels.shards import LabelledPhoto, Records, plan_shards, sweep
from training.labels.store import LabelConfig, LabelStore, StoredPhoto
from training.photos import PhotoFile
from training.progress import Progress
from training.scores.meetings.answers import Source

LEAST_SCORE = 0.5
"""Of a detection that is drawn into the panoptic map, as detectron2 combines."""


@dataclass(frozen=True, kw_only=True)
class CompositionReport:
    """What was composed."""

    photos: int
    masks: int


def compose(
    detector: Source, store: LabelStore, out: LabelStore, features: Path, least_score: float = LEAST_SCORE
) -> CompositionReport:
    """Fill `out` with the detector's masks, clustered by the codebook of `store`, over that store's kind of stuff.

    "CutLER+" is such a store's masks (a detector of one class, its detections clustered afterwards), "CutLER+STEGO" its
    panoptic labels where stuff is STEGO's (U2Seg, section 4). Every detection is kept as a mask with its score; those
    of `least_score`, each at least half free of surer ones, are drawn. Raises ConfigError if `out` is another store.
    """
    config = replace(store.read_config(), proposals="detector", detector=detector.digest, tokens="patches",
                     centred=False, faithful=False, codebook=read_codebook(store.codebook).digest)  # fmt: skip
    out.claim(config)
    with replace_file(out.codebook) as sibling:
        copyfile(store.codebook, sibling)
    composer = _Composer.open(detector, store, config, features, least_score)
    shards = plan_shards(composer.material.photos, composer.causes)
    with Progress("compose", len(composer.material.photos), unit="photo") as progress:
        for shard in shards:
            if not shard.is_whole(out.shards):
                shard.write(out.shards, map(composer.label, shard.photos))
            progress.advance(len(shard.photos))
    records = Records(folder=out.shards, shards=shards)
    out.write_index(config, records)
    sweep(out.shards, shards)
    masks = sum(len(record.instances) for record in records)
    return CompositionReport(photos=len(composer.material.photos), masks=masks)


@dataclass(frozen=True, kw_only=True)
class _Composer:
    """All that turns a photo into a label."""

    detector: Source
    config: LabelConfig
    least_score: float
    material: Material
    codebook: Codebook
    describer: Describer
    stuff: StuffSource

    @classmethod
    def open(cls, detector: Source, store: LabelStore, config: LabelConfig, features: Path, least_score: float) -> Self:
        """Fills the cache with the features of the store's photos."""
        encoder = load_encoder(config.encoder, config.side_px)
        photos = [_inspect(photo, Path(config.photos)) for photo in store.read_photos()]
        cache = open_cache(features, config.encoder_hash, config.side_px)
        fill_cache(cache, photos, encoder, config.side_px)
        material = Material(
            photos=photos,
            view=partial(open_view, cache, side_px=config.side_px),
            found=lambda view: read_proposals(store.masks(view.photo.digest)),
            encoder=encoder,
            encoder_source=config.encoder,
            maps=Path(config.maps),
            scratch=store.folder / f"detector-{detector.digest[:16]}",
        )
        book = read_codebook(store.codebook)
        return cls(
            detector=detector,
            config=config,
            least_score=least_score,
            material=material,
            codebook=book,
            describer=open_describer(book, material),
            stuff=open_stuff(book, material, has_crf=config.stuff_crf),
        )

    @property
    def causes(self) -> dict[str, str | int | float]:
        """What labels depend on, beside the photos."""
        elsewhere = {"photos", "photos_hash", "encoder", "maps", "note"}
        causes = {name: value for name, value in asdict(self.config).items() if name not in elsewhere}
        return causes | {"least_score": self.least_score}

    def label(self, photo: PhotoFile) -> LabelledPhoto:
        """The panoptic label of one photo, in its own size."""
        view = self.material.view(photo)
        found = self.detector.answer(read_photo(photo.path).image, photo.digest).detections
        masks = np.array([decode_outline(each.outline) for each in found], bool)
        masks = masks.reshape(-1, photo.height, photo.width)
        scores = np.array([each.score for each in found])
        covered = np.array([view.cover(mask) for mask in masks]).reshape(-1, *view.cut(view.maps[0]).shape[:2])
        vectors = self.describer.describe(view, covered)
        things = (assign(vectors, self.codebook.things, is_spherical=self.describer.is_spherical) + 1).tolist()
        painted = separate(masks & (scores >= self.least_score)[:, None, None])
        thing_like = list_thing_like(self.codebook.inside, self.config.most_inside, self.config.merge)
        stuff = self.stuff.label_pixels(view)
        return LabelledPhoto(
            labelled=merge(painted, things, stuff, self.config.thing_clusters, thing_like),
            masks=masks,
            things=things,
            scores=scores.tolist(),
            is_painted=[bool(mask.any()) for mask in painted],
        )


def _inspect(photo: StoredPhoto, folder: Path) -> PhotoFile:
    height, width = read_photo(photo.path).image.shape[:2]
    name = photo.path.relative_to(folder).as_posix()
    return PhotoFile(path=photo.path, name=name, digest=photo.digest, height=height, width=width)
