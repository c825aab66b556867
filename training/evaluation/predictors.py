"""Predictors: an artifact, a run or pseudo-labels, behind one interface that returns clusters for an image."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from model.backends.loader import load_session
from model.backends.session import Session
from model.contract import CONTRACT_FILE, NETWORK_FILE, Contract, Task
from model.detail import run_image
from model.errors import ConfigError, DatasetError
from model.files import hash_file
from model.formats.coco import Rle, encode_rles
from model.postprocessing.panoptic import PatchEmbeddings, embed_patches, postprocess
from training.data.dataset import CONFIG_FILE, LabeledPhoto, PseudoLabelDataset, read_label_map
from training.evaluation.overlap import StoredArray

MIN_SCORE = 0.01
"""Detections with lower scores are left out of average precision; the panoptic map has a higher threshold."""
_RUN_FILE = "run.json"  # equals model.checkpoints.runs.RUN_FILE, whose import needs torch


@dataclass(frozen=True, kw_only=True)
class ClusterMap:
    """A label map and the cluster of each of its segments."""

    label_map: Int32[np.ndarray, "H W"]
    clusters: dict[int, int]
    embeddings: Float32[np.ndarray, "S E"] | None = None
    """Embeddings of the segments, in the order of `clusters`; None if the network has none."""


@dataclass(frozen=True, kw_only=True)
class PredictedObject:
    """One detection with its complete mask, which may overlap others."""

    cluster: int
    score: float
    rle: Rle
    embedding: Annotated[Float32[np.ndarray, "E"] | None, StoredArray(np.float32)] = None


@dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """The prediction for one image, in the size of the image."""

    panoptic: ClusterMap
    semantic: ClusterMap
    detections: tuple[PredictedObject, ...]
    patches: PatchEmbeddings | None = None
    """Embeddings of the patches, if the network has them."""


class Predictor(Protocol):
    """Predicts the clusters of an image."""

    title: str
    digest: str
    """Hash of what defines the clusters: the weights, or the codebook."""
    thing_clusters: int
    stuff_clusters: int

    def predict(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        """Raises DatasetError if the predictor only knows stored photos and this is not one of them."""


def load_predictor(folder: Path, *, threads: int) -> Predictor:
    """Load an artifact, a run or pseudo-labels, recognized by the file that each writes last.

    Raises ConfigError if the folder is not exactly one of the three, and the errors of their loaders.
    """
    files = (CONTRACT_FILE, _RUN_FILE, CONFIG_FILE)
    match [name for name in files if (folder / name).is_file()]:
        case [name] if name == CONTRACT_FILE:
            contract, session = load_session(folder, threads=threads)
            return ModelPredictor(contract, session, contract.files[NETWORK_FILE])
        case [name] if name == _RUN_FILE:
            return _load_run(folder, threads)
        case [_]:
            return PseudoLabelPredictor(PseudoLabelDataset(folder))
        case found:
            content = " and ".join(found) or f"none of {', '.join(files)}"
            raise ConfigError(f"{folder} contains {content}: expected a run, an artifact or pseudo-labels")


class ModelPredictor:
    """Predictions of an artifact, or of a run in torch."""

    def __init__(self, contract: Contract, session: Session, digest: str) -> None:
        self.title = f"{contract.name} {contract.version} on {session.backend}"
        self.digest = digest
        self.thing_clusters = contract.thing_clusters
        self.stuff_clusters = contract.stuff_clusters
        self._contract = contract
        self._session = session

    def predict(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        contract = self._contract
        outputs, prepared = run_image(self._session, image, contract)
        thresholds = prepared.override(contract.thresholds)

        def segment(task: Task) -> ClusterMap:
            segmentation = postprocess(outputs, prepared.letterbox, contract, task, thresholds)
            embeddings = [each.embedding for each in segmentation.segments if each.embedding is not None]
            return ClusterMap(
                label_map=segmentation.label_map.astype(np.int32),
                clusters={each.id: each.cluster for each in segmentation.segments},
                embeddings=np.stack(embeddings) if embeddings else None,
            )

        low_threshold = replace(thresholds, score_threshold=MIN_SCORE)
        instances = postprocess(outputs, prepared.letterbox, contract, "instance", low_threshold)
        return ImagePrediction(
            panoptic=segment("panoptic"),
            semantic=segment("semantic"),
            detections=tuple(
                PredictedObject(cluster=each.cluster, score=each.score, rle=rle, embedding=each.embedding)
                for each, rle in zip(instances.segments, encode_rles(instances), strict=True)
            ),
            patches=embed_patches(outputs, prepared.letterbox),
        )


class PseudoLabelPredictor:
    """Pseudo-labels as predictions; objects without a score have score 1."""

    def __init__(self, labels: PseudoLabelDataset) -> None:
        config = labels.read_config()
        self.title = f"pseudo-labels {labels.folder.name}"
        self.digest = hash_file(labels.codebook)
        self.thing_clusters = config.thing_clusters
        self.stuff_clusters = config.stuff_clusters
        self._photos: dict[str, LabeledPhoto] = {photo.digest: photo for photo in labels.read_photos()}
        self._instances = labels.read_instances()
        self._folder = labels.folder

    def predict(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        photo = self._photos.get(photo_digest)
        if photo is None:
            raise DatasetError(
                f"{self._folder} has no label for the photo {photo_digest:.12}…: label all photos of the dataset"
            )
        cluster_map = ClusterMap(label_map=read_label_map(photo.label), clusters=photo.categories)
        detections = tuple(_parse_instance(entry) for entry in self._instances[photo_digest])
        return ImagePrediction(panoptic=cluster_map, semantic=cluster_map, detections=detections)


def _parse_instance(entry: dict[str, Any]) -> PredictedObject:
    """Convert an annotation of COCO's instance format."""
    size, counts = tuple(entry["segmentation"]["size"]), entry["segmentation"]["counts"]
    rle = Rle(size=size, counts=counts, area=entry["area"], bbox=tuple(entry["bbox"]))
    return PredictedObject(cluster=entry["category_id"], score=entry.get("score", 1.0), rle=rle)


def _load_run(folder: Path, threads: int) -> Predictor:
    import torch

    from model.backends.torch_session import TorchSession
    from model.checkpoints.runs import WEIGHT_FILES, load_run
    from model.export.export import ExportConfig, make_contract

    torch.set_num_threads(threads)
    config, network = load_run(folder)
    contract = make_contract(config, network, ExportConfig(name=f"run {folder.name}", version=f"step {config.step}"))
    return ModelPredictor(contract, TorchSession(network), hash_file(folder / WEIGHT_FILES[config.network]))
