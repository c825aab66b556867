"""Artifacts that run: one protocol for every backend, and the golden answers that each must give."""

import logging
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
from jaxtyping import UInt8

from model.contract import GOLDEN_FILE, NETWORK_FILE, Contract, read_contract
from model.errors import ArtifactError, ConfigError, ContractMismatch
from model.files import read_arrays
from model.parity import Decisions, compare, decide
from model.raw import PARTS, Raw

logger = logging.getLogger(__name__)

_ORT_ERROR = 3


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
        outputs = self._session.run(PARTS, {"pixels": pixels})
        return [Raw(**dict(zip(PARTS, row, strict=True))) for row in zip(*outputs, strict=True)]

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


def write_golden(session: Session, pixels: UInt8[np.ndarray, "B 3 S S"], path: Path) -> None:
    """Keep pictures and what the session decides about them."""
    decisions = decide(session.run(pixels))
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, pixels=pixels, **vars(decisions))


def check_golden(session: Session, path: Path) -> None:
    """Raise ParityError unless the session gives the golden answers, ArtifactError if there are none."""
    try:
        stored = read_arrays(path)
        pixels = stored.pop("pixels")
        reference = Decisions(**stored)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} holds no golden answers: {error}") from error
    compare(reference, decide(session.run(pixels))).require(f"{path} on {session.backend}")
