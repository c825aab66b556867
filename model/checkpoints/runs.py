"""A run: what a fit or an import leaves behind, everything that an export needs."""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from safetensors.torch import save_file

from model.checkpoints.state_dicts import load_encoder, load_strictly, read_state_dict
from model.errors import CheckpointError, ConfigError
from model.files import atomic_write
from model.networks.architecture import Network
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, MaskTransformer
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.validation import did_you_mean, reject_unknown_keys

NetworkName = Literal["mask_transformer", "panoptic_cascade"]

RUN_FILE = "run.json"
ENCODER_STEM = "encoder"
WEIGHT_FILES: dict[NetworkName, str] = {
    "mask_transformer": "decoder.safetensors",
    "panoptic_cascade": "weights.safetensors",
}
"""The trained part; the mask transformer's encoder lies beside it."""

_CONFIG_TYPES: dict[NetworkName, type[DecoderConfig] | type[CascadeConfig]] = {
    "mask_transformer": DecoderConfig,
    "panoptic_cascade": CascadeConfig,
}


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run says about itself."""

    network: NetworkName
    network_config: DecoderConfig | CascadeConfig
    """Sizes of the trained part."""
    step: int
    """Optimiser steps behind the weights."""
    side_px: int = 0
    """Of the square that a cascade was made for; 0: pictures of the paper's sizes."""
    encoder_file: str = ""
    """Name of the mask transformer's encoder inside the run; the cascade has none."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where encoder, photos and labels, or the imported weights, come from; goes into the contract."""
    train_config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of the fit; empty for an import."""

    def __post_init__(self) -> None:
        if not isinstance(self.network_config, _CONFIG_TYPES[self.network]):
            raise ConfigError(f"a {self.network} cannot have a {type(self.network_config).__name__}")


def write_run(run: Path, card: RunInfo, module: MaskDecoder | PanopticCascade) -> None:
    """Replace the run's card and the weights of its trained part; the card last, so that a run with a card is whole."""
    with atomic_write(run / WEIGHT_FILES[card.network]) as sibling:
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, sibling)
    with atomic_write(run / RUN_FILE) as sibling:
        sibling.write_text(json.dumps(asdict(card), indent=2) + "\n")


def read_run_info(run: Path) -> RunInfo:
    """Raises CheckpointError if the folder is no finished run."""
    path = run / RUN_FILE
    try:
        content = json.loads(path.read_bytes())
        reject_unknown_keys(RunInfo, content)
        target = _CONFIG_TYPES[_parse_field("network", content["network"], NetworkName)]
        config = target(**parse_fields(content.pop("network_config"), target))
        return RunInfo(network_config=config, **parse_fields(content, RunInfo))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} is not the card of a finished run: {error}") from error


def load_run(run: Path) -> tuple[RunInfo, Network]:
    """The network of a run, ready for inference. Raises CheckpointError if a file is missing or does not fit."""
    card = read_run_info(run)
    state = read_state_dict(run / WEIGHT_FILES[card.network])
    match card.network_config:
        case DecoderConfig() as config:
            encoder = load_encoder(str(run / card.encoder_file), config.side_px)
            decoder = MaskDecoder(config, encoder.config)
            load_strictly(decoder, state)
            return card, MaskTransformer(encoder, decoder).eval()
        case CascadeConfig() as config:
            cascade = PanopticCascade(config, CascadeInferenceConfig())
            load_strictly(cascade, state)
            return card, cascade.eval()


def parse_fields(content: dict[str, Any], target: type[Any]) -> dict[str, Any]:
    """What a dataclass is made of, from what `asdict` wrote.

    Raises ConfigError, with a near match, for an unknown key or choice, and TypeError for a value of another type.
    """
    reject_unknown_keys(target, content)
    kinds = {entry.name: entry.type for entry in fields(target)}
    return {name: _parse_field(name, value, kinds[name]) for name, value in content.items()}


def _parse_field(name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is UnionType:
        if value is None and NoneType in get_args(kind):
            return None
        kind = get_args(kind)[0]
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**parse_fields(value, kind))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            hint = did_you_mean(str(value), get_args(kind), f", known are {', '.join(get_args(kind))}")
            raise ConfigError(f"unknown {name} {value!r}{hint}")
    elif type(value) is not (get_origin(kind) or kind):
        raise TypeError(f"{name} cannot be {value!r}")
    return value
