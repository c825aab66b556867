"""Keeps one model in sync with the registry: loads, routes, watches, rolls back and unloads its versions."""

import asyncio
import ctypes
import gc
import logging
from typing import Literal, get_args

from model.backends.session import Session
from model.contract import Contract
from model.errors import ContractMismatch, RegistryError, UsegError
from model.registry.category_names import names_path
from model.registry.versions import DeploymentState, Registry, TrafficSplit
from service.inference.loading import ArtifactLoader, load_pipeline
from service.inference.pipeline import Pipeline
from service.metrics import RollbackCause, Telemetry, VersionMetrics, VersionRole
from service.rollout.canary_analysis import ShadowRunner, check_latency, find_regression
from service.rollout.router import TrafficRouter, find_ready
from service.schemas import ModelHistory, VersionStatus
from service.settings import Settings

logger = logging.getLogger(__name__)

AUTHOR = "useg serve"
"""Author of the service's own changes in the registry."""


class RolloutController:
    """One model of a registry in this process; `reconcile` is to be called regularly."""

    def __init__(
        self, registry: Registry, model: str, load_artifact: ArtifactLoader, settings: Settings, telemetry: Telemetry
    ) -> None:
        self.model = model
        self.router = TrafficRouter()
        self.state = DeploymentState()
        """The registry's state, without versions that failed here."""
        self.loaded: dict[str, Pipeline] = {}
        self.loading: dict[str, asyncio.Task[None]] = {}
        """At most one, because loading takes memory and processor time from serving."""
        self._registry = registry
        self._load_artifact = load_artifact
        self._settings = settings
        self._telemetry = telemetry
        self._listed: tuple[str, ...] = ()
        """Versions in the registry, the latest last."""
        self._failed: dict[str, tuple[str, int]] = {}
        """Reason why a version failed a check or was rolled back here, and the registry's revision then; a later one
        that uses the version makes it load again."""
        self._baseline: VersionMetrics | None = None
        """Of the router's fallback when it was replaced; its successor is compared with it."""
        self._fallback_until = 0.0
        """On the event loop's clock; then the fallback is unloaded."""
        self._missing: set[str] = set()
        self._last_error = ""
        self._lock = asyncio.Lock()
        for cause in get_args(RollbackCause):
            telemetry.rollbacks.labels(model, cause)

    @property
    def is_settled(self) -> bool:
        """Whether every version in use is loaded or failed."""
        in_use = self.state.versions_in_use
        return not self.loading and all(each in self.loaded or each in self._failed for each in in_use)

    async def reconcile(self) -> None:
        """Read the registry and do the next steps towards its state."""
        async with self._lock:
            await self._read_registry()
            self._load_next()
            self._apply_roles()
            await self._roll_back_regression()
            await self._unload_unused()
            self._report_missing()

    async def stop(self) -> None:
        """Unload all versions."""
        for task in self.loading.values():
            task.cancel()
        await asyncio.gather(*self.loading.values(), return_exceptions=True)
        if self.router.shadow:
            self.router.shadow.stop()
        while self.loaded:
            await self.loaded.popitem()[1].stop()

    def list_roles(self) -> dict[str, VersionRole]:
        """Return the role of each version in the registry or in use."""
        missing = self.state.versions_in_use.intersection(self.loaded).difference(self._listed)
        roles = {version: self._role(version) for version in self._listed}
        return roles | dict.fromkeys(sorted(missing), "missing_from_registry")

    def describe(self) -> ModelHistory:
        """Return the status of all versions; reads the registry, or returns its last state if that is unreadable."""
        try:
            state = self._read_state()
        except UsegError:
            state = self.state
        fractions = {each.version: each.traffic_fraction for each in (state.canary, state.shadow) if each}
        return ModelHistory(
            name=self.model,
            active=state.active,
            serving_version=self.router.active.contract.version if self.router.active else None,
            revision=state.revision,
            versions=[
                VersionStatus(
                    version=version,
                    state=role,
                    traffic_fraction=fractions.get(version),
                    reason=self._failed[version][0] if version in self._failed else None,
                    backend=self.loaded[version].backend if version in self.loaded else None,
                    skipped_backends=dict(self.loaded[version].skipped_backends) if version in self.loaded else {},
                )
                for version, role in self.list_roles().items()
            ],
            previous_versions=list(state.previous_versions),
            history=list(state.history),
        )

    def _read_state(self) -> DeploymentState:
        state = self._registry.read_state(self.model)
        if not state.revision and self.state.revision:
            raise RegistryError(f"the registry has lost the deployment state of {self.model!r}")
        return state

    async def _read_registry(self) -> None:
        try:
            # Off the event loop: a disk that hangs must not stop the serving.
            self.state = await asyncio.to_thread(self._read_state)
            self._listed = await asyncio.to_thread(self._registry.list_versions, self.model)
            self._last_error = ""
        except (UsegError, OSError) as error:
            self._listed = ()
            if str(error) != self._last_error:
                logger.error("cannot read the registry, keeping the versions of %s: %s", self.model, error)
            self._last_error = str(error)
        for version, (_, revision) in list(self._failed.items()):
            if version in self.state.versions_in_use and self.state.revision > revision:
                del self._failed[version]
            else:
                self.state = self.state.quarantine(version)  # for a registry that cannot be written

    def _load_next(self) -> None:
        """Start to load the next version in use, the active one first."""
        splits = [each.version for each in (self.state.canary, self.state.shadow) if each]
        in_use = [each for each in (self.state.active, *splits) if each]
        missing = [each for each in in_use if each not in self.loaded and each not in self._failed]
        if missing and not self.loading:
            self.loading[missing[0]] = asyncio.create_task(self._load(missing[0]))

    async def _load(self, version: str) -> None:
        """Load and check a version next to those that serve; it ends up loaded or failed."""
        logger.info("loading %s %s", self.model, version)

        def load() -> tuple[Contract, Session]:
            contract, session = self._load_artifact(self._registry.find_version(self.model, version))
            if (contract.name, contract.version) != (self.model, version):
                given = f"version {contract.version!r} of {contract.name!r}"
                raise ContractMismatch(f"the folder of version {version!r} of {self.model!r} holds {given}")
            return contract, session

        names_file, pipeline = names_path(self._registry.folder / self.model / version), None
        try:
            pipeline = await load_pipeline(load, self._settings, self._telemetry, names_file)
            await self._check_latency(pipeline)
            self.loaded[version] = pipeline
        except UsegError as error:
            await self._quarantine(version, "reject", "load_failed", str(error))
        except Exception as error:  # a session may raise anything
            logger.exception("%s %s could not be checked", self.model, version)
            await self._quarantine(version, "reject", "load_failed", f"{type(error).__name__}, see the log")
        finally:
            self.loading.pop(version, None)
            if pipeline and version not in self.loaded:
                await pipeline.stop()

    async def _check_latency(self, candidate: Pipeline) -> None:
        active = find_ready(self.router.active)
        history = self.state.history
        is_rollback = bool(history) and history[-1].action == "rollback"  # to a version that was good enough before
        if active and not is_rollback:
            await check_latency(candidate, active, self._settings.canary_max_latency_ratio)

    def _apply_roles(self) -> None:
        """Give loaded versions the roles of the registry's state; a role whose version is not loaded stays as it is."""
        router, state = self.router, self.state
        active = self.loaded.get(state.active) if state.active else None
        if active and active is not router.active:
            self._activate(active)
        canary = self.loaded.get(state.canary.version) if state.canary else None
        if canary and canary is not router.canary:
            canary.stats.reset_recent()
        router.canary, router.canary_fraction = canary, state.canary.traffic_fraction if state.canary else 0.0
        self._apply_shadow(state.shadow)
        router.unready_reason = self._unready_reason()

    def _activate(self, pipeline: Pipeline) -> None:
        """Route new requests to a version; those in flight finish on the version they started with."""
        router, before = self.router, self.router.active
        previous = before.contract.version if before else "none"
        router.fallback = self._baseline = None
        if before and previous in self.state.previous_versions:
            router.fallback, self._baseline = before, before.stats.recent()
            self._fallback_until = asyncio.get_running_loop().time() + self._settings.rollback_window_s
        pipeline.stats.reset_recent()
        router.active = pipeline
        logger.info("%s: switched from version %s to %s", self.model, previous, self.state.active)

    def _apply_shadow(self, split: TrafficSplit | None) -> None:
        router = self.router
        pipeline = find_ready(self.loaded.get(split.version)) if split else None
        active = find_ready(router.active)
        current = router.shadow
        if current and (current.pipeline is not pipeline or current.active is not active):
            current.stop()
            current = router.shadow = None
        if split and pipeline and active and not current:
            pipeline.stats.reset_recent()
            router.shadow = ShadowRunner(pipeline, active, split.traffic_fraction, self._telemetry)
        if split and router.shadow:
            router.shadow.traffic_fraction = split.traffic_fraction

    async def _roll_back_regression(self) -> None:
        """Roll back a version that is worse than the one it replaced or runs next to."""
        active, shadow = self.router.active, self.router.shadow
        if not active:
            return
        trials = [(active, self._baseline)] if self._baseline else []
        trials += [(each, active.stats.recent()) for each in (self.router.canary, shadow and shadow.pipeline) if each]
        for pipeline, baseline in trials:
            metrics, is_loading = pipeline.stats.recent(), bool(self.loading)
            if regression := find_regression(metrics, baseline, self._settings, is_loading=is_loading):
                await self._quarantine(pipeline.contract.version, "rollback", *regression)
                self._apply_roles()
                return

    async def _quarantine(
        self, version: str, action: Literal["rollback", "reject"], cause: RollbackCause, reason: str
    ) -> None:
        """Remove a version from the registry's state, so that no process serves it until it is activated again."""
        logger.error("%s %s is rolled back (%s): %s", self.model, version, cause, reason)
        self._telemetry.rollbacks.labels(self.model, cause).inc()
        quarantine = self._registry.quarantine
        try:
            self.state = await asyncio.to_thread(
                quarantine, self.model, version, action, author=AUTHOR, reason=f"{cause}: {reason}"
            )
        except UsegError as error:
            logger.error("rollback could not be written to the registry: %s", error)
            self.state = self.state.quarantine(version)
        self._failed[version] = (reason, self.state.revision)
        self.router.unready_reason = self._unready_reason()

    async def _unload_unused(self) -> None:
        """Unload versions without a role once their last requests are finished."""
        router = self.router
        if self._fallback_until <= asyncio.get_running_loop().time():
            router.fallback = self._baseline = None
        for version, pipeline in list(self.loaded.items()):
            is_used = version in self.state.versions_in_use or pipeline in (router.active, router.fallback)
            if not is_used and pipeline.is_idle:
                del self.loaded[version]
                await pipeline.stop()
                await asyncio.to_thread(_release_memory)
                logger.info("%s %s is unloaded", self.model, version)

    def _report_missing(self) -> None:
        missing = {version for version, role in self.list_roles().items() if role == "missing_from_registry"}
        if missing - self._missing:
            template = "%s %s is served, but no longer in the registry: it will not survive a restart"
            logger.error(template, self.model, ", ".join(sorted(missing)))
        self._missing = missing

    def _role(self, version: str) -> VersionRole:
        pipeline = self.loaded.get(version)
        if pipeline is None:
            return "loading" if version in self.loading else "failed" if version in self._failed else "unloaded"
        if pipeline is self.router.active:
            return "active"
        if pipeline is self.router.canary:
            return "canary"
        return "shadow" if self.router.shadow and self.router.shadow.pipeline is pipeline else "standby"

    def _unready_reason(self) -> str:
        active = self.state.active
        if active is None:
            return f"no version of {self.model!r} is active: run `useg registry activate`"
        if active in self._failed:
            return f"version {active!r} of {self.model!r} failed: {self._failed[active][0]}"
        return f"version {active!r} of {self.model!r} is loading: try again in a moment"


def _release_memory() -> None:
    """Return freed memory to the system: glibc keeps what threads that have ended had allocated."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library
        return
