"""The weights of an earlier run as the start of another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from model.errors import ConfigError
from model.files import hash_file
from model.run import WEIGHT_FILES, NetworkName, read_run_card
from model.weights.checkpoints import read_state


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


def warm_start(module: nn.Module, network: NetworkName, run: Path) -> WarmStart:
    """Load what fits by name and shape, as detectron2's checkpointer does: heads of other classes stay as drawn.

    Raises ConfigError if the run is another network's, or if less than half of the parameters fit.
    """
    card = read_run_card(run)
    if card.network != network:
        raise ConfigError(f"{run} is a {card.network}: a {network} cannot start from it")
    path = run / WEIGHT_FILES[network]
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in read_state(path).items() if name in own}
    fitting = {name: tensor for name, tensor in fitting.items() if tensor.shape == own[name].shape}
    if 2 * len(fitting) < len(own):
        raise ConfigError(f"{run} has only {len(fitting)} of {len(own)} parameters in these shapes: not a start for it")
    module.load_state_dict(fitting, strict=False)
    drawn = tuple(name for name in own if name not in fitting)
    return WarmStart(sha256=hash_file(path), step=card.step, drawn=drawn)
