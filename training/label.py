"""Photos to a store of panoptic pseudo-labels, stage by stage; each stage takes up where it was left."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from model.checkpoints import load_encoder
from model.errors import LabelStoreError
from model.files import read_arrays, replace_file
from model.network.mask_transformer import STRIDE_PX
from model.network.vit import VisionTransformer
from model.pixels import Placement, place, plan_placement, read_photo, resize_map
from training.cluster import Codebook, assign, cluster, fit_whitening, join_taps, read_codebook, whiten
from training.discover import propose, refine
from training.features import FeatureCache, fill_cache, finish_tokens, open_cache
from training.merge import Labelled, merge
from training.photos import PhotoFile, Scan
from training.progress import show
from training.store import LabelConfig, LabelStore
from training.stuff import label_stuff

_SAMPLED_TOKENS = 200_000


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


def label_photos(scan: Scan, config: LabelConfig, store: LabelStore, features: Path) -> LabelReport:
    """Fill the store: features, masks, codebook, panoptic labels, index.

    Features, masks and codebook that are there are taken as they are; labels are merged anew.
    """
    encoder = load_encoder(config.encoder, config.side_px)
    store.claim(config)
    photos = list(scan.photos)
    cache = open_cache(features, config.encoder_hash, config.side_px)
    fill_cache(cache, photos, encoder, config.side_px)
    for photo in show(photos, "masks"):
        if not store.masks(photo.digest).is_file():
            _write_masks(store.masks(photo.digest), _find_masks(encoder, cache, photo, config))
    if not store.codebook.is_file():
        _fit_codebook(store, cache, photos, config).write(store.codebook)
    codebook = read_codebook(store.codebook)
    annotations = []
    for photo in show(photos, "labels"):
        annotations.append(store.write_label(photo, _label(store, cache, photo, codebook, config)))
    store.write_index(config, photos, annotations)
    counts = [sum(s["category_id"] <= config.thing_clusters for s in each["segments_info"]) for each in annotations]
    return LabelReport(
        photos=len(photos),
        masks=sum(counts),
        photos_without_mask=counts.count(0),
        broken=scan.broken,
        duplicates=scan.duplicates,
    )


def _find_masks(
    encoder: VisionTransformer, cache: FeatureCache, photo: PhotoFile, config: LabelConfig
) -> Bool[np.ndarray, "N h w"]:
    """MaskCut on the patches that show the photo."""
    placement = plan_placement(photo.height, photo.width, config.side_px, STRIDE_PX)
    tokens = finish_tokens(encoder, cache.read(photo.digest))
    return propose(_cut(tokens, placement), config.cuts, config.threshold)


def _fit_codebook(store: LabelStore, cache: FeatureCache, photos: Sequence[PhotoFile], config: LabelConfig) -> Codebook:
    """Whitening and stuff clusters from a sample of all patches, thing clusters from the mean patch of every mask."""
    generator = np.random.default_rng(config.seed)
    share = max(1, _SAMPLED_TOKENS // len(photos))
    sample = []
    for photo in show(photos, "sample"):
        tokens = _read_tokens(cache, photo, config)
        flat = tokens.reshape(-1, tokens.shape[-1])
        sample.append(flat[generator.permutation(len(flat))[:share]])
    stacked = np.concatenate(sample)
    mean, projection = fit_whitening(stacked, config.components)
    stuff = cluster(whiten(stacked, mean, projection), config.stuff_clusters, config.seed)
    means: list[Float[np.ndarray, "P"]] = []
    for photo in show(photos, "describe"):
        view = whiten(_read_tokens(cache, photo, config), mean, projection)
        means.extend(_average(view, mask) for mask in read_masks(store.masks(photo.digest)))
    things = cluster(np.array(means, np.float32), config.thing_clusters, config.seed)
    return Codebook(mean=mean, projection=projection, things=things, stuff=stuff)


def _label(
    store: LabelStore, cache: FeatureCache, photo: PhotoFile, codebook: Codebook, config: LabelConfig
) -> Labelled:
    """The panoptic pseudo-label of one photo, in its own size."""
    square, placement = place(read_photo(photo.path).image, config.side_px, STRIDE_PX)
    placed = np.ascontiguousarray(square[:, : placement.placed_height, : placement.placed_width].transpose(1, 2, 0))
    maps = cache.read(photo.digest)
    view = whiten(_cut(join_taps(maps), placement), codebook.mean, codebook.projection)
    patch_px = config.side_px // maps.shape[1]
    masks, clusters = [], []
    for mask in read_masks(store.masks(photo.digest)):
        fine = refine(mask, placed, patch_px)
        if fine.any():
            masks.append(resize_map(fine.astype(np.float32), photo.height, photo.width) > 0.5)
            clusters.append(int(assign(_average(view, mask), codebook.things)) + 1)
    stuff = label_stuff(view, codebook.stuff, patch_px, placement)
    stacked = np.array(masks, bool).reshape(len(masks), photo.height, photo.width)
    return merge(stacked, clusters, stuff, config.thing_clusters)


def _read_tokens(cache: FeatureCache, photo: PhotoFile, config: LabelConfig) -> Float[np.ndarray, "h w E"]:
    placement = plan_placement(photo.height, photo.width, config.side_px, STRIDE_PX)
    return _cut(join_taps(cache.read(photo.digest)), placement)


def _cut(tokens: Float[np.ndarray, "g g C"], placement: Placement) -> Float[np.ndarray, "h w C"]:
    """The tokens that show a part of the photo."""
    patch_px = placement.side_px // tokens.shape[0]
    return tokens[: -(-placement.placed_height // patch_px), : -(-placement.placed_width // patch_px)]


def _average(view: Float[np.ndarray, "h w P"], mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "P"]:
    mean: Float[np.ndarray, "P"] = view[mask].mean(0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def read_masks(path: Path) -> Bool[np.ndarray, "N h w"]:
    """Stored patch masks. Raises LabelStoreError if the file is missing or broken."""
    try:
        return read_arrays(path)["masks"]
    except (ValueError, KeyError) as error:
        raise LabelStoreError(f"{path} holds no masks: {error}") from error


def _write_masks(path: Path, masks: Bool[np.ndarray, "N h w"]) -> None:
    with replace_file(path) as sibling, sibling.open("wb") as stream:
        np.savez_compressed(stream, masks=masks)
