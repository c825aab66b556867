"""The models of a server by name: one artifact, or all models of a registry."""

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from model.backends.loader import load_session
from model.backends.openvino import default_compile_cache
from model.backends.session import Session
from model.contract import NETWORK_FILE, Contract
from model.errors import InvalidParameter, ModelNotFound, NotReady, ShuttingDown, UsegError
from model.registry.category_names import names_path
from model.registry.signatures import read_trusted_keys, verify_signature
from model.registry.versions import Registry
from service.inference.loaded_model import LoadedModel, ModelLoader, describe_backend
from service.inference.pipeline import Pipeline
from service.rollout.controller import ArtifactLoader, RolloutController
from service.rollout.model_status import ModelHistory, VersionStatus
from service.rollout.router import TrafficRouter
from service.settings import Settings
from service.telemetry.metrics import ModelInfoLabels, ModelState, Telemetry
from service.telemetry.recorders import VersionStats

logger = logging.getLogger(__name__)

_WORST_FIRST: tuple[ModelState, ...] = ("failed", "restarting", "loading", "ready")


class ModelRepository:
    """Loads the models that the settings name and gives requests the router of theirs."""

    def __init__(
        self,
        settings: Settings,
        telemetry: Telemetry,
        *,
        load_model: ModelLoader | None = None,
        load_artifact: ArtifactLoader | None = None,
    ) -> None:
        """`load_model` loads the model of a server without a registry, `load_artifact` an artifact in a directory.

        Raises ConfigError for unusable public keys, RegistryError for a directory that is not a registry.
        """
        self.registry = Registry(settings.registry) if settings.registry else None
        self.is_draining = False
        """Whether readiness fails; requests are still accepted."""
        self._settings = settings
        self._telemetry = telemetry
        self._load_artifact = load_artifact or make_artifact_loader(settings)
        self._controllers: dict[str, RolloutController] = {}
        self._is_ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._last_error = ""
        if self.registry:
            self.registry.list_models()
        names_file = settings.category_names_file or names_path(settings.artifact)
        load_model = load_model or partial(self._load_artifact, settings.artifact)
        self._model = LoadedModel(load_model, settings, telemetry, names_file)
        self._router = TrafficRouter(active=self._model)

    async def start(self) -> None:
        """Start to load the models."""
        if self.registry:
            self._task = asyncio.create_task(self._poll_registry())
        else:
            await self._model.start()

    async def wait_ready(self) -> None:
        """Return once a model accepts images; with a registry, wait until it has one.

        Raises the error with which the artifact of a server without a registry failed to load.
        """
        await (self._is_ready.wait() if self.registry else self._model.wait_ready())

    def drain(self) -> None:
        """Fail readiness from now on, and run batches without delay; requests are still accepted."""
        self.is_draining = True
        self._model.drain()
        for controller in self._controllers.values():
            controller.drain()

    async def stop(self) -> None:
        """Reject further images and unload the models."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._model.stop()
        for controller in self._controllers.values():
            await controller.stop()

    async def reconcile(self) -> None:
        """Bring all models in line with the registry; one that is gone stays as long as a version of it is loaded."""
        names = await self._list_models()
        for name in names:
            if self.registry and name not in self._controllers:
                self._controllers[name] = RolloutController(
                    self.registry, name, self._load_artifact, self._settings, self._telemetry
                )
        for name in self._controllers.keys() - names:
            if self._controllers[name].is_empty:
                await self._controllers.pop(name).stop()
        for controller in list(self._controllers.values()):
            try:
                await controller.reconcile()
            except Exception:  # of any kind: without the loop, no model would be rolled back any more
                logger.exception("%s could not be reconciled with the registry", controller.model)
        controllers = self._controllers.values()
        if any(each.router.active for each in controllers) and all(each.is_settled for each in controllers):
            self._is_ready.set()

    def list_routers(self) -> Mapping[str, TrafficRouter]:
        """Return the models by name; an artifact that is still loading has an empty name."""
        if self.registry:
            return {name: each.router for name, each in self._controllers.items()}
        pipeline = self._model.pipeline
        return {pipeline.contract.name if pipeline else "": self._router}

    def list_statuses(self) -> list[ModelHistory]:
        """Return the status of all models; reads files."""
        if self.registry:
            return [controller.describe() for controller in self._controllers.values()]
        if not self._model.pipeline:
            return []
        contract = self._model.pipeline.contract
        status = VersionStatus(
            version=contract.version,
            state="active" if self._model.find_pipeline() else "loading",
            **describe_backend(self._model),
        )
        return [
            ModelHistory(
                name=contract.name,
                active=contract.version,
                serving_version=contract.version,
                revision=None,
                versions=[status],
                previous_versions=[],
                history=[],
            )
        ]

    def get(self, name: str | None = None) -> TrafficRouter:
        """Return the model of a name, by default the only or the default one.

        Raises ModelNotFound, NotReady if none is loaded yet, InvalidParameter if there are several and no default.
        """
        routers = self.list_routers()
        if "" in routers:
            routers[""].get_pipeline()
        requested = name if name is not None else self._settings.default_model
        if requested is not None and requested in routers:
            return routers[requested]
        known = ", ".join(sorted(routers)) or "none yet"
        if requested is not None:
            raise ModelNotFound(f"model {requested!r} not found; known models: {known}")
        if not routers:
            raise NotReady("the registry has no model yet: run `useg registry add`, then `useg registry activate`")
        if len(routers) > 1:
            raise InvalidParameter(f"several models are served: set model=NAME, one of {known}")
        return next(iter(routers.values()))

    def get_ready_pipeline(self) -> Pipeline:
        """Return the default model's pipeline if the server is ready. Raises NotReady, with the reason, otherwise.

        Without a default, every model that has an active version must be ready.
        """
        if self.is_draining:
            raise ShuttingDown("the server is shutting down: use another one")
        routers = self.list_routers()
        if self._settings.default_model is None and len(routers) > 1:
            ready = [router.get_pipeline() for router in routers.values() if router.active]
            return ready[0] if ready else next(iter(routers.values())).get_pipeline()
        try:
            return self.get().get_pipeline()
        except ModelNotFound as error:
            raise NotReady(str(error)) from error

    def find_stats(self) -> VersionStats | None:
        """Return the statistics of the default model's active version, if it is known and loaded."""
        routers, default = self.list_routers(), self._settings.default_model
        router = routers.get(default) if default else next(iter(routers.values()), None)
        return router.stats if router else None

    def update_metrics(self) -> None:
        """Set the metrics that describe the served models."""
        active = [router.active for router in self.list_routers().values() if router.active]
        self._telemetry.set_models(labels for each in active if (labels := _info_labels(each)))
        states: list[ModelState] = [each.state for each in active] or ["loading"]
        self._telemetry.set_state("draining" if self.is_draining else min(states, key=_WORST_FIRST.index))

    async def _poll_registry(self) -> None:
        while True:
            await self.reconcile()
            await asyncio.sleep(self._settings.registry_poll_interval_s)

    async def _list_models(self) -> tuple[str, ...]:
        """Return the registry's models, or those that are known if it cannot be read."""
        try:
            names = await asyncio.to_thread(self.registry.list_models) if self.registry else ()
        except UsegError as error:
            if str(error) != self._last_error:
                logger.error("cannot read the registry, keeping current models: %s", error)
            self._last_error = str(error)
            return tuple(self._controllers)
        self._last_error = ""
        return names


def make_artifact_loader(settings: Settings) -> ArtifactLoader:
    """Return a loader for the backend in the settings; if they name trusted keys, it requires a signature.

    Raises ConfigError for unusable public keys.
    """
    load = partial(
        load_session,
        backend=settings.backend,
        threads=settings.intra_op_threads,
        streams=settings.streams,
        compile_cache=settings.compile_cache or default_compile_cache(),
    )
    if settings.trusted_keys_file is None:
        return load
    trusted = read_trusted_keys(settings.trusted_keys_file)

    def load_signed(directory: Path) -> tuple[Contract, Session]:
        verify_signature(directory, trusted)
        return load(directory)

    return load_signed


def _info_labels(model: LoadedModel) -> ModelInfoLabels | None:
    if not model.pipeline:
        return None
    contract = model.pipeline.contract
    return ModelInfoLabels(
        name=contract.name,
        version=contract.version,
        sha256=contract.files.get(NETWORK_FILE, ""),
        backend=model.backend,
        precision=contract.precision,
        skipped_backends=model.skipped_backends,
    )
