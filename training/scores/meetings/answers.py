"""Whatever makes clusters, asked about one photo: an artifact, a run, or the pseudo-labels of a store."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32, UInt8

from model.backends.runtime import open_session
from model.backends.session import Backend, Session
from model.contract import CONTRACT_FILE, Contract, Task, read_contract
from model.encodings import encode_outlines
from model.errors import ConfigError, LabelStoreError
from model.files import hash_file
from model.panoptic import Segment, Segmentation, assemble
from model.pixels import place
from model.rle import Outline
from training.labels.store import CONFIG_FILE, LabelStore, StoredPhoto, read_label

LEAST_SCORE = 0.01
"""Of a detection, for average precision: it ranks what the panoptic map would drop."""
_RUN_FILE = "run.json"  # as model.run has it, which needs torch


@dataclass(frozen=True, kw_only=True)
class ClusterMap:
    """A label map and the cluster of each of its segments."""

    label_map: Int32[np.ndarray, "H W"]
    clusters: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object with its whole mask."""

    cluster: int
    score: float
    outline: Outline


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was said about one photo, in its own size."""

    panoptic: ClusterMap
    semantic: ClusterMap
    detections: tuple[Detection, ...]


class Source(Protocol):
    """Something that answers."""

    title: str
    digest: str
    """A hash of what made the clusters."""
    thing_clusters: int
    stuff_clusters: int

    def answer(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> Answer:
        """Raises LabelStoreError if only stored photos are known and this is none of them."""
        ...


def open_source(folder: Path, *, threads: int) -> Source:
    """What lies in the folder, told by the file that each kind is written last with.

    Raises ConfigError if it is none of the three, and what they raise if they are broken.
    """
    openers: dict[str, Callable[[], Source]] = {
        CONTRACT_FILE: lambda: _open_artifact(folder, threads),
        _RUN_FILE: lambda: _open_run(folder, threads),
        CONFIG_FILE: lambda: StoreSource(LabelStore(folder)),
    }
    found = [name for name in openers if (folder / name).is_file()]
    if len(found) != 1:
        held = " and ".join(found) or f"none of {', '.join(openers)}"
        raise ConfigError(f"{folder} holds {held}: give a run, an artifact or a label store")
    return openers[found[0]]()


class NetworkSource:
    """An artifact, or a network in torch."""

    def __init__(self, contract: Contract, session: Session, digest: str) -> None:
        self.title = f"{contract.name} {contract.version} on {session.backend}"
        self.digest = digest
        self.thing_clusters = contract.thing_clusters
        self.stuff_clusters = contract.stuff_clusters
        self._contract = contract
        self._session = session

    def answer(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> Answer:
        contract = self._contract
        pixels, placement = place(image, contract.canvases, contract.stride_px)
        raw = self._session.run(pixels[None], np.array([placement.size]))[0]

        def read(task: Task) -> ClusterMap:
            answer = assemble(raw, placement, contract, task, contract.thresholds)
            return _list_clusters(answer)

        ranked = assemble(raw, placement, contract, "instance", replace(contract.thresholds, score=LEAST_SCORE))
        return Answer(panoptic=read("panoptic"), semantic=read("semantic"), detections=_list_detections(ranked))


class StoreSource:
    """Pseudo-labels, scored like a model's answers; objects without a score are equally sure."""

    def __init__(self, store: LabelStore) -> None:
        config = store.read_config()
        self.title = f"label store {store.folder.name}"
        self.digest = hash_file(store.codebook)
        self.thing_clusters = config.thing_clusters
        self.stuff_clusters = config.stuff_clusters
        self._photos: dict[str, StoredPhoto] = {photo.digest: photo for photo in store.read_photos()}
        self._masks = store.read_masks()
        self._folder = store.folder

    def answer(self, image: UInt8[np.ndarray, "H W 3"], photo_digest: str) -> Answer:
        photo = self._photos.get(photo_digest)
        if photo is None:
            raise LabelStoreError(
                f"{self._folder} has no label for the photo {photo_digest:.12}…: label all photos of the set"
            )
        label_map = read_label(photo.label)
        segments = tuple(
            Segment(id=each, cluster=cluster, is_thing=cluster <= self.thing_clusters, score=1.0)
            for each, cluster in photo.categories.items()
        )
        everything = Segmentation(label_map=label_map, segments=segments)
        clusters = _list_clusters(everything)
        detections = tuple(_read_detection(mask) for mask in self._masks[photo_digest])
        return Answer(panoptic=clusters, semantic=clusters, detections=detections)


def _read_detection(mask: dict[str, Any]) -> Detection:
    """An entry of COCO's instances JSON."""
    height, width = mask["segmentation"]["size"]
    x, y, box_width, box_height = mask["bbox"]
    outline = Outline(
        size=(height, width),
        counts=mask["segmentation"]["counts"],
        area=mask["area"],
        bbox=(x, y, box_width, box_height),
    )
    return Detection(cluster=mask["category_id"], score=mask.get("score", 1.0), outline=outline)


def _open_artifact(folder: Path, threads: int) -> Source:
    backend: Backend = "openvino" if read_contract(folder).precision == "int8" else "cpu"
    contract, session = open_session(folder, backend=backend, threads=threads)
    return NetworkSource(contract, session, contract.files[contract.network_files[-1]])


def _open_run(folder: Path, threads: int) -> Source:
    import torch

    from model.backends.torch_session import TorchSession
    from model.release.export import ExportConfig, make_contract
    from model.run import WEIGHT_FILES, load_run

    torch.set_num_threads(threads)
    card, network = load_run(folder)
    contract = make_contract(card, network, ExportConfig(name=f"run {folder.name}", version=f"step {card.step}"))
    return NetworkSource(contract, TorchSession(network), hash_file(folder / WEIGHT_FILES[card.network]))


def _list_clusters(answer: Segmentation) -> ClusterMap:
    label_map = answer.label_map.astype(np.int32)
    return ClusterMap(label_map=label_map, clusters={each.id: each.cluster for each in answer.segments})


def _list_detections(answer: Segmentation) -> tuple[Detection, ...]:
    return tuple(
        Detection(cluster=segment.cluster, score=segment.score, outline=outline)
        for segment, outline in zip(answer.segments, encode_outlines(answer), strict=True)
    )
