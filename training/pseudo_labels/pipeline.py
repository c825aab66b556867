"""Photos to a store of panoptic pseudo-labels, stage by stage; each stage takes up where it was left."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from jaxtyping import Bool, Float

from model.checkpoints.state_dicts import load_encoder
from model.contract import InputSize
from model.errors import ConfigError
from model.images import letterbox_image, read_image, resize_map
from model.networks.mask_transformer import MASK_STRIDE_PX
from model.networks.vit import VisionTransformer
from training.data.dataset import PseudoLabelConfig, PseudoLabelDataset
from training.data.executors import ALL_SHARDS, Executor, JobShard, LocalExecutor
from training.data.features import (
    FeatureCache,
    compute_features,
    compute_key_features,
    fill_incrementally,
    final_tokens,
    load_padded,
    load_resized,
    open_cache,
    open_key_cache,
)
from training.data.label_config import MAX_OBJECTS, MaskDiscoveryConfig
from training.data.panoptic_labels import (
    Chunk,
    ImageLabel,
    ImageRecords,
    find_thing_like_stuff,
    make_chunk,
    merge_panoptic,
    remove_stale,
    split_into_chunks,
)
from training.data.photos import PhotoFile, PhotoScan
from training.progress import track
from training.pseudo_labels.clustering import (
    CodebookInputs,
    fit_codebook,
    make_mask_embedder,
    make_objectness_scorer,
    make_stuff_segmenter,
)
from training.pseudo_labels.codebook import (
    Codebook,
    ObjectnessScorer,
    PrecomputedStuff,
    StuffSegmenter,
    extract_codebook_config,
    load_codebook,
)
from training.pseudo_labels.consensus import FeatureProjections, consensus_masks, fit_projections, load_projections
from training.pseudo_labels.kmeans import nearest_centroid
from training.pseudo_labels.mask_embeddings import MaskEmbedder
from training.pseudo_labels.maskcut import (
    MaskCutConfig,
    MaskProposals,
    load_proposals,
    maskcut,
    proposals_from_masks,
    remove_overlaps,
)
from training.pseudo_labels.photo_features import PhotoFeatures, load_photo_features
from training.pseudo_labels.refinement import check_refinement_method, refine_masks, require_pydensecrf


@dataclass(frozen=True, kw_only=True)
class PseudoLabelReport:
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
    scan: PhotoScan,
    config: PseudoLabelConfig,
    store: PseudoLabelDataset,
    features: Path,
    given: Codebook | None = None,
    *,
    engine: Executor | None = None,
    part: JobShard = ALL_SHARDS,
) -> PseudoLabelReport:
    """Fill the store: features, masks, codebook (fitted here, unless it is given), panoptic labels, index.

    What is there of them is taken as it is. One of several parts does its share with a given codebook, and leaves the
    index to a later run without a part. Raises ConfigError if the options contradict each other or the codebook.
    """
    _check_options(config, given, part)
    workshop, engine = PseudoLabelWorker(config=config, store=store, features=features), engine or LocalExecutor()
    _ = workshop.encoder  # one that does not fit leaves no store behind
    store.lock_config(config)
    if given and not store.codebook.is_file():
        given.write(store.codebook)
    groups = part.choose(split_into_chunks(scan.photos))
    # A finished store that is given again gets back what was deleted of features and masks; a part's may be elsewhere.
    left = groups if store.is_finished else workshop.list_unlabelled(groups)
    engine.run(workshop, "features", left)
    if left and config.proposals == "vote" and not store.views.is_file():
        views = given.views if given else None
        (views or fit_feature_projections(scan.photos, workshop.view, workshop.encoder, config.seed)).write(store.views)
    engine.run(workshop, "masks", left)
    if not store.codebook.is_file():
        book = fit_codebook(workshop.gather(scan.photos), extract_codebook_config(config))
        replace(book, views=load_projections(store.views) if config.proposals == "vote" else None).write(store.codebook)
    engine.run(workshop, "labels", left)
    records = ImageRecords(folder=store.shards, shards=[workshop.plan(group) for group in groups])
    if part == ALL_SHARDS:
        store.write_index(config, records)
        remove_stale(store.shards, records.shards)
    return _summarize(scan, config, records)


def _check_options(config: PseudoLabelConfig, given: Codebook | None, part: JobShard) -> None:
    """Raise ConfigError if a package is not there, or if the codebook knows too little."""
    check_refinement_method(config.refinement)
    if config.stuff_crf:
        require_pydensecrf("a dense CRF on stuff")
    if given is None and part != ALL_SHARDS:
        raise ConfigError("a part of the photos has no clusters of its own: give the codebook of some labelled photos")
    if given is not None and config.proposals == "vote":
        if make_objectness_scorer(given) is None:
            raise ConfigError(
                "the codebook was not fitted on a vote and cannot tell its things: choose --proposals maskcut"
            )
        if given.views is None and part != ALL_SHARDS:
            raise ConfigError("the codebook lacks the views that a vote looks at, as older ones do: fit another")


def _summarize(scan: PhotoScan, config: PseudoLabelConfig, records: ImageRecords) -> PseudoLabelReport:
    photos = masks = bare = 0
    for record in records:
        things = sum(segment["category_id"] <= config.thing_clusters for segment in record.segments)
        photos += 1
        masks += things
        bare += not things
    return PseudoLabelReport(
        photos=photos,
        masks=masks,
        photos_without_mask=bare,
        broken=scan.broken,
        duplicates=scan.duplicates,
    )


Stage = Literal["features", "masks", "labels"]
"""Masks of a vote need the store's views, labels its codebook; both are of all photos."""
Group = Sequence[PhotoFile]
"""As many photos as a shard."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabeler:
    """All that turns a photo into a label."""

    material: CodebookInputs
    codebook: Codebook
    config: PseudoLabelConfig
    judge: ObjectnessScorer | None
    describer: MaskEmbedder
    stuff: StuffSegmenter
    thing_like: frozenset[int]
    """Stuff clusters that the merge takes for things."""

    @classmethod
    def make(cls, material: CodebookInputs, codebook: Codebook, config: PseudoLabelConfig) -> Self:
        return cls(
            material=material,
            codebook=codebook,
            config=config,
            judge=make_objectness_scorer(codebook) if config.proposals == "vote" else None,
            describer=make_mask_embedder(codebook, material),
            stuff=make_stuff_segmenter(codebook, material, has_crf=config.stuff_crf),
            thing_like=find_thing_like_stuff(codebook.inside, config.max_stuff_in_things, config.merge),
        )

    @property
    def causes(self) -> dict[str, str | int | float]:
        """What labels depend on, beside the photos."""
        elsewhere = {"photos", "photos_hash", "encoder", "maps", "codebook", "note"}
        causes = {name: value for name, value in asdict(self.config).items() if name not in elsewhere}
        return causes | {"codebook": self.codebook.digest}

    def hash_map(self, photo: PhotoFile) -> str:
        """Of the photo's stuff map, if it comes as a file."""
        return self.stuff.hash_map(photo) if isinstance(self.stuff, PrecomputedStuff) else ""

    def label(self, photo: PhotoFile) -> ImageLabel:
        """The panoptic pseudo-label of one photo, in its own size."""
        view, config = self.material.view(photo), self.config
        found = self.material.found(view)
        if self.judge is not None:
            found = self.judge.judge(view, found).top_k(MAX_MASKS, 0.0)
        square, _ = letterbox_image(read_image(photo.path).image, [InputSize.square(config.side_px)], MASK_STRIDE_PX)
        height, width = view.letterbox.size
        placed = np.ascontiguousarray(square[:, :height, :width].transpose(1, 2, 0))
        fine = refine_masks(found.soft, placed, view.patch_px, config.refinement)
        kept = fine.any((1, 2))
        masks = [resize_map(mask.astype(np.float32), photo.height, photo.width) > 0.5 for mask in fine[kept]]
        stacked = np.array(masks, bool).reshape(len(masks), photo.height, photo.width)
        vectors = self.describer.embed(view, found.binary)[kept]
        clusters = nearest_centroid(vectors, self.codebook.things, is_spherical=self.describer.is_spherical) + 1
        stuff = self.stuff.label_pixels(view)
        painted = self._choose(stacked, found.scores[kept])
        labelled = merge_panoptic(painted, clusters.tolist(), stuff, config.thing_clusters, self.thing_like)
        scores = found.scores[kept].tolist()
        return ImageLabel(
            panoptic=labelled,
            masks=stacked,
            things=clusters.tolist(),
            scores=scores,
            is_in_panoptic=[bool(mask.any()) for mask in painted],
        )

    def _choose(self, masks: Bool[np.ndarray, "N H W"], scores: Float[np.ndarray, "N"]) -> Bool[np.ndarray, "N H W"]:
        """What of each mask goes into the panoptic map; of a vote's only the likeliest things do, and lie apart."""
        if self.judge is None:
            return masks
        is_thing = scores >= self.codebook.score_thresholds[self.config.objects - 1]
        is_thing[MAX_OBJECTS:] = False
        return remove_overlaps(masks & is_thing[:, None, None])


