"""Photos to a store of panoptic pseudo-labels, stage by stage; each stage takes up where it was left."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Bool, Float

from model.contract import Canvas
from model.errors import ConfigError
from model.network.mask_transformer import STRIDE_PX
from model.network.vit import VisionTransformer
from model.pixels import place, read_photo, resize_map
from model.weights.checkpoints import load_encoder
from training.features import fill_cache, open_cache
from training.labels.cluster import assign
from training.labels.codebook import Codebook, read_codebook, select_config
from training.labels.codebook_fit import Material, fit_codebook, open_describer, open_judge, open_stuff
from training.labels.dense_crf import require_dense_crf
from training.labels.descriptors import Describer
from training.labels.discovery_recipe import MOST_OBJECTS
from training.labels.finder import Finder, find_salient, sample_views
from training.labels.keys import fill_keys, open_key_cache
from training.labels.merge import list_thing_like, merge
from training.labels.photo_view import PhotoView, open_view
from training.labels.proposals import Proposals, read_proposals, separate
from training.labels.refine import check_refinement, refine
from training.labels.shards import LabelledPhoto, Records, plan_shards, sweep
from training.labels.store import LabelConfig, LabelStore
from training.labels.stuff import MapStuff, StuffSource
from training.labels.thingness import Judge
from training.labels.views import read_views
from training.photos import PhotoFile, Scan
from training.progress import Progress, show

MOST_MASKS = 40
"""Of a vote, that one photo keeps; a third of them are gone once they were refined."""


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What was labelled."""

    photos: int
    masks: int
    photos_without_mask: int
    broken: tuple[str, ...]
    duplicates: int


def hash_photos(photos: Sequence[PhotoFile]) -> str:
    """One hash over all names and contents, in order."""
    joined = "\n".join(f"{photo.name} {photo.digest}" for photo in photos)
    return hashlib.sha256(joined.encode()).hexdigest()


def label_photos(
    scan: Scan, config: LabelConfig, store: LabelStore, features: Path, given: Codebook | None = None
) -> LabelReport:
    """Fill the store: features, masks, codebook (fitted here, unless it is given), panoptic labels, index.

    What is there of them is taken as it is.
    """
    _check(config, given)
    encoder = load_encoder(config.encoder, config.side_px)
    store.claim(config)
    photos = list(scan.photos)
    cache = open_cache(features, config.encoder_hash, config.side_px)
    fill_cache(cache, photos, encoder, config.side_px)
    open_photo = partial(open_view, cache, side_px=config.side_px)
    read_found = _find_all(photos, open_photo, encoder, config, store, features)
    material = Material(
        photos=photos,
        view=open_photo,
        found=lambda view: read_found(view.photo),
        encoder=encoder,
        encoder_source=config.encoder,
        maps=Path(config.maps),
        scratch=store.folder,
        salient=partial(find_salient, encoder) if config.proposals == "vote" else None,
        objects=config.objects,
    )
    if not store.codebook.is_file():
        (given or fit_codebook(material, select_config(config))).write(store.codebook)
    labeller = _Labeller.make(material, read_codebook(store.codebook), config)
    shards = plan_shards(photos, labeller.causes, labeller.hash_map)
    with Progress("labels", len(photos), unit="photo") as progress:
        for shard in shards:
            if not shard.is_whole(store.shards):
                shard.write(store.shards, map(labeller.label, shard.photos))
            progress.advance(len(shard.photos))
    records = Records(folder=store.shards, shards=shards)
    store.write_index(config, records)
    sweep(store.shards, shards)
    return _report(scan, config, records)


def _check(config: LabelConfig, given: Codebook | None) -> None:
    """Raise ConfigError if a package is not there, or if the codebook knows too little."""
    check_refinement(config.refinement)
    if config.stuff_crf:
        require_dense_crf("a dense CRF on stuff")
    if given is not None and config.proposals == "vote" and open_judge(given) is None:
        raise ConfigError("the codebook was not fitted on a vote and cannot tell its things: fit another")


