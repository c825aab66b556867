"""The models of a server: one artifact, or all models of a registry."""

import asyncio
import logging
from functools import partial
from pathlib import Path

from model.backends.loader import load_session
from model.backends.openvino import default_compile_cache
from model.backends.session import Session
from model.contract import NETWORK_FILE, Contract
from model.errors import ShuttingDown, UsegError
from model.registry.category_names import names_path
from model.registry.signatures import read_trusted_keys, verify_signature
from model.registry.versions import Registry
from service.inference.loaded_model import ArtifactLoader, LoadedModel
from service.inference.pipeline import Pipeline
from service.metrics import ModelState, Telemetry
from service.rollout.controller import RolloutController
from service.rollout.router import Routers, TrafficRouter, find_ready
from service.schemas import ModelHistory, VersionStatus
from service.settings import Settings

logger = logging.getLogger(__name__)

_WORST_FIRST: tuple[ModelState, ...] = ("failed", "restarting", "loading", "ready")


class ModelRepository:
    """Loads the models that the settings name; `routers` gives requests the versions that handle them."""

    def __init__(
        self,
        settings: Settings,
        telemetry: Telemetry,
        load_artifact: ArtifactLoader | None = None,
    ) -> None:
        """Raises ConfigError for unusable public keys, RegistryError for a directory that is not a registry."""
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
        self._model = LoadedModel(partial(self._load_artifact, settings.artifact), settings, telemetry, names_file)
        single = None if self.registry else TrafficRouter(active=self._model)
        self.routers = Routers(settings.default_model, single)

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

    def get_ready_pipeline(self) -> Pipeline:
        """Return the default model's pipeline if the server is ready. Raises NotReady, with the reason, otherwise."""
        if self.is_draining:
            raise ShuttingDown("the server is shutting down: use another one")
        return self.routers.get_ready_pipeline()

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
        self.routers.of_registry = {name: each.router for name, each in self._controllers.items()}
        controllers = self._controllers.values()
        if any(each.router.active for each in controllers) and all(each.is_settled for each in controllers):
            self._is_ready.set()

    def list_statuses(self) -> list[ModelHistory]:
        """Return the status of all models; reads files."""
        if self.registry:
            return [controller.describe() for controller in self._controllers.values()]
        if not self._model.pipeline:
            return []
        contract = self._model.pipeline.contract
        status = VersionStatus(
            version=contract.version,
            state="active" if find_ready(self._model) else "loading",
            backend=self._model.backend,
            skipped_backends=self._model.skipped_backends,
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

    def update_metrics(self) -> None:
        """Set the metrics that describe the served models."""
        metrics = self._telemetry
        active = [router.active for router in self.routers.by_name().values() if router.active]
        metrics.model_info.clear()
        metrics.skipped_backend_info.clear()
        for model in active:
            if not model.pipeline:
                continue
            contract = model.pipeline.contract
            version, sha256 = (contract.name, contract.version), contract.files.get(NETWORK_FILE, "")
            metrics.model_info.labels(*version, sha256, model.backend, contract.precision).set(1)
            for backend, reason in model.skipped_backends.items():
                metrics.skipped_backend_info.labels(*version, backend, reason).set(1)
        states: list[ModelState] = [each.state for each in active] or ["loading"]
        metrics.set_state("draining" if self.is_draining else min(states, key=_WORST_FIRST.index))

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
