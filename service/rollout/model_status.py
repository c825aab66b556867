"""Models and their versions in JSON, documented for OpenAPI."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from model.registry.deployment import Action
from service.telemetry.metrics import VersionRole

_Share = Annotated[float, Field(gt=0.0, le=1.0)]
_Reason = Annotated[str, Field(max_length=500, description="For the history.")]


class _StatusSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class VersionStatus(_StatusSchema):
    """One version of a model."""

    version: str
    state: Annotated[
        VersionRole,
        Field(
            description="What it is up to in this process: standby was active before and is kept warm, refused failed "
            "a check or was taken back, idle is not open; orphaned answers, but the registry does not give it any "
            "more: a restart would not bring it back."
        ),
    ]
    share: Annotated[_Share | None, Field(description="Of a canary or a shadow.")] = None
    reason: Annotated[str | None, Field(description="Why it was refused, or taken back.")] = None


class ModelStatus(_StatusSchema):
    """One model; without a registry it has one version, and no history."""

    name: str
    active: Annotated[str | None, Field(description="The version that the registry wants to answer.")]
    serving: Annotated[str | None, Field(description="The one that does, in this process.")]
    revision: Annotated[int | None, Field(description="Counts the changes of the registry's state.")]
    versions: list[VersionStatus]


class HistoryEvent(_StatusSchema):
    """One change."""

    at: Annotated[str, Field(description="ISO 8601, in UTC.")]
    action: Action
    version: str | None
    by: Annotated[str, Field(description="An administrator, a command, or the service itself.")]
    reason: str


class ModelHistory(ModelStatus):
    """One model, and how it came about."""

    former: Annotated[list[str], Field(description="What was active before; `rollback` goes back to the last.")]
    history: Annotated[list[HistoryEvent], Field(description="The last changes, oldest first.")]

    def summarise(self) -> ModelStatus:
        """The model without the history."""
        return ModelStatus(**{name: getattr(self, name) for name in ModelStatus.model_fields})


class ModelList(_StatusSchema):
    """All models that are served."""

    models: list[ModelStatus]
