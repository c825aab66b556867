"""The models of a service, by name."""

from collections.abc import Mapping
from typing import Protocol

from model.contract import NETWORK_FILE
from model.errors import InvalidParameter, ModelNotFound, NotReady, ShuttingDown
from model.registry.versions import Registry
from service.inference.loaded_model import LoadedModel
from service.inference.pipeline import Pipeline
from service.rollout.model_status import ModelHistory, VersionStatus
from service.rollout.router import TrafficRouter
from service.telemetry.metrics import ModelInfoLabels, ModelState, Telemetry
from service.telemetry.version_stats import VersionStats


class VersionSource(Protocol):
    """Opens versions of models, puts them into their roles, and closes them."""

    def list_routers(self) -> Mapping[str, TrafficRouter]:
        """The models by name; the name is empty while it is not known yet."""
        ...

    async def start(self) -> None:
        """Begin to open what is to be served."""
        ...

    def drain(self) -> None:
        """Wait for nobody any more; what comes is still answered."""
        ...

    async def stop(self) -> None:
        """Take no more pictures, and end what was started."""
        ...

    async def settle(self) -> None:
        """Return once pictures are taken. Raises the error for which that will never be."""
        ...

    @property
    def registry(self) -> Registry | None:
        """Where versions come from, if they do."""
        ...

    async def look(self) -> None:
        """Do at once what the registry says."""
        ...

    def list_statuses(self) -> list[ModelHistory]:
        """All models, and what their versions are up to; reads files."""
        ...


class SingleModelSource:
    """Serves the one artifact that the service was started with."""

    def __init__(self, deployment: LoadedModel) -> None:
        self.registry = None
        self._deployment = deployment
        self._rollout = TrafficRouter(active=deployment)

    def list_routers(self) -> Mapping[str, TrafficRouter]:
        pipeline = self._deployment.pipeline
        return {pipeline.contract.name if pipeline else "": self._rollout}

    async def start(self) -> None:
        await self._deployment.start()

    def drain(self) -> None:
        self._deployment.drain()

    async def stop(self) -> None:
        await self._deployment.stop()

    async def settle(self) -> None:
        await self._deployment.settle()

    async def look(self) -> None:
        """There is nothing to look at."""

    def list_statuses(self) -> list[ModelHistory]:
        pipeline = self._deployment.pipeline
        if not pipeline:
            return []
        version = pipeline.contract.version
        status = VersionStatus(version=version, state="active" if self._deployment.find() else "loading")
        return [
            ModelHistory(
                name=pipeline.contract.name,
                active=version,
                serving=version,
                revision=None,
                versions=[status],
                former=[],
                history=[],
            )
        ]


class ModelRepository:
    """What requests ask for a model; whoever leads it decides which versions answer."""

    def __init__(self, leader: VersionSource, telemetry: Telemetry, default: str | None = None) -> None:
        self.leader = leader
        self._telemetry = telemetry
        self._default = default
        self.is_draining = False
        """Whether the end is near: pictures are still taken, but the service says that it is not ready."""
        self.start, self.stop, self.settle = leader.start, leader.stop, leader.settle

    def drain(self) -> None:
        """Say from now on that the service is not ready, so that others are asked; what comes is still answered."""
        self.is_draining = True
        self.leader.drain()

    def list_routers(self) -> Mapping[str, TrafficRouter]:
        """All models by name; one that is still being opened, and whose name is not known, has an empty name."""
        return self.leader.list_routers()

    def find(self, name: str | None = None) -> TrafficRouter:
        """The model of that name, or the one that is meant where none is given.

        Raises ModelNotFound, NotReady while there is none yet, and InvalidParameter if there are several and no
        default.
        """
        rollouts = self.list_routers()
        if "" in rollouts:
            rollouts[""].require()
        wanted = name if name is not None else self._default
        if wanted is not None and wanted in rollouts:
            return rollouts[wanted]
        known = ", ".join(sorted(rollouts)) or "none yet"
        if wanted is not None:
            raise ModelNotFound(f"no model of name {wanted!r}: there is {known}")
        if not rollouts:
            raise NotReady("the registry holds no model yet: `useg registry add`, then `activate`")
        if len(rollouts) > 1:
            raise InvalidParameter(f"several models are served: say model=NAME, of {known}")
        return next(iter(rollouts.values()))

    def require_ready(self) -> Pipeline:
        """What answers where no model is named, if callers are welcome. Raises NotReady, with the reason, if not.

        Where several are served and there is no default, each that has an active version must be ready.
        """
        if self.is_draining:
            raise ShuttingDown("the service finishes what it has: ask another one")
        rollouts = self.list_routers()
        if self._default is None and len(rollouts) > 1:
            ready = [rollout.require() for rollout in rollouts.values() if rollout.active]
            return ready[0] if ready else next(iter(rollouts.values())).require()
        try:
            return self.find().require()
        except ModelNotFound as error:
            raise NotReady(str(error)) from error

    def find_tally(self) -> VersionStats | None:
        """What that did which answers where no model is named; None where it is not known."""
        rollouts = self.list_routers()
        rollout = rollouts.get(self._default) if self._default else next(iter(rollouts.values()), None)
        return rollout.tally if rollout else None

    def describe(self) -> None:
        """Tell the telemetry what answers now."""
        active = [rollout.active for rollout in self.list_routers().values() if rollout.active]
        self._telemetry.set_models(facts for each in active if (facts := _describe(each)))
        states: list[ModelState] = [each.state for each in active] or ["loading"]
        self._telemetry.set_state("draining" if self.is_draining else min(states, key=_WORST_FIRST.index))


_WORST_FIRST: tuple[ModelState, ...] = ("failed", "restarting", "loading", "ready")


def _describe(deployment: LoadedModel) -> ModelInfoLabels | None:
    if not deployment.pipeline:
        return None
    contract = deployment.pipeline.contract
    return ModelInfoLabels(
        name=contract.name,
        version=contract.version,
        sha256=contract.files.get(NETWORK_FILE, ""),
        backend=deployment.backend,
        precision=contract.precision,
    )
