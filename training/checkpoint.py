"""Everything that a fit needs to go on, in one file."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from model.errors import CheckpointError
from model.files import replace_file
from model.weights.checkpoints import load_exactly

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
    with replace_file(path) as sibling:
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
            load_exactly(each, _keep(each.state_dict(), frozen) | _cut(tensors, beginning))
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
