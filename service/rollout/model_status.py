"""Models and their versions in JSON."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from model.registry.deployment import Action
from service.telemetry.metrics import VersionRole


class _StatusSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class VersionStatus(_StatusSchema):
    """One version of a model."""

    version: str
    state: VersionRole
    """State in this process. `standby`: previously active and still loaded, for a rollback; `failed`: rejected by a
    check or rolled back; `unloaded`: not in use; `missing_from_registry`: still serving, but no longer in the registry;
    it will not survive a restart."""
    traffic_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of the traffic of a canary or a shadow."""
    reason: str | None = None
    """Why it failed."""
    backend: str | None = None
    """What runs its network, if it is loaded."""
    skipped_backends: dict[str, str] = Field(default_factory=dict)
    """Why faster backends are not in use, if the backend was chosen automatically."""


class ModelStatus(_StatusSchema):
    """One model; without a registry it has one version and no history."""

    name: str
    active: str | None
    """Version that is active in the registry."""
    serving_version: str | None
    """Version that handles requests in this process."""
    revision: int | None
    """Number of changes of the registry's state."""
    versions: list[VersionStatus]


class HistoryEvent(_StatusSchema):
    """One change of the registry's state."""

    timestamp: str
    """ISO 8601, in UTC."""
    action: Action
    version: str | None
    author: str
    """An administrator, a command, or the service itself."""
    reason: str


class ModelHistory(ModelStatus):
    """One model and the changes that led to its state."""

    previous_versions: list[str]
    """Previously active versions, the latest last; `rollback` returns to it."""
    history: list[HistoryEvent]
    """The latest changes, oldest first."""

    def without_history(self) -> ModelStatus:
        """Return the status alone."""
        return ModelStatus(**{name: getattr(self, name) for name in ModelStatus.model_fields})


class ModelList(_StatusSchema):
    """All served models."""

    models: list[ModelStatus]
