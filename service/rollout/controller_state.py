"""What one process holds of a model, and how that is told."""

import asyncio
from dataclasses import dataclass, field

from model.errors import RegistryError, UsegError
from model.registry.deployment import DeploymentState
from model.registry.versions import Registry
from service.inference.loaded_model import LoadedModel
from service.rollout.canary_analysis import VersionMetrics
from service.rollout.model_status import HistoryEvent, ModelHistory, VersionStatus
from service.rollout.router import TrafficRouter
from service.telemetry.metrics import VersionRole


@dataclass(kw_only=True)
class PreviousVersion:
    """A version that was active before, and how it did."""

    version: str
    until: float
    """On the event loop's clock; from then on it is closed, and its successor is trusted."""
    record: VersionMetrics


@dataclass(kw_only=True)
class RejectedVersion:
    """A version that this process would not serve."""

    reason: str
    revision: int
    """Of the registry's state; from a later one on, the version is tried again if it is asked for."""


@dataclass(kw_only=True)
class ControllerState:
    """What a follower holds of its model."""

    state: DeploymentState = field(default_factory=DeploymentState)
    listed: tuple[str, ...] = ()
    """The versions that the registry has, those that were written last last."""
    open: dict[str, LoadedModel] = field(default_factory=dict)
    refused: dict[str, RejectedVersion] = field(default_factory=dict)
    opening: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """One at most: openings take memory, and turns of the processor."""
    standby: PreviousVersion | None = None

    @property
    def orphans(self) -> frozenset[str]:
        """The versions that are served and that the registry does not give any more.

        They were deleted, their disk is not mounted, or what is served cannot be read: nobody may feel it.
        """
        return self.state.versions_in_use.intersection(self.open).difference(self.listed)

    @property
    def versions(self) -> tuple[str, ...]:
        """All there are to tell of."""
        return (*self.listed, *sorted(self.orphans))


def version_role(held: ControllerState, router: TrafficRouter, version: str) -> VersionRole:
    """What a version is up to in this process."""
    deployment = held.open.get(version)
    if version in held.orphans:
        return "missing_from_registry"
    if deployment is None:
        return "loading" if version in held.opening else "failed" if version in held.refused else "unloaded"
    if deployment is router.active:
        return "active"
    if deployment is router.canary:
        return "canary"
    return "shadow" if router.shadow and router.shadow.pipeline is deployment.pipeline else "standby"


def read_registry_state(registry: Registry, model: str, known: DeploymentState) -> DeploymentState:
    """What the registry says of a model. Raises RegistryError if that cannot be read, or is gone."""
    state = registry.read_state(model)
    if not state.revision and known.revision:
        raise RegistryError(f"the registry does not know any more what is served of {model!r}")
    return state


def model_status(registry: Registry, model: str, held: ControllerState, router: TrafficRouter) -> ModelHistory:
    """What the versions of a model are up to; reads files. What cannot be read any more is told as it was."""
    try:
        state = read_registry_state(registry, model, held.state)
    except UsegError:
        state = held.state
    shares = {each.version: each.traffic_fraction for each in (state.canary, state.shadow) if each}
    serving = router.active.pipeline if router.active else None
    return ModelHistory(
        name=model,
        active=state.active,
        serving=serving.contract.version if serving else None,
        revision=state.revision,
        versions=[
            VersionStatus(
                version=each,
                state=version_role(held, router, each),
                share=shares.get(each),
                reason=held.refused[each].reason if each in held.refused else None,
            )
            for each in held.versions
        ],
        former=list(state.previous_versions),
        history=[
            HistoryEvent(
                at=each.timestamp, action=each.action, version=each.version, by=each.author, reason=each.reason
            )
            for each in state.history
        ],
    )


def unready_reason(model: str, held: ControllerState) -> str:
    """Why a model does not answer, where it does not."""
    active = held.state.active
    if active is None:
        return f"no version of {model!r} is active: `useg registry activate`"
    if refusal := held.refused.get(active):
        return f"version {active!r} of {model!r} was refused: {refusal.reason}"
    return f"version {active!r} of {model!r} is being opened: try again in a moment"
