"""The weights of an earlier run, or of an artifact, as the start of another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from model.backends.restoration import restore_network
from model.contract import CONTRACT_FILE, read_contract
from model.errors import ConfigError
from model.files import hash_file
from model.network.architecture import list_idle
from model.network.mask_transformer import MaskTransformer
from model.run import WEIGHT_FILES, NetworkName, read_run_card
from model.weights.checkpoints import State, read_state


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
    state: State
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
    card = read_run_card(run)
    path = run / WEIGHT_FILES[card.network]
    return _Earlier(network=card.network, state=read_state(path), sha256=hash_file(path), step=card.step)


def _read_artifact(artifact: Path) -> _Earlier:
    """The trained part of an artifact; what no answer depends on is not in it."""
    contract = read_contract(artifact)
    if contract.precision == "int8":
        raise ConfigError(f"{artifact} is of int8, which no fit starts from: give the artifact that it was made from")
    restored = restore_network(contract, artifact)
    idle, part = list_idle(restored), "decoder." if isinstance(restored, MaskTransformer) else ""
    state = restored.state_dict()
    kept = [name for name in state if name.startswith(part) and not name.startswith(idle)]
    return _Earlier(
        network=contract.network,
        state={name.removeprefix(part): state[name] for name in kept},
        sha256=contract.files[contract.network_files[-1]],
        step=int(contract.provenance.get("steps", 0)),
    )
