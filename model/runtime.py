"""Artifacts that run: one protocol for every backend, and the golden answers that each must give."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
from jaxtyping import Bool, Float32, Int64, UInt8

from model.contract import GOLDEN_FILE, NETWORK_FILE, Contract, read_contract
from model.errors import ArtifactError, ConfigError, ContractMismatch, ParityError
from model.files import read_arrays

logger = logging.getLogger(__name__)

SCORE_TOLERANCE = 2e-3
"""Scores of one network on two machines; 16 times the difference seen between torch and ONNX Runtime."""
EQUAL_SHARE = 0.999
"""Least share of equal mask and semantic cells."""
_GOLDEN_SCORE = 0.05
_ORT_ERROR = 3


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A network's answer for one picture, static in shape, detections in no order."""

    scores: Float32[np.ndarray, "D"]
    clusters: Int64[np.ndarray, "D"]
    """Thing clusters counted from 0."""
    boxes: Float32[np.ndarray, "D 4"]
    """x0, y0, x1, y1 in input pixels."""
    masks: Float32[np.ndarray, "D h w"]
    """Probabilities at the contract's stride."""
    semantic: Float32[np.ndarray, "S+1 h w"]
    """Logits; 0 is "things", s is stuff cluster s."""


class Session(Protocol):
    """Something that runs a network."""

    backend: str

    def run(self, pixels: UInt8[np.ndarray, "B 3 S S"]) -> list[Raw]:
        """One answer a picture, in order; each is the same alone and in any batch."""
        ...


class OnnxSession:
    """A network in ONNX Runtime."""

    def __init__(self, network: Path, *, threads: int) -> None:
        """Raises ArtifactError if ONNX Runtime refuses the file."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ORT_ERROR
        try:
            self._session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise ArtifactError(f"{network} was refused by ONNX Runtime: {str(error).splitlines()[0]}") from error
        self.backend = "cpu"

    def run(self, pixels: UInt8[np.ndarray, "B 3 S S"]) -> list[Raw]:
        names = ["scores", "clusters", "boxes", "masks", "semantic"]
        outputs = self._session.run(names, {"pixels": pixels})
        return [Raw(**dict(zip(names, row, strict=True))) for row in zip(*outputs, strict=True)]

    def check_contract(self, contract: Contract) -> None:
        """Raise ContractMismatch if the graph's inputs and outputs are not what the contract says."""
        side, cells = contract.side_px, contract.side_px // contract.stride_px
        expected = {
            "pixels": [3, side, side],
            "scores": [contract.detections],
            "clusters": [contract.detections],
            "boxes": [contract.detections, 4],
            "masks": [contract.detections, cells, cells],
            "semantic": [contract.stuff_clusters + 1, cells, cells],
        }
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()]
        actual = {node.name: list(node.shape[1:]) for node in nodes}
        if actual != expected:
            raise ContractMismatch(f"the network has {actual}, its contract says {expected}")


def open_session(artifact: Path, *, threads: int = 2) -> tuple[Contract, Session]:
    """A checked artifact, ready to run; nothing is returned unless every check passed.

    Raises ArtifactError (files), ContractMismatch (shapes) or ParityError (golden answers).
    """
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    contract = read_contract(artifact)
    session = OnnxSession(artifact / NETWORK_FILE, threads=threads)
    session.check_contract(contract)
    check_golden(session, artifact / GOLDEN_FILE)
    logger.info("opened %s %s on %s", contract.name, contract.version, session.backend)
    return contract, session


def check_golden(session: Session, path: Path) -> None:
    """Raise ParityError unless the session gives the golden answers."""
    try:
        stored = read_arrays(path)
        pixels, scores = stored.pop("pixels"), stored["scores"]
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{path} holds no golden answers: {error}") from error
    given = summarise(session.run(pixels), scores >= _GOLDEN_SCORE)
    if stored.keys() != given.keys() or any(stored[key].shape != given[key].shape for key in given):
        raise ParityError(f"{path}: golden answers of another network")
    drift = float(np.abs(stored["scores"] - given["scores"]).max())
    if not drift <= SCORE_TOLERANCE:  # a score that is not a number is no answer either
        raise ParityError(f"{path}: scores differ by {drift:.4f}, at most {SCORE_TOLERANCE} is allowed")
    for key in ("clusters", "masks", "semantic"):
        equal = float((stored[key] == given[key]).mean())
        if equal < EQUAL_SHARE:
            raise ParityError(f"{path}: {key} equal on {equal:.2%} only, at least {EQUAL_SHARE:.1%} is expected")


def make_golden(session: Session, pixels: UInt8[np.ndarray, "B 3 S S"]) -> dict[str, np.ndarray]:
    """The arrays of a golden file: pictures, and what the session makes of them."""
    answers = session.run(pixels)
    is_strong = np.stack([answer.scores for answer in answers]) >= _GOLDEN_SCORE
    return {"pixels": pixels, **summarise(answers, is_strong)}


def summarise(answers: list[Raw], is_strong: Bool[np.ndarray, "B D"]) -> dict[str, np.ndarray]:
    """What golden answers keep of raw ones: scores, and the decisions that follow for strong detections."""
    masks = np.stack([answer.masks > 0.5 for answer in answers])
    if masks.shape[:2] != is_strong.shape:
        return {}
    masks[~is_strong] = False
    return {
        "scores": np.stack([answer.scores for answer in answers]),
        "clusters": np.where(is_strong, np.stack([answer.clusters for answer in answers]), -1),
        "masks": np.packbits(masks, axis=-1),
        "semantic": np.stack([answer.semantic.argmax(0) for answer in answers]).astype(np.uint16),
    }