@dataclass(frozen=True, kw_only=True)
class _Labeller:
    """All that turns a photo into a label."""

    material: Material
    codebook: Codebook
    config: LabelConfig
    judge: Judge | None
    describer: Describer
    stuff: StuffSource
    thing_like: frozenset[int]
    """Stuff clusters that the merge takes for things."""

    @classmethod
    def make(cls, material: Material, codebook: Codebook, config: LabelConfig) -> Self:
        return cls(
            material=material,
            codebook=codebook,
            config=config,
            judge=open_judge(codebook) if config.proposals == "vote" else None,
            describer=open_describer(codebook, material),
            stuff=open_stuff(codebook, material, has_crf=config.stuff_crf),
            thing_like=list_thing_like(codebook.inside, config.most_inside, config.merge),
        )

    @property
    def causes(self) -> dict[str, str | int | float]:
        """What labels depend on, beside the photos."""
        elsewhere = {"photos", "photos_hash", "encoder", "maps", "codebook", "note"}
        causes = {name: value for name, value in asdict(self.config).items() if name not in elsewhere}
        return causes | {"codebook": self.codebook.digest}

    def hash_map(self, photo: PhotoFile) -> str:
        """Of the photo's stuff map, if it comes as a file."""
        return self.stuff.hash_map(photo) if isinstance(self.stuff, MapStuff) else ""

    def label(self, photo: PhotoFile) -> LabelledPhoto:
        """The panoptic pseudo-label of one photo, in its own size."""
        view, config = self.material.view(photo), self.config
        found = self.material.found(view)
        if self.judge is not None:
            found = self.judge.judge(view, found).keep(MOST_MASKS, 0.0)
        square, _ = place(read_photo(photo.path).image, [Canvas.square(config.side_px)], STRIDE_PX)
        height, width = view.placement.size
        placed = np.ascontiguousarray(square[:, :height, :width].transpose(1, 2, 0))
        fine = refine(found.soft, placed, view.patch_px, config.refinement)
        kept = fine.any((1, 2))
        masks = [resize_map(mask.astype(np.float32), photo.height, photo.width) > 0.5 for mask in fine[kept]]
        stacked = np.array(masks, bool).reshape(len(masks), photo.height, photo.width)
        vectors = self.describer.describe(view, found.hard)[kept]
        clusters = assign(vectors, self.codebook.things, is_spherical=self.describer.is_spherical) + 1
        stuff = self.stuff.label_pixels(view)
        painted = self._choose(stacked, found.scores[kept])
        labelled = merge(painted, clusters.tolist(), stuff, config.thing_clusters, self.thing_like)
        scores = found.scores[kept].tolist()
        return LabelledPhoto(
            labelled=labelled,
            masks=stacked,
            things=clusters.tolist(),
            scores=scores,
            is_painted=[bool(mask.any()) for mask in painted],
        )

    def _choose(self, masks: Bool[np.ndarray, "N H W"], scores: Float[np.ndarray, "N"]) -> Bool[np.ndarray, "N H W"]:
        """What of each mask goes into the panoptic map; of a vote's only the likeliest things do, and lie apart."""
        if self.judge is None:
            return masks
        is_thing = scores >= self.codebook.least_scores[self.config.objects - 1]
        is_thing[MOST_OBJECTS:] = False
        return separate(masks & is_thing[:, None, None])


def _report(scan: Scan, config: LabelConfig, records: Records) -> LabelReport:
    masks = bare = 0
    for record in records:
        things = sum(segment["category_id"] <= config.thing_clusters for segment in record.segments)
        masks += things
        bare += not things
    return LabelReport(
        photos=len(scan.photos),
        masks=masks,
        photos_without_mask=bare,
        broken=scan.broken,
        duplicates=scan.duplicates,
    )


def _find_all(
    photos: Sequence[PhotoFile],
    open_photo: Callable[[PhotoFile], PhotoView],
    encoder: VisionTransformer,
    config: LabelConfig,
    store: LabelStore,
    features: Path,
) -> Callable[[PhotoFile], Proposals]:
    """Fill the store's masks; returns what reads a photo's."""
    finder = Finder(config=config, encoder=encoder)
    if config.tokens == "keys":
        keys = open_key_cache(features, config.encoder_hash, config.side_px)
        fill_keys(keys, photos, encoder, config.side_px)
        finder = replace(finder, keys=keys)
    if config.proposals == "vote":
        if not store.views.is_file():
            sample_views(photos, open_photo, encoder, config.seed).write(store.views)
        finder = replace(finder, views=read_views(store.views))
    for photo in show(photos, "masks"):
        if not store.masks(photo.digest).is_file():
            finder.find(open_photo(photo)).write(store.masks(photo.digest))
    return lambda photo: read_proposals(store.masks(photo.digest))
