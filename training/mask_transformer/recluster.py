"""Changes the thing clusters of a trained run without training, by k-means on its query embeddings."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional

from model.checkpoints.runs import RUN_FILE, WEIGHT_FILES, RunInfo, load_run, write_run
from model.errors import ConfigError
from model.files import atomic_write, hash_file
from model.networks.mask_transformer import MaskDecoder, MaskTransformer, to_network_output
from model.progress import Progress
from training.data.dataset import LabeledPhoto, PseudoLabelDataset
from training.data.features import FeatureCache, open_cache
from training.mask_transformer.config import ReclusterConfig
from training.mask_transformer.inference import predict_photos
from training.pseudo_labels.clustering import kmeans
from training.pseudo_labels.codebook import nearest_centroid


@dataclass(frozen=True, kw_only=True)
class ReclusterReport:
    """Size of the new clustering."""

    photos: int
    detections: int
    clusters: int
    smallest: int
    """Detections in the smallest cluster."""
    largest: int
    """Detections in the largest cluster."""


def recluster(
    run: Path, dataset: PseudoLabelDataset, features: Path, out: Path, config: ReclusterConfig
) -> ReclusterReport:
    """Write a run `out` with new thing clusters, with the masks, scores and stuff of `run`.

    A query belongs to the centroid with the smallest angle to its embedding. Embeddings are linear in the query, and
    a query's norm is the same for all centroids, so the nearest centroid is the largest of linear logits; the new run
    keeps its embeddings and can be reclustered again.
    Raises ConfigError if the run has no embeddings, if the dataset has features of another encoder, or if `out` exists.
    """
    info, network = load_run(run)
    if not isinstance(network, MaskTransformer) or network.decoder.embedding_head is None:
        raise ConfigError(f"{run} has no query embeddings: train a mask transformer with --query-embeddings")
    if (out / RUN_FILE).exists():
        raise ConfigError(f"{out} already is a run: choose another --out")
    labels = dataset.read_config()
    if hash_file(run / info.encoder_file) != labels.encoder_hash or labels.side_px != network.decoder.config.side_px:
        raise ConfigError(f"{dataset.folder} was made with another encoder or input size than {run}")
    photos = _subsample(dataset.read_photos(), config.max_photos)
    cache = open_cache(features, labels.encoder_hash, labels.side_px)
    embeddings = collect_embeddings(network.decoder, photos, cache, config.score_threshold)
    centroids = kmeans(embeddings, config.thing_clusters, config.seed)
    sizes = np.bincount(nearest_centroid(embeddings, centroids), minlength=config.thing_clusters)
    report = ReclusterReport(
        photos=len(photos),
        detections=len(embeddings),
        clusters=config.thing_clusters,
        smallest=int(sizes.min()),
        largest=int(sizes.max()),
    )
    _write(run, info, replace_cluster_head(network.decoder, centroids), out, config, report)
    return report


def collect_embeddings(
    decoder: MaskDecoder, photos: Sequence[LabeledPhoto], cache: FeatureCache, score_threshold: float
) -> Float[np.ndarray, "N D"]:
    """Return the embeddings, as unit vectors, of all queries with at least this score."""
    found = [np.zeros((0, decoder.config.embedding_dim), np.float32)]
    with Progress("embeddings", len(photos), unit="photo") as progress:
        for batch, output in predict_photos(decoder, photos, cache):
            assert output.embeddings is not None, "the decoder has an embedding head"
            kept = to_network_output(output).scores >= score_threshold
            found.append(functional.normalize(output.embeddings[kept], dim=1).numpy())
            progress.advance(len(batch))
    return np.concatenate(found)


def replace_cluster_head(decoder: MaskDecoder, centroids: Float[np.ndarray, "K D"]) -> MaskDecoder:
    """Return a decoder whose thing clusters are these centroids."""
    config = decoder.config
    new_config = replace(
        config, thing_clusters=len(centroids), trained_clusters=config.trained_clusters or config.thing_clusters
    )
    state = {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith("cluster_head.")}
    head = decoder.embedding_head
    assert isinstance(head, nn.Linear), "the decoder has an embedding head"
    rows = torch.from_numpy(np.ascontiguousarray(centroids, dtype=np.float32))
    state |= {"cluster_head.weight": rows @ head.weight, "cluster_head.bias": rows @ head.bias}
    new_decoder = MaskDecoder(new_config, decoder.encoder_config)
    new_decoder.load_state_dict(state)
    return new_decoder.eval()


def _subsample(photos: list[LabeledPhoto], max_photos: int | None) -> list[LabeledPhoto]:
    if max_photos is None or max_photos >= len(photos):
        return photos
    return [photos[index * len(photos) // max_photos] for index in range(max_photos)]


def _write(
    run: Path, info: RunInfo, decoder: MaskDecoder, out: Path, config: ReclusterConfig, report: ReclusterReport
) -> None:
    details = {
        "sha256": hash_file(run / WEIGHT_FILES[info.network]),
        "score_threshold": config.score_threshold,
        "seed": config.seed,
        "photos": report.photos,
        "clusters": report.clusters,
    }
    with atomic_write(out / info.encoder_file) as sibling:
        shutil.copyfile(run / info.encoder_file, sibling)
    provenance = {**info.provenance, "reclustered": details}
    write_run(out, replace(info, network_config=decoder.config, provenance=provenance), decoder)