@dataclass(frozen=True, kw_only=True)
class MaskProposer:
    """What finds masks on the patches that show a photo."""

    config: MaskDiscoveryConfig
    encoder: VisionTransformer
    keys: FeatureCache | None = None
    """Filled, if keys are what is cut."""
    views: FeatureProjections | None = None
    """Fitted, if there is a vote."""

    def find(self, view: PhotoFeatures) -> MaskProposals:
        """Raises LabelStoreError if the features are missing or not finite."""
        config = self.config
        plan = MaskCutConfig(
            maskcut_n=config.maskcut_n,
            threshold=config.threshold,
            is_centred=config.maskcut_subtract_mean,
            is_faithful=config.maskcut_reference_filters,
        )
        tokens = _final_tokens(self.encoder, view)
        if self.views is not None:
            return consensus_masks(tokens, self.views.look(tokens))
        if self.keys is None:
            return proposals_from_masks(maskcut(tokens, plan))
        found = proposals_from_masks(maskcut(np.asarray(self.keys.read(view.photo.digest)[0]), plan))
        # The keys saw the photo stretched to a square: the masks are laid on the patches that show it.
        laid = [resize_map(mask, *tokens.shape[:2]) for mask in found.soft]
        return MaskProposals(soft=np.array(laid, np.float32).reshape(-1, *tokens.shape[:2]), scores=found.scores)


