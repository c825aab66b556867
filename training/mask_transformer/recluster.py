"""Other thing clusters for a fitted run, without a fit: k-means on what its queries say of their objects."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from model.checkpoints.runs import RUN_FILE, WEIGHT_FILES, RunInfo, load_run, write_run
from model.errors import ConfigError
from model.files import atomic_write, hash_file
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, MaskTransformer, to_network_output
from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.data.features import FeatureCache, open_cache
from training.mask_transformer.inference import walk
from training.progress import Progress
from training.pseudo_labels.clustering import kmeans
from training.pseudo_labels.codebook import nearest_centroid


@dataclass(frozen=True, kw_only=True)
class ReclusterConfig:
    """What is clustered, and into how many."""

    clusters: int
    score: float = 0.4
    """Least of a detection, 0..1: surer ones make the clusters."""
    limit: int | None = None
    """Most photos, evenly spread; None: all of the store."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clusters < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError("clusters and limit must be at least 1")
        if not 0.0 <= self.score <= 1.0:
            raise ConfigError(f"score must lie in 0..1, got {self.score}")


@dataclass(frozen=True, kw_only=True)
class ReclusterReport:
    """What came of it."""

    photos: int
    detections: int
    clusters: int
    smallest: int
    """Detections in the smallest cluster."""
    largest: int


def recluster(
    run: Path, store: PseudoLabelDataset, features: Path, out: Path, plan: ReclusterConfig
) -> ReclusterReport:
    """Write the run `out`, which answers with new thing clusters; masks, scores and stuff are those of `run`.

    A query goes to the centroid with the smallest angle to its embedding. Embeddings are linear in the query, and a
    query's length is the same for all centroids: so the nearest is the largest of linear logits, and clusters can be
    made again from the new run.
    Raises ConfigError if the run has no embeddings, if the store's features are of another encoder, or if `out` is one.
    """
    card, network = load_run(run)
    if not isinstance(network, MaskTransformer) or network.decoder.embedding_head is None:
        raise ConfigError(f"{run} has no embeddings: fit a mask_transformer with --embeds")
    if (out / RUN_FILE).exists():
        raise ConfigError(f"{out} is a run already: choose another --out")
    labels = store.read_config()
    if hash_file(run / card.encoder_file) != labels.encoder_hash or labels.side_px != network.decoder.config.side_px:
        raise ConfigError(f"{store.folder} was made with another encoder or size than {run}")
    photos = _spread(store.read_photos(), plan.limit)
    vectors = collect_embeddings(
        network.decoder, photos, open_cache(features, labels.encoder_hash, labels.side_px), plan.score
    )
    centroids = kmeans(vectors, plan.clusters, plan.seed)
    sizes = np.bincount(nearest_centroid(vectors, centroids), minlength=plan.clusters)
    report = ReclusterReport(
        photos=len(photos),
        detections=len(vectors),
        clusters=plan.clusters,
        smallest=int(sizes.min()),
        largest=int(sizes.max()),
    )
    _write(run, card, replace_cluster_head(network.decoder, centroids), out, plan, report)
    return report


def collect_embeddings(
    decoder: MaskDecoder, photos: Sequence[LabeledPhoto], cache: FeatureCache, least_score: float
) -> Float[np.ndarray, "N D"]:
    """Embeddings, of unit length, of all queries that score well enough."""
    found = [np.zeros((0, decoder.config.embedding_dim), np.float32)]
    with Progress("embeddings", len(photos), unit="photo") as progress:
        for some, prediction in walk(decoder, photos, cache):
            assert prediction.embeddings is not None, "the decoder has such a head"
            kept = to_network_output(prediction).scores >= least_score
            found.append(functional.normalize(prediction.embeddings[kept], dim=1).numpy())
            progress.advance(len(some))
    return np.concatenate(found)


def replace_cluster_head(decoder: MaskDecoder, centroids: Float[np.ndarray, "K D"]) -> MaskDecoder:
    """A decoder that answers with the nearest centroids, as rows counted from 0."""
    shape = decoder.config
    made: DecoderConfig = replace(
        shape, thing_clusters=len(centroids), trained_clusters=shape.trained_clusters or shape.thing_clusters
    )
    state = {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith("cluster_head.")}
    head = decoder.embedding_head
    assert isinstance(head, nn.Linear), "the decoder has such a head"
    rows: Tensor = torch.from_numpy(np.ascontiguousarray(centroids, dtype=np.float32))
    state |= {"cluster_head.weight": rows @ head.weight, "cluster_head.bias": rows @ head.bias}
    other = MaskDecoder(made, decoder.encoder_config)
    other.load_state_dict(state)
    return other.eval()


def _spread(photos: list[LabeledPhoto], limit: int | None) -> list[LabeledPhoto]:
    if limit is None or limit >= len(photos):
        return photos
    return [photos[place * len(photos) // limit] for place in range(limit)]


def _write(
    run: Path, card: RunInfo, decoder: MaskDecoder, out: Path, plan: ReclusterConfig, report: ReclusterReport
) -> None:
    source = {"sha256": hash_file(run / WEIGHT_FILES[card.network]), "score": plan.score, "seed": plan.seed}
    provenance = {**card.provenance, "reclustered": {**source, "photos": report.photos, "clusters": report.clusters}}
    with atomic_write(out / card.encoder_file) as sibling:
        shutil.copyfile(run / card.encoder_file, sibling)
    write_run(out, replace(card, network_config=decoder.config, provenance=provenance), decoder)
