"""Runs on disk: the weights and description that training or an import leaves and an export reads."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from model.checkpoints.dino import load_encoder
from model.checkpoints.state_dicts import load_strictly, read_state_dict
from model.errors import CheckpointError, ConfigError
from model.files import atomic_write, replace_file
from model.networks.interface import Network
from model.networks.mask_transformer import DecoderConfig, MaskDecoder, MaskTransformer
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.validation import parse, parse_versioned_json, to_versioned_json

NetworkName = Literal["mask_transformer", "panoptic_cascade"]

FORMAT_VERSION = 2
RUN_FILE = "run.json"
ENCODER_STEM = "encoder"
WEIGHT_FILES: dict[NetworkName, str] = {
    "mask_transformer": "decoder.safetensors",
    "panoptic_cascade": "weights.safetensors",
}
"""File of the trained weights; a mask transformer's encoder is a second file."""

_CONFIG_TYPES: dict[NetworkName, type[DecoderConfig] | type[CascadeConfig]] = {
    "mask_transformer": DecoderConfig,
    "panoptic_cascade": CascadeConfig,
}


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Description of a run, stored as `run.json`."""

    network: NetworkName
    network_config: DecoderConfig | CascadeConfig
    """Sizes of the trained part."""
    step: int
    """Optimizer steps of the training."""
    side_px: int = 0
    """Side of the square input that a cascade was trained for; 0: the paper's input sizes."""
    encoder_file: str = ""
    """Name of the mask transformer's encoder inside the run; the cascade has none."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Origin of encoder, photos and labels, or of the imported weights; copied into the contract."""
    train_config: dict[str, Any] = field(default_factory=dict)
    """Resolved training configuration; empty for an import."""

    def __post_init__(self) -> None:
        if not isinstance(self.network_config, _CONFIG_TYPES[self.network]):
            raise ConfigError(f"network {self.network} cannot have a {type(self.network_config).__name__}")


def write_run(run: Path, info: RunInfo, module: MaskDecoder | PanopticCascade) -> None:
    """Write the trained weights, then the description: a run that has one is complete."""
    with atomic_write(run / WEIGHT_FILES[info.network]) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, temporary)
    replace_file(run / RUN_FILE, to_versioned_json(info, FORMAT_VERSION))


def read_run_info(run: Path) -> RunInfo:
    """Read the description of a run. Raises CheckpointError if the folder is not a complete run."""
    path = run / RUN_FILE
    try:
        content = parse_versioned_json(dict, path.read_bytes(), FORMAT_VERSION, ": train or import it again")
        if config_type := _CONFIG_TYPES.get(content["network"]):  # names an unknown key, unlike the union
            content["network_config"] = asdict(parse(config_type, content["network_config"]))
        return parse(RunInfo, content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not describe a complete run: {error}") from error


def load_run(run: Path) -> tuple[RunInfo, Network]:
    """Load the network of a run for inference. Raises CheckpointError if a file is missing or does not fit."""
    info = read_run_info(run)
    state = read_state_dict(run / WEIGHT_FILES[info.network])
    match info.network_config:
        case DecoderConfig() as config:
            encoder = load_encoder(str(run / info.encoder_file), config.side_px)
            decoder = MaskDecoder(config, encoder.config)
            load_strictly(decoder, state)
            return info, MaskTransformer(encoder, decoder).eval()
        case CascadeConfig() as config:
            cascade = PanopticCascade(config, CascadeInferenceConfig())
            load_strictly(cascade, state)
            return info, cascade.eval()
