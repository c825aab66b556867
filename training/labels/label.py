"""Photos to a store of panoptic pseudo-labels, stage by stage; each stage takes up where it was left."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.errors import ConfigError
from training.engines import WHOLE, Engine, LocalEngine, Part
from training.labels.clusters.codebook import Codebook, select_config
from training.labels.clusters.codebook_fit import fit_codebook, open_judge
from training.labels.clusters.views import read_views
from training.labels.finder import sample_views
from training.labels.masks.dense_crf import require_dense_crf
from training.labels.masks.refine import check_refinement
from training.labels.shards import Records, split, sweep
from training.labels.store import LabelConfig, LabelStore
from training.labels.workshop import Workshop
from training.photos import PhotoFile, Scan


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
    scan: Scan,
    config: LabelConfig,
    store: LabelStore,
    features: Path,
    given: Codebook | None = None,
    *,
    engine: Engine | None = None,
    part: Part = WHOLE,
) -> LabelReport:
    """Fill the store: features, masks, codebook (fitted here, unless it is given), panoptic labels, index.

    What is there of them is taken as it is. One of several parts does its share with a given codebook, and leaves the
    index to a later run without a part. Raises ConfigError if the options contradict each other or the codebook.
    """
    _check(config, given, part)
    workshop, engine = Workshop(config=config, store=store, features=features), engine or LocalEngine()
    _ = workshop.encoder  # one that does not fit leaves no store behind
    store.claim(config)
    if given and not store.codebook.is_file():
        given.write(store.codebook)
    groups = part.choose(split(scan.photos))
    # A finished store that is given again gets back what was deleted of features and masks; a part's may be elsewhere.
    left = groups if store.is_finished else workshop.list_unlabelled(groups)
    engine.run(workshop, "features", left)
    if left and config.proposals == "vote" and not store.views.is_file():
        views = given.views if given else None
        (views or sample_views(scan.photos, workshop.view, workshop.encoder, config.seed)).write(store.views)
    engine.run(workshop, "masks", left)
    if not store.codebook.is_file():
        book = fit_codebook(workshop.gather(scan.photos), select_config(config))
        replace(book, views=read_views(store.views) if config.proposals == "vote" else None).write(store.codebook)
    engine.run(workshop, "labels", left)
    records = Records(folder=store.shards, shards=[workshop.plan(group) for group in groups])
    if part == WHOLE:
        store.write_index(config, records)
        sweep(store.shards, records.shards)
    return _report(scan, config, records)


def _check(config: LabelConfig, given: Codebook | None, part: Part) -> None:
    """Raise ConfigError if a package is not there, or if the codebook knows too little."""
    check_refinement(config.refinement)
    if config.stuff_crf:
        require_dense_crf("a dense CRF on stuff")
    if given is None and part != WHOLE:
        raise ConfigError("a part of the photos has no clusters of its own: give the codebook of some labelled photos")
    if given is not None and config.proposals == "vote":
        if open_judge(given) is None:
            raise ConfigError(
                "the codebook was not fitted on a vote and cannot tell its things: choose --proposals maskcut"
            )
        if given.views is None and part != WHOLE:
            raise ConfigError("the codebook lacks the views that a vote looks at, as older ones do: fit another")


def _report(scan: Scan, config: LabelConfig, records: Records) -> LabelReport:
    photos = masks = bare = 0
    for record in records:
        things = sum(segment["category_id"] <= config.thing_clusters for segment in record.segments)
        photos += 1
        masks += things
        bare += not things
    return LabelReport(
        photos=photos,
        masks=masks,
        photos_without_mask=bare,
        broken=scan.broken,
        duplicates=scan.duplicates,
    )
