"""Everything that a fit needs to go on, in one file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from model.backends.onnx_to_torch import load_torch_network
from model.checkpoints.runs import WEIGHT_FILES, NetworkName, read_run_info
from model.checkpoints.state_dicts import StateDict, load_strictly, read_state_dict
from model.contract import CONTRACT_FILE, read_contract
from model.errors import CheckpointError, ConfigError
from model.files import atomic_write, hash_file
from model.networks.architecture import list_unexported_weights
from model.networks.mask_transformer import MaskTransformer

_FACTS = "facts"
_MODULE, _AVERAGE, _OPTIMISER = "decoder.", "average.", "optimiser."
"""Beginnings of names; the first from when only decoders were trained."""


def write_checkpoint(
    path: Path, module: nn.Module, optimiser: Optimizer, facts: dict[str, Any], average: nn.Module | None = None
) -> None:
    """Replace the checkpoint, whole or not at all; `facts` are JSON. Parameters that are not trained are left out."""
    frozen = _list_frozen(module)
    tensors: dict[str, Tensor] = {}
    for beginning, each in ((_MODULE, module), (_AVERAGE, average)):
        state = each.state_dict() if each is not None else {}
        tensors |= {f"{beginning}{name}": tensor for name, tensor in state.items() if name not in frozen}
    for index, entry in optimiser.state_dict()["state"].items():
        tensors |= {f"{_OPTIMISER}{index}.{name}": tensor for name, tensor in entry.items()}
    with atomic_write(path) as sibling:
        save_file(tensors, sibling, metadata={_FACTS: json.dumps(facts)})


def read_facts(path: Path) -> dict[str, Any]:
    """What was said of a checkpoint. Raises CheckpointError if the file is none."""
    try:
        with safe_open(path, "pt") as stored:
            facts: dict[str, Any] = json.loads(stored.metadata()[_FACTS])
            return facts
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a fit: {error}") from error


def load_checkpoint(path: Path, module: nn.Module, optimiser: Optimizer, average: nn.Module | None = None) -> None:
    """Put the stored tensors into a module, an optimiser and an average of the same sizes."""
    with safe_open(path, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    frozen = _list_frozen(module)
    for beginning, each in ((_MODULE, module), (_AVERAGE, average)):
        if each is not None:
            load_strictly(each, _keep(each.state_dict(), frozen) | _cut(tensors, beginning))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _cut(tensors, _OPTIMISER).items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})


def _list_frozen(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _keep(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: state[name] for name in names}


def _cut(tensors: dict[str, Tensor], beginning: str) -> dict[str, Tensor]:
    """Those whose names begin so, without the beginning."""
    return {key.removeprefix(beginning): value for key, value in tensors.items() if key.startswith(beginning)}


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What was taken."""

    sha256: str
    """Of the weights."""
    step: int
    """Optimiser steps behind them."""
    drawn: tuple[str, ...]
    """Parameters that stay as they were drawn, the run having none of that name and shape."""

    def describe(self) -> dict[str, Any]:
        """For the provenance of what is fitted."""
        return {"sha256": self.sha256, "steps": self.step, "drawn": list(self.drawn)}


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """What there is to start from."""

    network: str
    state: StateDict
    sha256: str
    step: int


def warm_start(module: nn.Module, network: NetworkName, run: Path) -> WarmStart:
    """Load what fits by name and shape, as detectron2's checkpointer does: heads of other classes stay as drawn.

    `run` may also be an artifact, whose weights are rounded as they are stored there. Raises ConfigError if it is
    another network's, or if less than half of the parameters fit.
    """
    earlier = _read_artifact(run) if (run / CONTRACT_FILE).is_file() else _read_run(run)
    if earlier.network != network:
        raise ConfigError(f"{run} is a {earlier.network}: a {network} cannot start from it")
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in earlier.state.items() if name in own}
    fitting = {name: tensor for name, tensor in fitting.items() if tensor.shape == own[name].shape}
    if 2 * len(fitting) < len(own):
        raise ConfigError(f"{run} has only {len(fitting)} of {len(own)} parameters in these shapes: not a start for it")
    module.load_state_dict(fitting, strict=False)
    drawn = tuple(name for name in own if name not in fitting)
    return WarmStart(sha256=earlier.sha256, step=earlier.step, drawn=drawn)


def _read_run(run: Path) -> _Earlier:
    card = read_run_info(run)
    path = run / WEIGHT_FILES[card.network]
    return _Earlier(network=card.network, state=read_state_dict(path), sha256=hash_file(path), step=card.step)


def _read_artifact(artifact: Path) -> _Earlier:
    """The trained part of an artifact; what no answer depends on is not in it."""
    contract = read_contract(artifact)
    if contract.precision == "int8":
        raise ConfigError(f"{artifact} is of int8, which no fit starts from: give the artifact that it was made from")
    restored = load_torch_network(contract, artifact)
    idle, part = list_unexported_weights(restored), "decoder." if isinstance(restored, MaskTransformer) else ""
    state = restored.state_dict()
    kept = [name for name in state if name.startswith(part) and not name.startswith(idle)]
    return _Earlier(
        network=contract.network,
        state={name.removeprefix(part): state[name] for name in kept},
        sha256=contract.files[contract.network_files[-1]],
        step=int(contract.provenance.get("steps", 0)),
    )
