"""What is done to a photo without a look at the others: its features, its masks, its label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

from model.network.vit import VisionTransformer
from model.weights.checkpoints import load_encoder
from training.features import compute_features, fill, open_cache, read_square
from training.labels.clusters.codebook import read_codebook
from training.labels.clusters.codebook_fit import Material
from training.labels.clusters.photo_view import PhotoView, open_view
from training.labels.clusters.views import read_views
from training.labels.finder import Finder, find_salient
from training.labels.labeller import Labeller
from training.labels.masks.keys import compute_keys, open_key_cache, read_stretched
from training.labels.masks.proposals import Proposals, read_proposals
from training.labels.shards import Shard, make_shard
from training.labels.store import LabelConfig, LabelStore
from training.photos import PhotoFile

Stage = Literal["features", "masks", "labels"]
"""Masks of a vote need the store's views, labels its codebook; both are of all photos."""
Group = Sequence[PhotoFile]
"""As many photos as a shard."""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Everything is on disk: whoever opens the same store goes on with it, in another process or on another machine."""

    config: LabelConfig
    store: LabelStore
    features: Path
    """Folder of the feature caches."""
    unit: ClassVar[str] = "photo"

    def work(self, stage: Stage, photos: Group) -> Iterator[int]:
        """Do what a stage lacks for these photos; gives how many are done, some at a time."""
        match stage:
            case "features":
                yield from self._fill(photos)
            case "masks":
                for photo in photos:
                    if not self.store.masks(photo.digest).is_file():
                        self._finder.find(self.view(photo)).write(self.store.masks(photo.digest))
                    yield 1
            case "labels":
                shard = self.plan(photos)
                if not shard.is_whole(self.store.shards):
                    shard.write(self.store.shards, map(self.labeller.label, photos))
                yield len(photos)

    def list_unlabelled(self, groups: Sequence[Group]) -> list[Group]:
        """Those whose labels are not there yet, and with them perhaps no more their features and masks."""
        if not self.store.codebook.is_file():
            return list(groups)
        return [group for group in groups if not self.plan(group).is_whole(self.store.shards)]

    def plan(self, photos: Group) -> Shard:
        """The shard of these photos, written or not. Raises LabelStoreError while there is no codebook."""
        return make_shard(photos, self.labeller.causes, self.labeller.hash_map)

    def view(self, photo: PhotoFile) -> PhotoView:
        """The photo with its features."""
        return self._open(photo)

    def find(self, photo: PhotoFile) -> Proposals:
        """The photo's masks, once they are found."""
        return read_proposals(self.store.masks(photo.digest))

    @cached_property
    def encoder(self) -> VisionTransformer:
        return load_encoder(self.config.encoder, self.config.side_px)

    @cached_property
    def labeller(self) -> Labeller:
        """Raises LabelStoreError while there is no codebook."""
        return Labeller.make(self.gather([]), read_codebook(self.store.codebook), self.config)

    def gather(self, photos: Group) -> Material:
        """What a codebook is fitted on, and used with."""
        config = self.config
        return Material(
            photos=photos,
            view=self.view,
            found=lambda view: self.find(view.photo),
            encoder=self.encoder,
            encoder_source=config.encoder,
            maps=Path(config.maps),
            scratch=self.store.folder,
            salient=partial(find_salient, self.encoder) if config.proposals == "vote" else None,
            objects=config.objects,
        )

    def _fill(self, photos: Group) -> Iterator[int]:
        config = self.config
        compute = partial(compute_features, self.encoder)
        if config.tokens == "keys":
            keys = open_key_cache(self.features, config.encoder_hash, config.side_px)
            for _ in fill(keys, photos, partial(read_stretched, config.side_px), partial(compute_keys, self.encoder)):
                pass
        cache = open_cache(self.features, config.encoder_hash, config.side_px)
        yield from fill(cache, photos, partial(read_square, config.side_px), compute)

    @cached_property
    def _open(self) -> partial[PhotoView]:
        cache = open_cache(self.features, self.config.encoder_hash, self.config.side_px)
        return partial(open_view, cache, side_px=self.config.side_px)

    @cached_property
    def _finder(self) -> Finder:
        finder = Finder(config=self.config, encoder=self.encoder)
        if self.config.tokens == "keys":
            keys = open_key_cache(self.features, self.config.encoder_hash, self.config.side_px)
            finder = replace(finder, keys=keys)
        if self.config.proposals == "vote":
            finder = replace(finder, views=read_views(self.store.views))
        return finder
