"""The models of a server: one artifact, or all models of a registry."""

import asyncio
import logging
from functools import partial
from typing import get_args

from model.contract import NETWORK_FILE
from model.errors import ModelNotFound, NotReady, ShuttingDown, UsegError
from model.registry.category_names import names_path
from model.registry.versions import Registry
from service.inference.loading import ArtifactLoader, load_pipeline, make_artifact_loader
from service.inference.pipeline import Pipeline
from service.metrics import ModelState, Telemetry, VersionRole, VersionStats
from service.rollout.controller import RolloutController
from service.rollout.router import Routers, TrafficRouter, find_ready
from service.schemas import ModelHistory, VersionStatus
from service.settings import Settings

logger = logging.getLogger(__name__)


class ModelRepository:
    """Loads the models that the settings name, and gives requests the routers to their versions."""

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
        self._error: UsegError | None = None
        """Why the artifact of a server without a registry could not be loaded."""
        unready_reason = "the artifact is loading: try again in a moment"
        if self.registry:
            self.registry.list_models()
            unready_reason = "the registry has no model yet: run `useg registry add`, then `useg registry activate`"
        self.routers = Routers(settings.default_model, unready_reason)

    async def start(self) -> None:
        """Start to load the models."""
        self._task = asyncio.create_task(self._poll_registry() if self.registry else self._load_single())

    async def wait_ready(self) -> None:
        """Return once a model accepts images; with a registry, wait until it has one.

        Raises the error with which the artifact of a server without a registry failed to load.
        """
        await self._is_ready.wait()
        if self._error:
            raise self._error

    def get_ready_pipeline(self) -> Pipeline:
        """Return the default model's pipeline. Raises NotReady, with the reason, if the server is not ready.

        Without a default, every model that has an active version must be ready.
        """
        if self.is_draining:
            raise ShuttingDown("the server is shutting down: use another one")
        routers = list(self.routers.by_name.values())
        if self._settings.default_model is None and len(routers) > 1:
            ready = [router.get_pipeline() for router in routers if router.active]
            return ready[0] if ready else routers[0].get_pipeline()
        try:
            return self.routers.get().get_pipeline()
        except ModelNotFound as error:
            raise NotReady(str(error)) from error

    def find_stats(self) -> VersionStats | None:
        """Return the statistics of the default model's active version, if it is known and loaded."""
        by_name = self.routers.by_name
        router = by_name.get(self._settings.default_model or next(iter(by_name), ""))
        return router.stats if router else None

    def drain(self) -> None:
        """Fail readiness from now on, and run batches without delay; requests are still accepted."""
        self.is_draining = True
        for pipeline in self._list_loaded():
            pipeline.scheduler.drain()

    async def stop(self) -> None:
        """Reject further images and unload the models."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for controller in self._controllers.values():
            await controller.stop()
        for pipeline in self._list_loaded():
            await pipeline.stop()
        self.routers.by_name = {}
        self.routers.unready_reason = "the server is shutting down: try again in a moment"

    async def reconcile(self) -> None:
        """Bring all models in line with the registry; one that is gone stays as long as a version of it is loaded."""
        if self.registry is None:
            return
        try:
            names = await asyncio.to_thread(self.registry.list_models)
        except UsegError:
            names = tuple(self._controllers)  # each logs that it cannot read the registry
        for name in names:
            if name not in self._controllers:
                self._controllers[name] = RolloutController(
                    self.registry, name, self._load_artifact, self._settings, self._telemetry
                )
        for name in self._controllers.keys() - names:
            if not self._controllers[name].loaded and not self._controllers[name].loading:
                await self._controllers.pop(name).stop()
        for controller in list(self._controllers.values()):
            try:
                await controller.reconcile()
            except Exception:  # of any kind: without the loop, no model would be rolled back any more
                logger.exception("%s could not be reconciled with the registry", controller.model)
        self.routers.by_name = {name: each.router for name, each in self._controllers.items()}
        controllers = self._controllers.values()
        if any(each.router.active for each in controllers) and all(each.is_settled for each in controllers):
            self._is_ready.set()

    def list_statuses(self) -> list[ModelHistory]:
        """Return the status of all models; reads files."""
        if self.registry:
            return [controller.describe() for controller in self._controllers.values()]
        return [
            ModelHistory(
                name=pipeline.contract.name,
                active=pipeline.contract.version,
                serving_version=pipeline.contract.version,
                revision=None,
                versions=[
                    VersionStatus(
                        version=pipeline.contract.version,
                        state="active" if find_ready(pipeline) else "loading",
                        backend=pipeline.backend,
                        skipped_backends=dict(pipeline.skipped_backends),
                    )
                ],
                previous_versions=[],
                history=[],
            )
            for pipeline in self._list_loaded()
        ]

    def update_metrics(self) -> None:
        """Set the metrics that describe the present state of the models."""
        metrics, loaded = self._telemetry, self._list_loaded()
        metrics.queue_depth.set(sum(pipeline.scheduler.depth for pipeline in loaded))
        metrics.queue_capacity.set(len(loaded) * self._settings.max_queue_size)
        metrics.requests_in_flight.set(sum(pipeline.scheduler.in_flight for pipeline in loaded))
        for pipeline in loaded:
            pipeline.stats.publish_drift()
        metrics.model_version_state.clear()
        for name, controller in self._controllers.items():
            for version, role in controller.list_roles().items():
                for each in get_args(VersionRole):
                    metrics.model_version_state.labels(name, version, each).set(each == role)
        active = [router.active for router in self.routers.by_name.values() if router.active]
        metrics.model_info.clear()
        metrics.skipped_backend_info.clear()
        for pipeline in active:
            contract = pipeline.contract
            labels, sha256 = (contract.name, contract.version), contract.files.get(NETWORK_FILE, "")
            metrics.model_info.labels(*labels, sha256, pipeline.backend, contract.precision).set(1)
            for backend, reason in pipeline.skipped_backends.items():
                metrics.skipped_backend_info.labels(*labels, backend, reason).set(1)
        state: ModelState = "ready" if all(map(find_ready, active)) else "restarting"
        if not active:
            state = "failed" if self._error else "loading"
        metrics.set_state("draining" if self.is_draining else state)

    def _list_loaded(self) -> list[Pipeline]:
        if self.registry:
            return [pipeline for controller in self._controllers.values() for pipeline in controller.loaded.values()]
        return [router.active for router in self.routers.by_name.values() if router.active]

    async def _load_single(self) -> None:
        settings, load = self._settings, partial(self._load_artifact, self._settings.artifact)
        names_file = settings.category_names_file or names_path(settings.artifact)
        try:
            pipeline = await load_pipeline(load, settings, self._telemetry, names_file)
        except UsegError as error:
            logger.error("the artifact could not be loaded: %s", error)
            self._error = error
            self.routers.unready_reason = f"the artifact could not be loaded: {error}"
        else:
            self.routers.by_name = {pipeline.contract.name: TrafficRouter(pipeline)}
        self._is_ready.set()

    async def _poll_registry(self) -> None:
        while True:
            await self.reconcile()
            await asyncio.sleep(self._settings.registry_poll_interval_s)
