"""A codebook fitted on photos and their masks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32

from model.checkpoints.state_dicts import load_encoder
from model.errors import ConfigError
from model.networks.vit import VisionTransformer
from training.data.features import final_tokens
from training.data.label_config import MAX_OBJECTS, STEGO_PRESETS, CodebookConfig
from training.data.photos import PhotoFile
from training.progress import track
from training.pseudo_labels.codebook import (
    ClusterStuffSegmenter,
    Codebook,
    ForegroundFunction,
    ObjectnessScorer,
    PrecomputedStuff,
    StuffSegmenter,
    compute_score_thresholds,
    fit_objectness,
    smooth_with_masks,
)
from training.pseudo_labels.kmeans import fit_whitening, kmeans, whiten
from training.pseudo_labels.mask_embeddings import CropEmbedder, MaskedAveragePoolEmbedder, MaskEmbedder
from training.pseudo_labels.maskcut import MaskProposals
from training.pseudo_labels.photo_features import PhotoFeatures
from training.pseudo_labels.stego import StegoHead, train_stego

_SAMPLED_TOKENS = 200_000
_MAX_MASKS_PER_CLUSTER = 256
"""Masks a thing cluster that k-means looks at; more are not kept."""

_PHOTO_SUBSET = 1000
"""For what takes another pass."""


@dataclass(frozen=True, kw_only=True)
class CodebookInputs:
    """What a codebook is fitted on and used with."""

    photos: Sequence[PhotoFile]
    view: Callable[[PhotoFile], PhotoFeatures]
    found: Callable[[PhotoFeatures], MaskProposals]
    """Stored masks of a photo."""
    encoder: VisionTransformer
    encoder_source: str
    maps: Path
    """Folder of stuff maps, where they come as such."""
    scratch: Path
    """Folder for what takes long: vectors of masks, STEGO's checkpoint."""
    salient: ForegroundFunction | None = None
    """What masks are weighed by, if they are a vote's."""
    objects: int = MAX_OBJECTS
    """Masks of a vote that are taken for things, in the mean over the photos."""

    def views(self, stage: str) -> Iterator[PhotoFeatures]:
        """All photos, one after the other, with progress."""
        return (self.view(photo) for photo in track(self.photos, stage))

    def few_views(self, stage: str) -> Iterator[PhotoFeatures]:
        """Photos evenly spread over all."""
        count = min(_PHOTO_SUBSET, len(self.photos))
        chosen = [self.photos[place * len(self.photos) // count] for place in range(count)]
        return (self.view(photo) for photo in track(chosen, stage))


def fit_codebook(material: CodebookInputs, config: CodebookConfig) -> Codebook:
    """Whitening and stuff clusters from a sample of all patches, thing clusters from one vector a mask."""
    sample = _sample_tokens(material, config)
    mean, projection = fit_whitening(sample, config.pca_dim)
    book = Codebook(
        config=config,
        mean=mean,
        projection=projection,
        things=np.zeros((0, 0), np.float32),
        stuff=np.zeros((0, 0), np.float32),
        inside=np.zeros(config.stuff_clusters),
    )
    if material.salient is not None:
        book = _fit_objectness(material, book, sample)
    match config.stuff:
        case "kmeans":
            whitened = whiten(sample, mean, projection)
            stuff = kmeans(whitened, config.stuff_clusters, config.seed, kmeans_init=config.kmeans_init)
            book = replace(book, stuff=stuff)
        case "regions":
            del sample
            blended = _sample_regions(material, book)
            stuff = kmeans(blended, config.stuff_clusters, config.seed, kmeans_init=config.kmeans_init)
            book = replace(book, stuff=stuff)
        case "stego":
            del sample
            book = _fit_stego(material, book)
        case "maps":
            pass
    return _fit_things(material, book)


def make_stuff_segmenter(book: Codebook, material: CodebookInputs, *, has_crf: bool = False) -> StuffSegmenter:
    """What gives every pixel its stuff cluster, borders moved by a dense CRF if wished."""
    match book.config.stuff:
        case "kmeans":
            return ClusterStuffSegmenter(
                embed=lambda view: whiten(view.join(), book.mean, book.projection),
                centroids=book.stuff,
                has_crf=has_crf,
            )
        case "regions":
            return ClusterStuffSegmenter(
                embed=lambda view: embed_regions(book, material, view), centroids=book.stuff, has_crf=has_crf
            )
        case "stego":
            head = _load_head(book)
            return ClusterStuffSegmenter(
                embed=lambda view: embed_codes(head, material.encoder, view), centroids=book.stuff, has_crf=has_crf
            )
        case "maps":
            return PrecomputedStuff(folder=material.maps, clusters=book.config.stuff_clusters)


def make_mask_embedder(book: Codebook, material: CodebookInputs) -> MaskEmbedder:
    """What gives every mask its vector."""
    config = book.config
    if config.things == "region":
        return MaskedAveragePoolEmbedder(mean=book.mean, projection=book.projection)
    encoder = load_encoder(material.encoder_source, config.crop_px)
    return CropEmbedder(encoder, config, material.scratch / "vectors")


def make_objectness_scorer(book: Codebook) -> ObjectnessScorer | None:
    """What tells things among a vote's masks, if the codebook was fitted on such."""
    if not len(book.parts):
        return None
    return ObjectnessScorer(mean=book.mean, projection=book.projection, parts=book.parts, salient=book.salient)


def select_things(book: Codebook, material: CodebookInputs, view: PhotoFeatures) -> MaskProposals:
    """A photo's masks that the panoptic map should hold, best first: all but for a vote."""
    found = material.found(view)
    if (judge := make_objectness_scorer(book)) is None:
        return found
    return judge.judge(view, found).top_k(MAX_OBJECTS, book.score_thresholds[material.objects - 1])


def embed_regions(book: Codebook, material: CodebookInputs, view: PhotoFeatures) -> Float[np.ndarray, "h w P"]:
    """Whitened patches, each blended with the masks that it lies in."""
    return smooth_with_masks(whiten(view.join(), book.mean, book.projection), material.found(view))


@torch.inference_mode()
def embed_codes(head: StegoHead, encoder: VisionTransformer, view: PhotoFeatures) -> Float[np.ndarray, "h w D"]:
    """STEGO's codes; the average with a mirrored photo's, of which there are no features, is left out."""
    tokens = torch.from_numpy(np.ascontiguousarray(_final_tokens(encoder, view)))
    codes: Float[np.ndarray, "h w D"] = head(tokens.permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    return codes


def _sample_tokens(material: CodebookInputs, config: CodebookConfig) -> Float32[np.ndarray, "N E"]:
    """As many of every photo."""
    generator = np.random.default_rng(config.seed)
    share = max(1, _SAMPLED_TOKENS // len(material.photos))
    width = material.view(material.photos[0]).join().shape[-1]
    sample = np.empty((share * len(material.photos), width), np.float32)
    count = 0
    for view in material.views("sample"):
        flat = view.join().reshape(-1, width)
        chosen = flat[generator.permutation(len(flat))[:share]]
        sample[count : count + len(chosen)] = chosen
        count += len(chosen)
    return sample[:count]


def _sample_regions(material: CodebookInputs, book: Codebook) -> Float[np.ndarray, "N P"]:
    """Blended patches, as many of each of some photos."""
    generator = np.random.default_rng(book.config.seed)
    share = max(1, _SAMPLED_TOKENS // min(_PHOTO_SUBSET, len(material.photos)))
    chosen = []
    for view in material.few_views("regions"):
        flat = embed_regions(book, material, view).reshape(-1, book.projection.shape[1])
        chosen.append(flat[generator.permutation(len(flat))[:share]])
    return np.concatenate(chosen)


def _fit_objectness(material: CodebookInputs, book: Codebook, sample: Float32[np.ndarray, "N E"]) -> Codebook:
    """What tells things, and the scores that leave so many of them."""
    assert material.salient is not None, "only a vote is judged"
    views = material.few_views("salience")
    judge = fit_objectness(sample, book.mean, book.projection, views, material.salient, book.config.seed)
    scores = [judge.judge(view, material.found(view)).scores for view in material.few_views("judge")]
    return replace(book, parts=judge.parts, salient=judge.salient, score_thresholds=compute_score_thresholds(scores))


def _fit_stego(material: CodebookInputs, book: Codebook) -> Codebook:
    config = book.config
    recipe = replace(STEGO_PRESETS[config.stego], steps=config.stego_steps)
    stego = train_stego(
        material.photos,
        lambda photo: _final_tokens(material.encoder, material.view(photo)),
        config.stuff_clusters,
        recipe,
        config.seed,
        material.scratch / "stego.safetensors",
    )
    head = {name: tensor.numpy() for name, tensor in stego.head.state_dict().items()}
    return replace(book, stuff=stego.centroids, head=head)


def _fit_things(material: CodebookInputs, book: Codebook) -> Codebook:
    """Thing clusters, and how much of each stuff cluster lies in masks."""
    config = book.config
    describer, source = make_mask_embedder(book, material), make_stuff_segmenter(book, material)
    generator = np.random.default_rng(config.seed)
    most, seen = max(65_536, _MAX_MASKS_PER_CLUSTER * config.thing_clusters), 0
    vectors: list[Float[np.ndarray, "D"]] = []
    counts = np.zeros((2, config.stuff_clusters + 1), np.int64)
    for view in material.views("describe"):
        masks = select_things(book, material, view).binary
        for vector in describer.embed(view, masks):
            seen += 1
            if len(vectors) < most:
                vectors.append(vector)
            elif (place := int(generator.integers(seen))) < most:
                vectors[place] = vector
        labels = source.label_patches(view)
        counts[0] += np.bincount(labels.ravel(), minlength=counts.shape[1])
        counts[1] += np.bincount(labels[masks.any(0)], minlength=counts.shape[1])
    if not vectors:
        raise ConfigError(f"{len(material.photos)} photos gave no mask: label more photos")
    things = kmeans(
        np.array(vectors, np.float32),
        config.thing_clusters,
        config.seed,
        kmeans_init=config.kmeans_init,
        is_spherical=describer.is_spherical,
    )
    total, inside = counts[:, 1:]
    return replace(book, things=things, inside=inside / np.maximum(total, 1))


def _load_head(book: Codebook) -> StegoHead:
    dimensions, width = book.head["linear.weight"].shape[:2]
    head = StegoHead(width, dimensions, dropout=0.0)
    head.load_state_dict({name: torch.from_numpy(array) for name, array in book.head.items()})
    return head.eval().requires_grad_(False)


def _final_tokens(encoder: VisionTransformer, view: PhotoFeatures) -> Float[np.ndarray, "h w C"]:
    return view.cut(final_tokens(encoder, view.maps))
