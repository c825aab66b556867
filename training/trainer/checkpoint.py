"""Checkpoints to resume a training run from, and initial weights from another run or an artifact."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from model.backends.torch_session import load_torch_network
from model.checkpoints.runs import WEIGHT_FILES, NetworkName, read_run_info
from model.checkpoints.state_dicts import StateDict, load_strictly, read_state_dict
from model.contract import CONTRACT_FILE, NETWORK_FILE, Contract, read_contract
from model.errors import CheckpointError, ConfigError
from model.files import atomic_write, hash_file
from model.networks.mask_transformer import MaskTransformer

FORMAT_VERSION = 2
_METADATA = "metadata"
_MODEL, _EMA, _OPTIMIZER = "model.", "ema.", "optimizer."
"""Prefixes of tensor names."""


def write_checkpoint(
    path: Path, module: nn.Module, optimizer: Optimizer, metadata: dict[str, Any], ema: AveragedModel | None = None
) -> None:
    """Save weights, their moving average and the optimizer state atomically; `metadata` must be JSON.

    Frozen parameters are not stored.
    """
    tensors = _prefix(_MODEL, _split_state(module)[0])
    if ema is not None:
        tensors |= _prefix(_EMA, _split_state(ema)[0])
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= _prefix(f"{_OPTIMIZER}{index}.", entry)
    content = {"format_version": FORMAT_VERSION, **metadata}
    with atomic_write(path) as sibling:
        save_file(tensors, sibling, metadata={_METADATA: json.dumps(content)})


def read_checkpoint_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint.

    Raises CheckpointError if the file is not a checkpoint, or has another format version.
    """
    try:
        with safe_open(path, "pt") as stored:
            metadata: dict[str, Any] = json.loads(stored.metadata()[_METADATA])
            version = metadata.pop("format_version")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a training checkpoint of this version: delete it to restart") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, expected {FORMAT_VERSION}: delete it to restart the run"
        )
    return metadata


def load_checkpoint(path: Path, module: nn.Module, optimizer: Optimizer, ema: AveragedModel | None = None) -> None:
    """Load the stored tensors into a module, an optimizer and a moving average of the same shapes.

    Frozen parameters keep their values. Raises CheckpointError if a tensor is missing or has another shape.
    """
    with safe_open(path, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    for prefix, part in ((_MODEL, module), (_EMA, ema)):
        if part is not None:
            load_strictly(part, _split_state(part)[1] | _strip_prefix(tensors, prefix))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _strip_prefix(tensors, _OPTIMIZER).items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def _split_state(module: nn.Module) -> tuple[StateDict, StateDict]:
    """Return the tensors that training changes, and frozen parameters."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    state = module.state_dict()
    return {name: state[name] for name in state if name not in frozen}, {name: state[name] for name in frozen}


def _prefix(prefix: str, tensors: StateDict) -> StateDict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def load_initial_weights(module: nn.Module, network: NetworkName, source: Path) -> dict[str, Any]:
    """Load the weights of a run or artifact that match by name and shape, as detectron2's checkpointer does.

    Returns their provenance: the hash of the weight file, the optimizer steps that produced them, and the parameters
    that keep their initialization, such as class heads for another number of clusters. The weights of an artifact are
    rounded to its precision. Raises ConfigError if `source` holds another network, or if fewer than half of the
    parameters match.
    """
    if (source / CONTRACT_FILE).is_file():
        contract = read_contract(source)
        name, state, digest = contract.network, _read_artifact(contract, source), contract.files[NETWORK_FILE]
        steps = int(contract.provenance.get("steps", 0))
    else:
        info = read_run_info(source)
        path = source / WEIGHT_FILES[info.network]
        name, state, digest, steps = info.network, read_state_dict(path), hash_file(path), info.step
    if name != network:
        raise ConfigError(f"{source} is a {name}: a {network} cannot be initialized from it")
    own = module.state_dict()
    matching = {key: tensor for key, tensor in state.items() if key in own and tensor.shape == own[key].shape}
    if 2 * len(matching) < len(own):
        raise ConfigError(f"only {len(matching)} of {len(own)} parameters of {source} have the network's shapes")
    module.load_state_dict(matching, strict=False)
    return {"sha256": digest, "steps": steps, "reinitialized": [key for key in own if key not in matching]}


def _read_artifact(contract: Contract, artifact: Path) -> StateDict:
    """Read the trained part of an artifact; weights that the output does not depend on are not exported."""
    network = load_torch_network(contract, artifact)
    prefix = "decoder." if isinstance(network, MaskTransformer) else ""
    state = network.state_dict()
    kept = [name for name in state if name.startswith(prefix) and not name.startswith(network.unexported_weights)]
    return {name.removeprefix(prefix): state[name] for name in kept}
