"""What a registry says of one model: which version answers, which are tried, and how that came about."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from model.contract import reject_unknown
from model.errors import ConfigError, RegistryConflict

FORMAT_VERSION = 1
MAX_EVENTS = 200
"""In the history; older ones are forgotten."""
_MAX_PREVIOUS = 20

Action = Literal["add", "activate", "shadow", "canary", "promote", "rollback", "refuse", "remove"]
ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass(frozen=True, kw_only=True)
class DeploymentEvent:
    """One line of the history."""

    at: str
    """ISO 8601, in UTC."""
    action: Action
    version: str | None
    by: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrafficSplit:
    """A version that answers a share of what comes."""

    version: str
    share: float
    """Above 0, at most 1."""

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise RegistryConflict(f"a share must lie above 0 and be at most 1, got {self.share:g}")


@dataclass(frozen=True, kw_only=True)
class DeploymentState:
    """What is to be served. Changes make a new one, and raise RegistryConflict where they do not fit."""

    active: str | None = None
    former: tuple[str, ...] = ()
    """What was active before, the last last; a version that was rolled back from is not among them."""
    canary: TrafficSplit | None = None
    """Answers a share of the callers."""
    shadow: TrafficSplit | None = None
    """Answers a share of the pictures, too, and nobody hears of it."""
    revision: int = 0
    """Counts the changes."""
    history: tuple[DeploymentEvent, ...] = ()

    @property
    def versions_in_use(self) -> frozenset[str]:
        """The versions that are to be open."""
        trials = (self.canary, self.shadow)
        return frozenset({*([self.active] if self.active else []), *(each.version for each in trials if each)})

    def activate(self, version: str) -> "DeploymentState":
        """The version answers; if it was tried, that is over. One that is active already is asked for once more."""
        if version == self.active:
            return self
        former = [each for each in (*self.former, self.active) if each and each != version]
        return replace(self.remove_split(version), active=version, former=tuple(former[-_MAX_PREVIOUS:]))

    def deploy_as(self, role: Literal["canary", "shadow"], trial: TrafficSplit) -> "DeploymentState":
        """The version is tried beside the active one, in the place of another in that role."""
        if self.active is None:
            raise RegistryConflict("no version is active: there is nothing to try another one against")
        if trial.version == self.active:
            raise RegistryConflict(f"version {trial.version!r} is active already")
        rest = self.remove_split(trial.version)
        return replace(rest, canary=trial) if role == "canary" else replace(rest, shadow=trial)

    def remove_split(self, version: str) -> "DeploymentState":
        """The version is not tried any more, if it was."""
        return replace(
            self,
            canary=None if self.canary and self.canary.version == version else self.canary,
            shadow=None if self.shadow and self.shadow.version == version else self.shadow,
        )

    def promote(self) -> "DeploymentState":
        """The canary becomes active."""
        if not self.canary:
            raise RegistryConflict("there is no canary to promote")
        return self.activate(self.canary.version)

    def roll_back(self) -> tuple[str, "DeploymentState"]:
        """The version that is taken back, and what is without it.

        That is the canary if there is one, else the shadow, else the active version: then the one before is active.
        """
        if trial := self.canary or self.shadow:
            return trial.version, self.remove_split(trial.version)
        if not self.active or not self.former:
            raise RegistryConflict("there is no earlier version to go back to")
        return self.active, self.quarantine(self.active)

    def quarantine(self, version: str) -> "DeploymentState":
        """Nothing of the version, whatever its role; an active one stays if none was before it."""
        state = replace(self.remove_split(version), former=tuple(each for each in self.former if each != version))
        if version == self.active and state.former:
            state = replace(state, active=state.former[-1], former=state.former[:-1])
        return state

    def record(self, event: DeploymentEvent) -> "DeploymentState":
        """With one line more of history, and as the next revision."""
        return replace(self, revision=self.revision + 1, history=(*self.history, event)[-MAX_EVENTS:])


def serialize_state(state: DeploymentState) -> str:
    """The state as JSON."""
    return json.dumps({"format_version": FORMAT_VERSION, **asdict(state)}, indent=2, ensure_ascii=False) + "\n"


def parse_state(text: str | bytes) -> DeploymentState:
    """The state in JSON. Raises ValueError, KeyError, TypeError or UsegError for anything else."""
    content: Any = json.loads(text)
    if not isinstance(content, dict):
        raise TypeError("expected a JSON object")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ConfigError(f"format version {version}, this release reads {FORMAT_VERSION}")
    reject_unknown(content, DeploymentState)
    history = tuple(_parse_event(each) for each in content.pop("history"))
    trials = {role: _parse_split(content.pop(role)) for role in ("canary", "shadow")}
    active, former, revision = content["active"], content["former"], content["revision"]
    names = [*former, *([] if active is None else [active])]
    if not isinstance(former, list) or not all(isinstance(each, str) for each in names) or type(revision) is not int:
        raise TypeError("active, former or revision is of another type")
    return DeploymentState(active=active, former=tuple(former), revision=revision, history=history, **trials)


def _parse_split(content: Any) -> TrafficSplit | None:
    if content is None:
        return None
    reject_unknown(content, TrafficSplit)
    return TrafficSplit(version=str(content["version"]), share=float(content["share"]))


def _parse_event(content: Any) -> DeploymentEvent:
    reject_unknown(content, DeploymentEvent)
    if content["action"] not in ACTIONS:
        raise ConfigError(f"no action is called {content['action']!r}")
    return DeploymentEvent(**content)
