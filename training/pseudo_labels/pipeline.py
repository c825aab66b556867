"""The pseudo-label pipeline: features, masks, codebook, labels. Each stage continues where it was interrupted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float

from model.checkpoints.dino import load_encoder
from model.contract import InputSize
from model.errors import ConfigError
from model.images import letterbox_image, read_image, resize_map
from model.networks.mask_transformer import MASK_STRIDE_PX
from model.networks.vit import VisionTransformer
from training.data.dataset import PseudoLabelDataset
from training.data.executors import ALL_SHARDS, LocalExecutor
from training.data.features import FeatureStore
from training.data.label_config import MAX_OBJECTS, PseudoLabelConfig, to_json
from training.data.panoptic_labels import (
    Chunk,
    Dependencies,
    ImageLabel,
    make_chunk,
    merge_panoptic,
    remove_overlaps,
    split_into_chunks,
)
from training.data.photos import PhotoFile, PhotoScan
from training.pseudo_labels.clustering import CodebookInputs, fit_codebook, fit_projections
from training.pseudo_labels.codebook import Codebook, load_codebook
from training.pseudo_labels.consensus import FeatureProjections, consensus_masks, load_projections
from training.pseudo_labels.maskcut import MaskProposals, load_proposals, maskcut, proposals_from_masks
from training.pseudo_labels.refinement import refine_masks

MAX_MASKS = 40
"""Consensus masks per photo that are refined; refinement rejects about a third of them."""
_PROVENANCE_FIELDS = {"photos", "photos_hash", "encoder", "codebook_hash", "data_source"}
"""Fields that do not change the name of a chunk: paths, provenance, and hashes that the chunk covers otherwise."""

Stage = Literal["features", "masks", "labels"]


@dataclass(frozen=True, kw_only=True)
class PseudoLabelReport:
    """Counts of the labeled photos and their masks."""

    photos: int
    masks: int
    photos_without_mask: int
    skipped: tuple[str, ...]
    """`name: reason` of each photo that could not be decoded."""
    duplicates: int
    """Photos left out because another one has the same content."""
    other_files: dict[str, int]
    """Number of files left out because they are no photos, by suffix."""


def label_photos(
    scan: PhotoScan,
    config: PseudoLabelConfig,
    dataset: PseudoLabelDataset,
    features: Path,
    codebook: Codebook | None = None,
    *,
    executor: LocalExecutor | None = None,
    shard: slice = ALL_SHARDS,
) -> PseudoLabelReport:
    """Compute features, masks, codebook (unless given), panoptic labels and COCO files; existing results are kept.

    `features` is the folder of the feature caches. A single shard needs a codebook, and does not write the COCO files:
    run again with all shards to write them.
    Raises ConfigError if the options contradict each other or the codebook.
    """
    _check_options(config, codebook, shard)
    worker = PseudoLabelWorker(config=config, dataset=dataset, features_dir=features)
    executor = executor or LocalExecutor()
    _ = worker.features  # before anything is written: an encoder that does not fit raises here
    dataset.lock_config(config, scan.photos)
    if codebook and not dataset.codebook.is_file():
        codebook.save(dataset.codebook)
    groups = split_into_chunks(scan.photos)[shard]
    # Labeling a finished dataset again restores deleted features and masks; those of a shard may be on another machine.
    pending = groups if dataset.is_finished else worker.list_unlabeled(groups)
    executor.run(worker, "features", pending)
    if pending and config.proposals == "consensus" and not dataset.projections.is_file():
        projections = codebook.projections if codebook else None
        (projections or fit_projections(scan.photos, worker.features, config.seed)).write(dataset.projections)
    executor.run(worker, "masks", pending)
    if not dataset.codebook.is_file():
        inputs = CodebookInputs(config=config, photos=scan.photos, features=worker.features, dataset=dataset)
        replace(fit_codebook(inputs), projections=worker.projections).save(dataset.codebook)
    executor.run(worker, "labels", pending)
    chunks = [worker.plan_chunk(group) for group in groups]
    if shard == ALL_SHARDS:
        dataset.finish(config, chunks)
    things = [record.count_things(config.thing_clusters) for record in dataset.read_records(chunks)]
    return PseudoLabelReport(
        photos=len(things),
        masks=sum(things),
        photos_without_mask=things.count(0),
        skipped=scan.skipped,
        duplicates=scan.duplicates,
        other_files=scan.other_files,
    )


@dataclass(frozen=True, kw_only=True)
class PseudoLabelWorker:
    """Runs the stages that process one photo at a time; workers share results through files only."""

    config: PseudoLabelConfig
    dataset: PseudoLabelDataset
    features_dir: Path
    unit: ClassVar[str] = "photo"

    def work(self, stage: Stage, photos: Sequence[PhotoFile]) -> Iterator[int]:
        """Complete a stage for a chunk of photos; yields how many photos are done."""
        match stage:
            case "features":
                yield from self.features.fill(photos, with_keys=self.config.maskcut_features == "keys")
            case "masks":
                for photo in photos:
                    path = self.dataset.proposals(photo.digest)
                    if not path.is_file():
                        self.propose_masks(photo).write(path)
                    yield 1
            case "labels":
                chunk = self.plan_chunk(photos)
                if not chunk.is_complete(self.dataset.chunks_dir):
                    chunk.write(self.dataset.chunks_dir, map(self.label, photos))
                yield len(photos)

    def propose_masks(self, photo: PhotoFile) -> MaskProposals:
        """Find masks on the patches that show the photo.

        Raises DatasetError if its features are missing or not finite.
        """
        features = self.features.load(photo)
        if self.projections is not None:
            tokens = features.final_tokens()
            return consensus_masks(tokens, self.projections.transform(tokens))
        if self.config.maskcut_features == "patches":
            return proposals_from_masks(maskcut(features.final_tokens(), self.config))
        # Keys come from the photo resized to a square: resize its masks to the patches that show the photo.
        found = proposals_from_masks(maskcut(self.features.load_keys(photo), self.config))
        resized = [resize_map(mask, *features.grid_size) for mask in found.soft]
        return MaskProposals(soft=np.array(resized, np.float32).reshape(-1, *features.grid_size), scores=found.scores)

    def label(self, photo: PhotoFile) -> ImageLabel:
        """Return the panoptic label of one photo, in its own size."""
        config, features = self.config, self.features.load(photo)
        stored = proposals = load_proposals(self.dataset.proposals(photo.digest))
        if config.proposals == "consensus":
            proposals = self._codebook.rank_by_objectness(features, stored).top_k(MAX_MASKS, 0.0)
        square, _ = letterbox_image(read_image(photo.path).image, [InputSize.square(config.side_px)], MASK_STRIDE_PX)
        height, width = features.letterbox.size
        image = np.ascontiguousarray(square[:, :height, :width].transpose(1, 2, 0))
        refined = refine_masks(proposals.soft, image, features.patch_px)
        kept = refined.any((1, 2))
        large = [resize_map(mask.astype(np.float32), photo.height, photo.width) > 0.5 for mask in refined[kept]]
        masks = np.array(large, bool).reshape(len(large), photo.height, photo.width)
        things = self._codebook.assign_things(features, proposals.binary)[kept].tolist()
        stuff = self._codebook.segment_stuff(features, stored)
        thing_like = np.flatnonzero(self._codebook.stuff_in_masks > config.max_stuff_in_things) + 1
        if config.stuff_merge_rule == "drop-thing-like":
            stuff[np.isin(stuff, thing_like)] = 0
        shown = self._select_shown(masks, proposals.scores[kept])
        return ImageLabel(
            panoptic=merge_panoptic(shown, things, stuff, config.thing_clusters),
            masks=masks,
            things=things,
            scores=proposals.scores[kept].tolist(),
            is_in_panoptic=[bool(mask.any()) for mask in shown],
        )

    def plan_chunk(self, photos: Sequence[PhotoFile]) -> Chunk:
        """Return the chunk of these photos, written or not. Raises DatasetError if there is no codebook yet."""
        return make_chunk(photos, self._dependencies)

    def list_unlabeled(self, groups: Sequence[Sequence[PhotoFile]]) -> list[Sequence[PhotoFile]]:
        """Return the groups without a complete chunk; a complete one no longer needs features and masks."""
        if not self.dataset.codebook.is_file():
            return list(groups)
        return [group for group in groups if not self.plan_chunk(group).is_complete(self.dataset.chunks_dir)]

    @cached_property
    def features(self) -> FeatureStore:
        config = self.config
        return FeatureStore.open(self.features_dir, self._encoder, config.encoder_hash, config)

    @cached_property
    def projections(self) -> FeatureProjections | None:
        """The fitted projections; None unless masks come from a consensus."""
        return load_projections(self.dataset.projections) if self.config.proposals == "consensus" else None

    @cached_property
    def _encoder(self) -> VisionTransformer:
        return load_encoder(self.config.encoder, self.config.side_px)

    @cached_property
    def _codebook(self) -> Codebook:
        return load_codebook(self.dataset.codebook)

    @cached_property
    def _dependencies(self) -> Dependencies:
        settings = {name: value for name, value in to_json(self.config).items() if name not in _PROVENANCE_FIELDS}
        return settings | {"codebook": self._codebook.digest}

    def _select_shown(
        self, masks: Bool[np.ndarray, "N H W"], scores: Float[np.ndarray, "N"]
    ) -> Bool[np.ndarray, "N H W"]:
        """Return the part of each mask in the panoptic map: of consensus masks the likeliest, without overlaps."""
        if self.config.proposals != "consensus":
            return masks
        is_thing = scores >= self._codebook.score_thresholds[self.config.objects_per_image - 1]
        is_thing[MAX_OBJECTS:] = False
        return remove_overlaps(masks & is_thing[:, None, None])


def _check_options(config: PseudoLabelConfig, codebook: Codebook | None, shard: slice) -> None:
    """Raise ConfigError if the codebook does not fit the options."""
    if codebook is None:
        if shard != ALL_SHARDS:
            raise ConfigError("one of several shards cannot fit clusters: pass the codebook of some labeled photos")
    elif config.proposals == "consensus":
        if not codebook.has_objectness:
            raise ConfigError("the codebook was not fitted on consensus masks: use --proposals maskcut")
        if codebook.projections is None and shard != ALL_SHARDS:
            raise ConfigError("the codebook has no feature projections for consensus masks: fit another one")
