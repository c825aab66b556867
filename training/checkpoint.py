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
_DECODER, _OPTIMISER = "decoder.", "optimiser."


def write_checkpoint(path: Path, decoder: nn.Module, optimiser: Optimizer, facts: dict[str, Any]) -> None:
    """Replace the checkpoint, whole or not at all; `facts` are JSON."""
    tensors = {f"{_DECODER}{name}": tensor for name, tensor in decoder.state_dict().items()}
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


def load_checkpoint(path: Path, decoder: nn.Module, optimiser: Optimizer) -> None:
    """Put the stored tensors into a decoder and an optimiser of the same sizes."""
    with safe_open(path, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    load_exactly(
        decoder, {key.removeprefix(_DECODER): value for key, value in tensors.items() if key.startswith(_DECODER)}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(_OPTIMISER):
            index, name = key.removeprefix(_OPTIMISER).split(".", 1)
            moments.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
