"""What is asked of a version before it answers anybody, beyond what `model.backends.runtime` asks of every artifact."""

import logging

from model.contract import Contract
from model.errors import Busy, ContractMismatch, DeadlinePassed, NotReady
from service.artifact.pipeline import Pipeline

logger = logging.getLogger(__name__)

_LEAST_RUNS, _MOST_RUNS = 3, 12
"""The shortest counts: whatever else the machine does only makes runs longer. More of them if it looks slow."""
_LEAST_EXCESS_S = 0.02
"""What is slower by less is not felt."""


def require_name(contract: Contract, model: str, version: str) -> None:
    """Raise ContractMismatch unless an artifact is what its folder says."""
    if (contract.name, contract.version) != (model, version):
        raise ContractMismatch(
            f"version {version!r} of {model!r} says that it is {contract.version!r} of {contract.name!r}"
        )


async def require_speed(candidate: Pipeline, active: Pipeline, slowest: float) -> None:
    """Raise ContractMismatch if the candidate takes more than `slowest` times as long for a picture, side by side."""
    own_s = other_s = float("inf")
    try:
        for run in range(1, _MOST_RUNS + 1):
            own_s = min(own_s, await candidate.time_run())
            other_s = min(other_s, await active.time_run())
            if run >= _LEAST_RUNS and own_s <= max(slowest * other_s, other_s + _LEAST_EXCESS_S):
                return
    except (Busy, NotReady, DeadlinePassed) as error:
        logger.warning("%s %s was not timed: %s", candidate.contract.name, candidate.contract.version, error)
        return
    raise ContractMismatch(f"a picture takes {own_s:.3f} s, the active version {other_s:.3f} s")
