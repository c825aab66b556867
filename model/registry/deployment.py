"""Deployment of a model: which of its versions are served, and how that came about."""

from dataclasses import dataclass, replace
from typing import Literal

from model.errors import RegistryConflict

MAX_EVENTS = 200
"""Events in the history; older ones are removed."""
_MAX_PREVIOUS = 20

Role = Literal["canary", "shadow"]
Action = Literal["add", "activate", "shadow", "canary", "promote", "rollback", "reject", "remove"]


@dataclass(frozen=True, kw_only=True)
class DeploymentEvent:
    """An entry of the history."""

    timestamp: str
    """ISO 8601, in UTC."""
    action: Action
    version: str | None
    author: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrafficSplit:
    """A version that receives a fraction of the traffic."""

    version: str
    traffic_fraction: float
    """Above 0, at most 1."""

    def __post_init__(self) -> None:
        if not 0.0 < self.traffic_fraction <= 1.0:
            raise RegistryConflict(f"a traffic fraction is above 0 and at most 1, got {self.traffic_fraction:g}")


@dataclass(frozen=True, kw_only=True)
class DeploymentState:
    """The versions to serve. Changes return a new state, and raise RegistryConflict if they contradict this one."""

    active: str | None = None
    previous_versions: tuple[str, ...] = ()
    """Versions that were active before, the latest last, without those that were rolled back."""
    canary: TrafficSplit | None = None
    """Serves a fraction of the clients."""
    shadow: TrafficSplit | None = None
    """Runs on a copy of a fraction of the images; its results are only measured."""
    revision: int = 0
    """Number of changes."""
    history: tuple[DeploymentEvent, ...] = ()

    @property
    def versions_in_use(self) -> frozenset[str]:
        """Versions that must be loaded."""
        splits = (self.canary, self.shadow)
        return frozenset({*([self.active] if self.active else []), *(each.version for each in splits if each)})

    def activate(self, version: str) -> "DeploymentState":
        """Return the state that serves the version to everybody; the active one stays available for a rollback."""
        if version == self.active:
            return self
        previous = [each for each in (*self.previous_versions, self.active) if each and each != version]
        return replace(self.remove_split(version), active=version, previous_versions=tuple(previous[-_MAX_PREVIOUS:]))

    def deploy_as(self, role: Role, split: TrafficSplit) -> "DeploymentState":
        """Return the state with the version as canary or shadow, in place of another in that role."""
        if self.active is None:
            raise RegistryConflict(f"no version is active: activate one before a {role}")
        if split.version == self.active:
            raise RegistryConflict(f"version {split.version!r} is active already")
        state = self.remove_split(split.version)
        return replace(state, canary=split) if role == "canary" else replace(state, shadow=split)

    def remove_split(self, version: str) -> "DeploymentState":
        """Return the state without the version as canary or shadow."""
        return replace(
            self,
            canary=None if self.canary and self.canary.version == version else self.canary,
            shadow=None if self.shadow and self.shadow.version == version else self.shadow,
        )

    def promote(self) -> tuple[str, "DeploymentState"]:
        """Return the version of the canary, and the state in which it is active."""
        if not self.canary:
            raise RegistryConflict("there is no canary to promote")
        return self.canary.version, self.activate(self.canary.version)

    def roll_back(self) -> tuple[str, "DeploymentState"]:
        """Return the version that is rolled back, and the state without it.

        That is the canary, else the shadow, else the active version, in whose place the previous one becomes active.
        """
        if split := self.canary or self.shadow:
            return split.version, self.remove_split(split.version)
        if not self.active or not self.previous_versions:
            raise RegistryConflict("there is no previous version to roll back to")
        return self.active, self.quarantine(self.active)

    def quarantine(self, version: str) -> "DeploymentState":
        """Return the state without the version in any role; an active one stays if there is no previous one."""
        previous = tuple(each for each in self.previous_versions if each != version)
        state = replace(self.remove_split(version), previous_versions=previous)
        if version == self.active and previous:
            state = replace(state, active=previous[-1], previous_versions=previous[:-1])
        return state

    def record(self, event: DeploymentEvent) -> "DeploymentState":
        """Return the next revision, with the event in its history."""
        return replace(self, revision=self.revision + 1, history=(*self.history, event)[-MAX_EVENTS:])