@dataclass(frozen=True, kw_only=True)
class PseudoLabelWorker:
    """Everything is on disk: whoever opens the same store goes on with it, in another process or on another machine."""

    config: PseudoLabelConfig
    store: PseudoLabelDataset
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
                if not shard.is_complete(self.store.shards):
                    shard.write(self.store.shards, map(self.labeller.label, photos))
                yield len(photos)

    def list_unlabelled(self, groups: Sequence[Group]) -> list[Group]:
        """Those whose labels are not there yet, and with them perhaps no more their features and masks."""
        if not self.store.codebook.is_file():
            return list(groups)
        return [group for group in groups if not self.plan(group).is_complete(self.store.shards)]

    def plan(self, photos: Group) -> Chunk:
        """The shard of these photos, written or not. Raises LabelStoreError while there is no codebook."""
        return make_chunk(photos, self.labeller.causes, self.labeller.hash_map)

    def view(self, photo: PhotoFile) -> PhotoFeatures:
        """The photo with its features."""
        return self._open(photo)

    def find(self, photo: PhotoFile) -> MaskProposals:
        """The photo's masks, once they are found."""
        return load_proposals(self.store.masks(photo.digest))

    @cached_property
    def encoder(self) -> VisionTransformer:
        return load_encoder(self.config.encoder, self.config.side_px)

    @cached_property
    def labeller(self) -> PseudoLabeler:
        """Raises LabelStoreError while there is no codebook."""
        return PseudoLabeler.make(self.gather([]), load_codebook(self.store.codebook), self.config)

    def gather(self, photos: Group) -> CodebookInputs:
        """What a codebook is fitted on, and used with."""
        config = self.config
        return CodebookInputs(
            photos=photos,
            view=self.view,
            found=lambda view: self.find(view.photo),
            encoder=self.encoder,
            encoder_source=config.encoder,
            maps=Path(config.maps),
            scratch=self.store.folder,
            salient=partial(maskcut_foreground, self.encoder) if config.proposals == "vote" else None,
            objects=config.objects,
        )

    def _fill(self, photos: Group) -> Iterator[int]:
        config = self.config
        compute = partial(compute_features, self.encoder)
        if config.tokens == "keys":
            keys = open_key_cache(self.features, config.encoder_hash, config.side_px)
            for _ in fill_incrementally(
                keys, photos, partial(load_resized, config.side_px), partial(compute_key_features, self.encoder)
            ):
                pass
        cache = open_cache(self.features, config.encoder_hash, config.side_px)
        yield from fill_incrementally(cache, photos, partial(load_padded, config.side_px), compute)

    @cached_property
    def _open(self) -> partial[PhotoFeatures]:
        cache = open_cache(self.features, self.config.encoder_hash, self.config.side_px)
        return partial(load_photo_features, cache, side_px=self.config.side_px)

    @cached_property
    def _finder(self) -> MaskProposer:
        finder = MaskProposer(config=self.config, encoder=self.encoder)
        if self.config.tokens == "keys":
            keys = open_key_cache(self.features, self.config.encoder_hash, self.config.side_px)
            finder = replace(finder, keys=keys)
        if self.config.proposals == "vote":
            finder = replace(finder, views=load_projections(self.store.views))
        return finder


MAX_MASKS = 40
"""Of a vote, that one photo keeps; a third of them are gone once they were refined."""


_PROJECTION_SAMPLE = 200_000


def fit_feature_projections(
    photos: Sequence[PhotoFile], open_view: Callable[[PhotoFile], PhotoFeatures], encoder: VisionTransformer, seed: int
) -> FeatureProjections:
    """Views of the tokens, fitted on as many of each photo."""
    generator = np.random.default_rng(seed)
    share = max(1, _PROJECTION_SAMPLE // len(photos))
    sample = []
    for photo in track(photos, "views"):
        tokens = _final_tokens(encoder, open_view(photo))
        flat = tokens.reshape(-1, tokens.shape[-1])
        sample.append(flat[generator.permutation(len(flat))[:share]])
    return fit_projections(np.concatenate(sample))


def maskcut_foreground(encoder: VisionTransformer, view: PhotoFeatures) -> Bool[np.ndarray, "h w"]:
    """The patches in any of MaskCut's masks."""
    masks = maskcut(_final_tokens(encoder, view), MaskCutConfig())
    inside: Bool[np.ndarray, "h w"] = np.logical_or.reduce(masks, axis=0)
    return inside


def _final_tokens(encoder: VisionTransformer, view: PhotoFeatures) -> Float[np.ndarray, "h w C"]:
    return view.cut(final_tokens(encoder, view.maps))
