"""Encoder files: downloaded, given, or taken out of the bundled model."""

import logging
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from model.backends.torch_session import load_torch_network
from model.checkpoints.dino import (
    DEFAULT_ENCODER,
    DEFAULT_ENCODER_SHA256,
    is_same_encoder,
    read_encoder_state_dict,
)
from model.checkpoints.runs import read_run_info
from model.checkpoints.state_dicts import DEFAULT_CACHE, StateDict, fetch_file
from model.contract import CONTRACT_FILE, NETWORK_FILE, find_bundled_artifact, read_contract
from model.errors import CheckpointError
from model.files import atomic_write
from model.networks.mask_transformer import MaskTransformer

logger = logging.getLogger(__name__)

BUNDLED_ENCODER = "bundled"
_ORIGIN_KEY = "origin"


def fetch_encoder(source: str = DEFAULT_ENCODER, cache: Path = DEFAULT_CACHE) -> Path:
    """Return the file of an encoder by path or URL, or of the bundled model's encoder.

    Raises CheckpointError if there is no such file, or if it cannot be downloaded.
    """
    if source == BUNDLED_ENCODER:
        return _extract_encoder(find_bundled_artifact(), cache.expanduser())
    try:
        return fetch_file(source, DEFAULT_ENCODER_SHA256 if source == DEFAULT_ENCODER else "", cache)
    except CheckpointError as error:
        if "://" not in source:
            raise
        hint = f"without internet, give --encoder FILE or --encoder {BUNDLED_ENCODER}, the bundled model's encoder"
        raise CheckpointError(f"{error}; {hint}") from error


def read_encoder_origin(path: Path) -> str:
    """Return the origin that a file of the bundled model's encoder states, else an empty string."""
    if path.suffix != ".safetensors" or not path.is_file():
        return ""
    with safe_open(path, "pt") as stored:
        return str((stored.metadata() or {}).get(_ORIGIN_KEY, ""))


def warn_about_other_encoder(source: Path, encoder: Path) -> None:
    """Log a warning if a mask transformer, a run or an artifact, was trained on another encoder than this file's."""
    stored = _read_encoder(source)
    if stored is None or is_same_encoder(stored, read_encoder_state_dict(encoder)):
        return
    logger.warning(
        "%s was trained on another encoder than these labels (%s): training starts from its decoder all the same, and"
        " takes longer to become as good; label with its encoder, or leave out --init-weights",
        source,
        encoder.name,
    )


def _extract_encoder(artifact: Path, cache: Path) -> Path:
    """Write the encoder of an artifact as safetensors, with the precision that it has there."""
    contract = read_contract(artifact)
    path = cache / f"{contract.files[NETWORK_FILE][:16]}-encoder.safetensors"
    if not path.is_file():
        state = _read_encoder(artifact)
        if state is None:
            raise CheckpointError(f"{artifact} is a {contract.network}, which has no encoder")
        origin = f"{contract.provenance['encoder']['origin']}; from {contract.name} {contract.version}"
        with atomic_write(path) as temporary:
            save_file(state, temporary, {_ORIGIN_KEY: f"{origin}, {contract.precision}"})
    return path


def _read_encoder(source: Path) -> StateDict | None:
    """Return the encoder of a run or an artifact; None unless it is a mask transformer."""
    if (source / CONTRACT_FILE).is_file():
        network = load_torch_network(read_contract(source), source)
        if not isinstance(network, MaskTransformer):
            return None
        return {name: tensor.contiguous() for name, tensor in network.encoder.state_dict().items()}
    info = read_run_info(source)
    return read_encoder_state_dict(source / info.encoder_file) if info.encoder_file else None
