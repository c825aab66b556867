"""Some pictures of a labelled set as a store that a fit takes: fine-tuning alone learns from people's labels."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from model.contract import Category
from model.errors import ConfigError
from model.files import hash_file
from model.pixels import read_photo
from training.labels.label import hash_photos
from training.labels.merge import Labelled
from training.labels.shards import LabelledPhoto, Records, plan_shards, sweep
from training.labels.store import LabelConfig, LabelStore
from training.photos import PhotoFile
from training.progress import show
from training.scores.meetings.comparison import hash_photo
from training.scores.naming.names import Match, Names, describe_photos
from training.scores.sets.truth import TrueLabels, Truth, TruthPicture


def draw_pictures(truth: Truth, fraction: float, seed: int) -> list[TruthPicture]:
    """That share of the set, at least one picture, in the set's order.

    Raises ConfigError if the share is not in 0..1, or if the set does not label every pixel.
    """
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"fraction must lie above 0 and at most at 1, got {fraction}")
    if truth.kind != "panoptic":
        raise ConfigError(f"{truth.name} knows {truth.kind} alone: fine-tuning takes a set with panoptic labels")
    count = max(1, round(fraction * len(truth.pictures)))
    drawn = np.random.default_rng(seed).permutation(len(truth.pictures))[:count]
    return [truth.pictures[place] for place in sorted(drawn)]


def store_annotations(
    truth: Truth, pictures: Sequence[TruthPicture], encoder: Path, side_px: int, store: LabelStore
) -> list[PhotoFile]:
    """Fill the store with these pictures' labels, category n of the set, counted from 1, being cluster n.

    Groups, and what the set does not label, are void. What is there of it is taken as it is; raises ConfigError if that
    is another store.
    """
    folder = Path(os.path.commonpath([picture.path.resolve().parent for picture in pictures]))
    photos = {_inspect(picture, folder): picture for picture in show(pictures, "scan")}
    config = LabelConfig(
        photos=str(folder),
        photos_hash=hash_photos(list(photos)),
        encoder=str(encoder.resolve()),
        encoder_hash=hash_file(encoder),
        side_px=side_px,
        proposals="annotations",
        thing_clusters=truth.taxonomy.things,
        stuff_clusters=len(truth.taxonomy.names) - truth.taxonomy.things,
        note=f"{len(photos)} pictures of {truth.name}, labelled by people",
    )
    store.claim(config)
    shards = plan_shards(list(photos), {"annotations": truth.name, "classes": truth.taxonomy.title})
    for shard in shards:
        if not shard.is_whole(store.shards):
            labels = (_read(photos[photo], photo) for photo in shard.photos)
            shard.write(store.shards, labels)
    store.write_index(config, Records(folder=store.shards, shards=shards))
    sweep(store.shards, shards)
    return list(photos)


def name_given(truth: Truth, store: LabelStore, source: str) -> Names:
    """The set's own names for the clusters of such a store, knowing the photos, so that none is scored later."""
    names = truth.taxonomy.names
    return Names(
        source=source,
        method="given",
        thresholds=None,
        fitted_on=describe_photos(truth.name, [photo.digest for photo in store.read_photos()]),
        thing_clusters=truth.taxonomy.things,
        stuff_clusters=len(names) - truth.taxonomy.things,
        things=truth.taxonomy.things,
        categories=tuple(Category(id=number, name=name) for number, name in enumerate(names, start=1)),
        clusters={number: Match(category=number, share=1.0, met=0) for number in range(1, len(names) + 1)},
    )


def _inspect(picture: TruthPicture, folder: Path) -> PhotoFile:
    height, width = read_photo(picture.path).image.shape[:2]
    name = picture.path.resolve().relative_to(folder).as_posix()
    return PhotoFile(path=picture.path, name=name, digest=hash_photo(picture), height=height, width=width)


def _read(picture: TruthPicture, photo: PhotoFile) -> LabelledPhoto:
    labels = picture.annotation.read(photo.height, photo.width)
    objects = [each for each in labels.objects if not each.is_crowd and each.rle is not None]
    masks = np.array([coco.decode(each.rle) for each in objects], bool).reshape(-1, photo.height, photo.width)
    things = [each.category + 1 for each in objects]
    return LabelledPhoto(labelled=_number(labels), masks=masks, things=things, scores=None)


def _number(labels: TrueLabels) -> Labelled:
    """Segments counted from 1, their categories from 1."""
    assert labels.label_map is not None, "a panoptic set labels every picture's pixels"
    kept = [each for each in labels.segments if each not in labels.crowds]
    numbered = np.zeros(labels.label_map.shape, np.int32)
    categories = {}
    for number, segment in enumerate(kept, start=1):
        numbered[labels.label_map == segment] = number
        categories[number] = labels.segments[segment] + 1
    return Labelled(label_map=numbered, categories=categories)
