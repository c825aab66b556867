"""A codebook fitted on photos and their masks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32

from model.errors import ConfigError
from model.network.vit import VisionTransformer
from model.weights.checkpoints import load_encoder
from training.features import finish_tokens
from training.labels.clusters.blending import blend
from training.labels.clusters.cluster import cluster, fit_whitening, whiten
from training.labels.clusters.codebook import Codebook
from training.labels.clusters.codebook_recipe import CodebookConfig
from training.labels.clusters.descriptors import CropDescriber, Describer, RegionDescriber
from training.labels.clusters.photo_view import PhotoView
from training.labels.clusters.stego import CodeHead
from training.labels.clusters.stego_fit import train_stego
from training.labels.clusters.stego_recipe import STEGO_PRESETS
from training.labels.clusters.stuff import MapStuff, PatchStuff, StuffSource
from training.labels.clusters.thingness import Judge, Salient, fit_judge, list_least_scores
from training.labels.masks.discovery_recipe import MOST_OBJECTS
from training.labels.masks.proposals import Proposals
from training.photos import PhotoFile
from training.progress import show

_SAMPLED_TOKENS = 200_000
_MASKS_EACH = 256
"""Masks a thing cluster that k-means looks at; more are not kept."""

_FEW_PHOTOS = 1000
"""For what takes another pass."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a codebook is fitted on and used with."""

    photos: Sequence[PhotoFile]
    view: Callable[[PhotoFile], PhotoView]
    found: Callable[[PhotoView], Proposals]
    """Stored masks of a photo."""
    encoder: VisionTransformer
    encoder_source: str
    maps: Path
    """Folder of stuff maps, where they come as such."""
    scratch: Path
    """Folder for what takes long: vectors of masks, STEGO's checkpoint."""
    salient: Salient | None = None
    """What masks are weighed by, if they are a vote's."""
    objects: int = MOST_OBJECTS
    """Masks of a vote that are taken for things, in the mean over the photos."""

    def views(self, stage: str) -> Iterator[PhotoView]:
        """All photos, one after the other, with progress."""
        return (self.view(photo) for photo in show(self.photos, stage))

    def few_views(self, stage: str) -> Iterator[PhotoView]:
        """Photos evenly spread over all."""
        count = min(_FEW_PHOTOS, len(self.photos))
        chosen = [self.photos[place * len(self.photos) // count] for place in range(count)]
        return (self.view(photo) for photo in show(chosen, stage))


def fit_codebook(material: Material, config: CodebookConfig) -> Codebook:
    """Whitening and stuff clusters from a sample of all patches, thing clusters from one vector a mask."""
    sample = _sample_tokens(material, config)
    mean, projection = fit_whitening(sample, config.components)
    book = Codebook(
        config=config,
        mean=mean,
        projection=projection,
        things=np.zeros((0, 0), np.float32),
        stuff=np.zeros((0, 0), np.float32),
        inside=np.zeros(config.stuff_clusters),
    )
    if material.salient is not None:
        book = _fit_judge(material, book, sample)
    match config.stuff:
        case "kmeans":
            whitened = whiten(sample, mean, projection)
            stuff = cluster(whitened, config.stuff_clusters, config.seed, seeding=config.seeding)
            book = replace(book, stuff=stuff)
        case "regions":
            del sample
            blended = _sample_regions(material, book)
            stuff = cluster(blended, config.stuff_clusters, config.seed, seeding=config.seeding)
            book = replace(book, stuff=stuff)
        case "stego":
            del sample
            book = _fit_stego(material, book)
        case "maps":
            pass
    return _fit_things(material, book)


def open_stuff(book: Codebook, material: Material, *, has_crf: bool = False) -> StuffSource:
    """What gives every pixel its stuff cluster, borders moved by a dense CRF if wished."""
    match book.config.stuff:
        case "kmeans":
            return PatchStuff(
                embed=lambda view: whiten(view.join(), book.mean, book.projection),
                centroids=book.stuff,
                has_crf=has_crf,
            )
        case "regions":
            return PatchStuff(
                embed=lambda view: embed_regions(book, material, view), centroids=book.stuff, has_crf=has_crf
            )
        case "stego":
            head = _load_head(book)
            return PatchStuff(
                embed=lambda view: embed_codes(head, material.encoder, view), centroids=book.stuff, has_crf=has_crf
            )
        case "maps":
            return MapStuff(folder=material.maps, clusters=book.config.stuff_clusters)


def open_describer(book: Codebook, material: Material) -> Describer:
    """What gives every mask its vector."""
    config = book.config
    if config.things == "region":
        return RegionDescriber(mean=book.mean, projection=book.projection)
    encoder = load_encoder(material.encoder_source, config.crop_px)
    return CropDescriber(encoder, config, material.scratch / "vectors")


def open_judge(book: Codebook) -> Judge | None:
    """What tells things among a vote's masks, if the codebook was fitted on such."""
    if not len(book.parts):
        return None
    return Judge(mean=book.mean, projection=book.projection, parts=book.parts, salient=book.salient)


def choose_things(book: Codebook, material: Material, view: PhotoView) -> Proposals:
    """A photo's masks that the panoptic map should hold, best first: all but for a vote."""
    found = material.found(view)
    if (judge := open_judge(book)) is None:
        return found
    return judge.judge(view, found).keep(MOST_OBJECTS, book.least_scores[material.objects - 1])


def embed_regions(book: Codebook, material: Material, view: PhotoView) -> Float[np.ndarray, "h w P"]:
    """Whitened patches, each blended with the masks that it lies in."""
    return blend(whiten(view.join(), book.mean, book.projection), material.found(view))


@torch.inference_mode()
def embed_codes(head: CodeHead, encoder: VisionTransformer, view: PhotoView) -> Float[np.ndarray, "h w D"]:
    """STEGO's codes; the average with a mirrored photo's, of which there are no features, is left out."""
    tokens = torch.from_numpy(np.ascontiguousarray(_finish(encoder, view)))
    codes: Float[np.ndarray, "h w D"] = head(tokens.permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    return codes


def _sample_tokens(material: Material, config: CodebookConfig) -> Float32[np.ndarray, "N E"]:
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


def _sample_regions(material: Material, book: Codebook) -> Float[np.ndarray, "N P"]:
    """Blended patches, as many of each of some photos."""
    generator = np.random.default_rng(book.config.seed)
    share = max(1, _SAMPLED_TOKENS // min(_FEW_PHOTOS, len(material.photos)))
    chosen = []
    for view in material.few_views("regions"):
        flat = embed_regions(book, material, view).reshape(-1, book.projection.shape[1])
        chosen.append(flat[generator.permutation(len(flat))[:share]])
    return np.concatenate(chosen)


def _fit_judge(material: Material, book: Codebook, sample: Float32[np.ndarray, "N E"]) -> Codebook:
    """What tells things, and the scores that leave so many of them."""
    assert material.salient is not None, "only a vote is judged"
    views = material.few_views("salience")
    judge = fit_judge(sample, book.mean, book.projection, views, material.salient, book.config.seed)
    scores = [judge.judge(view, material.found(view)).scores for view in material.few_views("judge")]
    return replace(book, parts=judge.parts, salient=judge.salient, least_scores=list_least_scores(scores))


def _fit_stego(material: Material, book: Codebook) -> Codebook:
    config = book.config
    recipe = replace(STEGO_PRESETS[config.stego], steps=config.stego_steps)
    stego = train_stego(
        material.photos,
        lambda photo: _finish(material.encoder, material.view(photo)),
        config.stuff_clusters,
        recipe,
        config.seed,
        material.scratch / "stego.safetensors",
    )
    head = {name: tensor.numpy() for name, tensor in stego.head.state_dict().items()}
    return replace(book, stuff=stego.centroids, head=head)


def _fit_things(material: Material, book: Codebook) -> Codebook:
    """Thing clusters, and how much of each stuff cluster lies in masks."""
    config = book.config
    describer, source = open_describer(book, material), open_stuff(book, material)
    generator = np.random.default_rng(config.seed)
    most, seen = max(65_536, _MASKS_EACH * config.thing_clusters), 0
    vectors: list[Float[np.ndarray, "D"]] = []
    counts = np.zeros((2, config.stuff_clusters + 1), np.int64)
    for view in material.views("describe"):
        masks = choose_things(book, material, view).hard
        for vector in describer.describe(view, masks):
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
    things = cluster(
        np.array(vectors, np.float32),
        config.thing_clusters,
        config.seed,
        seeding=config.seeding,
        is_spherical=describer.is_spherical,
    )
    total, inside = counts[:, 1:]
    return replace(book, things=things, inside=inside / np.maximum(total, 1))


def _load_head(book: Codebook) -> CodeHead:
    dimensions, width = book.head["linear.weight"].shape[:2]
    head = CodeHead(width, dimensions, dropout=0.0)
    head.load_state_dict({name: torch.from_numpy(array) for name, array in book.head.items()})
    return head.eval().requires_grad_(False)


def _finish(encoder: VisionTransformer, view: PhotoView) -> Float[np.ndarray, "h w C"]:
    return view.cut(finish_tokens(encoder, view.maps))
