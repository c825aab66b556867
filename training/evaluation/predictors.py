"""Whatever makes clusters, asked about one photo: an artifact, a run, or the pseudo-labels of a store."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32, UInt8

from model.backends.loader import load_session
from model.backends.session import Backend, Session
from model.contract import CONTRACT_FILE, Contract, Task, read_contract
from model.errors import ConfigError, LabelStoreError
from model.files import hash_file
from model.formats.encoders import encode_rles
from model.formats.rle import Rle
from model.images import letterbox_image
from model.postprocessing.panoptic import Segment, Segmentation, postprocess
from training.data.dataset import CONFIG_FILE, LabeledPhoto, PseudoLabelDataset, read_label_map

MIN_SCORE = 0.01
"""Of a detection, for average precision: it ranks what the panoptic map would drop."""
_RUN_FILE = "run.json"  # as model.checkpoints.runs has it, which needs torch


@dataclass(frozen=True, kw_only=True)
class ClusterMap:
    """A label map and the cluster of each of its segments."""

    label_map: Int32[np.ndarray, "H W"]
    clusters: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class PredictedObject:
    """One object with its whole mask."""

    cluster: int
    score: float
    outline: Rle


@dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """What was said about one photo, in its own size."""

    panoptic: ClusterMap
    semantic: ClusterMap
    detections: tuple[PredictedObject, ...]


class Predictor(Protocol):
    """Something that answers."""

    title: str
    digest: str
    """A hash of what made the clusters."""
    thing_clusters: int
    stuff_clusters: int

    def answer(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        """Raises LabelStoreError if only stored photos are known and this is none of them."""
        ...


def load_predictor(folder: Path, *, threads: int) -> Predictor:
    """What lies in the folder, told by the file that each kind is written last with.

    Raises ConfigError if it is none of the three, and what they raise if they are broken.
    """
    openers: dict[str, Callable[[], Predictor]] = {
        CONTRACT_FILE: lambda: _open_artifact(folder, threads),
        _RUN_FILE: lambda: _open_run(folder, threads),
        CONFIG_FILE: lambda: PseudoLabelPredictor(PseudoLabelDataset(folder)),
    }
    found = [name for name in openers if (folder / name).is_file()]
    if len(found) != 1:
        held = " and ".join(found) or f"none of {', '.join(openers)}"
        raise ConfigError(f"{folder} holds {held}: give a run, an artifact or a label store")
    return openers[found[0]]()


class ModelPredictor:
    """An artifact, or a network in torch."""

    def __init__(self, contract: Contract, session: Session, digest: str) -> None:
        self.title = f"{contract.name} {contract.version} on {session.backend}"
        self.digest = digest
        self.thing_clusters = contract.thing_clusters
        self.stuff_clusters = contract.stuff_clusters
        self._contract = contract
        self._session = session

    def answer(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        contract = self._contract
        pixels, placement = letterbox_image(image, contract.input_sizes, contract.stride_px)
        raw = self._session.run(pixels[None], np.array([placement.size]))[0]

        def read(task: Task) -> ClusterMap:
            answer = postprocess(raw, placement, contract, task, contract.thresholds)
            return _list_clusters(answer)

        ranked = postprocess(raw, placement, contract, "instance", replace(contract.thresholds, score=MIN_SCORE))
        return ImagePrediction(
            panoptic=read("panoptic"), semantic=read("semantic"), detections=_list_detections(ranked)
        )


class PseudoLabelPredictor:
    """Pseudo-labels, scored like a model's answers; objects without a score are equally sure."""

    def __init__(self, store: PseudoLabelDataset) -> None:
        config = store.read_config()
        self.title = f"label store {store.folder.name}"
        self.digest = hash_file(store.codebook)
        self.thing_clusters = config.thing_clusters
        self.stuff_clusters = config.stuff_clusters
        self._photos: dict[str, LabeledPhoto] = {photo.digest: photo for photo in store.read_photos()}
        self._masks = store.read_instances()
        self._folder = store.folder

    def answer(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> ImagePrediction:
        photo = self._photos.get(photo_digest)
        if photo is None:
            raise LabelStoreError(
                f"{self._folder} has no label for the photo {photo_digest:.12}…: label all photos of the set"
            )
        label_map = read_label_map(photo.label)
        segments = tuple(
            Segment(id=each, cluster=cluster, is_thing=cluster <= self.thing_clusters, score=1.0)
            for each, cluster in photo.categories.items()
        )
        everything = Segmentation(label_map=label_map, segments=segments)
        clusters = _list_clusters(everything)
        detections = tuple(_read_detection(mask) for mask in self._masks[photo_digest])
        return ImagePrediction(panoptic=clusters, semantic=clusters, detections=detections)


def _read_detection(mask: dict[str, Any]) -> PredictedObject:
    """An entry of COCO's instances JSON."""
    height, width = mask["segmentation"]["size"]
    x, y, box_width, box_height = mask["bbox"]
    outline = Rle(
        size=(height, width),
        counts=mask["segmentation"]["counts"],
        area=mask["area"],
        bbox=(x, y, box_width, box_height),
    )
    return PredictedObject(cluster=mask["category_id"], score=mask.get("score", 1.0), outline=outline)


def _open_artifact(folder: Path, threads: int) -> Predictor:
    backend: Backend = "openvino" if read_contract(folder).precision == "int8" else "cpu"
    contract, session = load_session(folder, backend=backend, threads=threads)
    return ModelPredictor(contract, session, contract.files[contract.network_files[-1]])


def _open_run(folder: Path, threads: int) -> Predictor:
    import torch

    from model.backends.torch_session import TorchSession
    from model.checkpoints.runs import WEIGHT_FILES, load_run
    from model.export.export import ExportConfig, make_contract

    torch.set_num_threads(threads)
    card, network = load_run(folder)
    contract = make_contract(card, network, ExportConfig(name=f"run {folder.name}", version=f"step {card.step}"))
    return ModelPredictor(contract, TorchSession(network), hash_file(folder / WEIGHT_FILES[card.network]))


def _list_clusters(answer: Segmentation) -> ClusterMap:
    label_map = answer.label_map.astype(np.int32)
    return ClusterMap(label_map=label_map, clusters={each.id: each.cluster for each in answer.segments})


def _list_detections(answer: Segmentation) -> tuple[PredictedObject, ...]:
    return tuple(
        PredictedObject(cluster=segment.cluster, score=segment.score, outline=outline)
        for segment, outline in zip(answer.segments, encode_rles(answer), strict=True)
    )
