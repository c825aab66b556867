"""One model of a registry: its versions opened, put into their roles, watched, taken back and closed."""

import asyncio
import ctypes
import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Literal

from model.backends.session import Session
from model.contract import Contract
from model.errors import UsegError
from model.registry.deployment import TrafficSplit
from model.registry.versions import Registry
from service.inference.loaded_model import LoadedModel
from service.inference.pipeline import Pipeline
from service.rollout.canary_analysis import (
    AnalysisThresholds,
    RollbackCause,
    VersionMetrics,
    analyze,
    collect_metrics,
    require_name,
    require_speed,
)
from service.rollout.controller_state import (
    ControllerState,
    PreviousVersion,
    RejectedVersion,
    model_status,
    read_registry_state,
    unready_reason,
    version_role,
)
from service.rollout.model_status import ModelHistory
from service.rollout.router import TrafficRouter
from service.rollout.shadow import ShadowRunner
from service.settings import Settings
from service.telemetry.metrics import Telemetry

logger = logging.getLogger(__name__)

ArtifactLoader = Callable[[Path], tuple[Contract, Session]]
"""Gives the checked artifact of a folder, or raises UsegError; called off the event loop."""

AUTHOR = "useg serve"


class RolloutController:
    """Does, in one process, what a registry says of one model. `step` is one look; whoever leads calls it often."""

    def __init__(
        self, registry: Registry, model: str, opener: ArtifactLoader, settings: Settings, telemetry: Telemetry
    ) -> None:
        self.model = model
        self.router = TrafficRouter()
        self.held = ControllerState()
        self._registry = registry
        self._opener = opener
        self._settings = settings
        self._telemetry = telemetry
        self._limits = AnalysisThresholds(
            errors=settings.canary_max_error_rate,
            slowest=settings.canary_max_latency_ratio,
            drift=settings.canary_max_psi,
        )
        self._turn = asyncio.Lock()
        self._trouble = ""
        self._orphans: frozenset[str] = frozenset()

    @property
    def is_settled(self) -> bool:
        """Whether all that is to be served was opened, or refused."""
        held = self.held
        return not held.opening and all(
            each in held.open or each in held.refused for each in held.state.versions_in_use
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is open, nor about to be."""
        return not self.held.open and not self.held.opening

    async def step(self) -> None:
        """Look at the registry, and do what is to be done by now."""
        async with self._turn:
            await self._read()
            self._open_next()
            self._place()
            await self._judge()
            await self._close_unused()
            self._tell()

    def drain(self) -> None:
        """Wait for nobody any more."""
        for deployment in self.held.open.values():
            deployment.drain()

    def describe(self) -> ModelHistory:
        """What the versions are up to; reads files."""
        return model_status(self._registry, self.model, self.held, self.router)

    async def stop(self) -> None:
        """Close all versions."""
        self._telemetry.set_version_roles(self.model, {})
        for task in self.held.opening.values():
            task.cancel()
        await asyncio.gather(*self.held.opening.values(), return_exceptions=True)
        if self.router.shadow:
            self.router.shadow.stop()
        for deployment in self.held.open.values():
            await deployment.stop()

    async def _read(self) -> None:
        held = self.held
        try:
            # Off the event loop, for a disk that does not answer must not keep the network from it.
            held.state = await asyncio.to_thread(read_registry_state, self._registry, self.model, held.state)
            held.listed = await asyncio.to_thread(self._registry.list_versions, self.model)
            self._trouble = ""
        except (UsegError, OSError) as error:
            held.listed = ()
            if str(error) != self._trouble:
                logger.error("%s stays as it was: %s", self.model, error)
            self._trouble = str(error)
        state = held.state
        for version, refusal in list(held.refused.items()):
            if version in state.versions_in_use and state.revision > refusal.revision:
                del held.refused[version]
            else:
                held.state = held.state.quarantine(version)  # where the registry could not be written

    def _open_next(self) -> None:
        """Begin to open the next version that is wanted; the active one goes first."""
        held = self.held
        trials = [each.version for each in (held.state.canary, held.state.shadow) if each]
        wanted = [each for each in (held.state.active, *trials) if each]
        missing = [each for each in wanted if each not in held.open and each not in held.refused]
        if missing and not held.opening:
            held.opening[missing[0]] = asyncio.create_task(self._open(missing[0]))

    async def _open(self, version: str) -> None:
        """Open a version beside those that answer, check it, and have it open or refused."""
        logger.info("%s %s is being opened", self.model, version)
        deployment = LoadedModel(
            lambda: self._check(version),
            self._settings,
            self._telemetry,
            self._registry.names_path(self.model, version),
        )
        try:
            await deployment.start()
            await deployment.settle()
            await self._require_speed(deployment.require())
            self.held.open[version] = deployment
        except UsegError as error:
            await self._take_back(version, "reject", "load_failed", str(error))
        except Exception as error:  # a session may raise anything
            logger.exception("%s %s could not be tried", self.model, version)
            await self._take_back(version, "reject", "load_failed", f"{type(error).__name__}, see the log")
        finally:
            self.held.opening.pop(version, None)
            if version not in self.held.open:
                await deployment.stop()

    def _check(self, version: str) -> tuple[Contract, Session]:
        contract, session = self._opener(self._registry.find_version(self.model, version))
        require_name(contract, self.model, version)
        return contract, session

    async def _require_speed(self, candidate: Pipeline) -> None:
        active = self.router.active.find() if self.router.active else None
        history = self.held.state.history
        is_return = bool(history) and history[-1].action == "rollback"  # what is gone back to was good enough before
        if active and not is_return:
            await require_speed(candidate, active, self._settings.canary_max_latency_ratio)

    def _place(self) -> None:
        """Put what is open into the roles that the state gives; what is not open leaves its role as it is."""
        state, rollout, held = self.held.state, self.router, self.held
        active = held.open.get(state.active) if state.active else None
        if active and active is not rollout.active:
            self._switch(active)
        canary = self._find_trial(state.canary)
        if canary is not rollout.canary and canary and canary.pipeline:
            canary.pipeline.begin()
        rollout.canary, rollout.canary_share = canary, state.canary.traffic_fraction if state.canary else 0.0
        self._place_shadow(state.shadow)
        rollout.obstacle = unready_reason(self.model, held)

    def _switch(self, deployment: LoadedModel) -> None:
        """Have a version answer from the next request on; requests that are under way end where they began."""
        held, before = self.held, self.router.active
        version = held.state.active or ""
        former = next((name for name, each in held.open.items() if each is before), None)
        held.standby = self.router.spare = None
        if before and before.pipeline and former in held.state.previous_versions:
            until = asyncio.get_running_loop().time() + self._settings.rollback_window_s
            held.standby = PreviousVersion(version=former, until=until, record=collect_metrics(before.pipeline))
            self.router.spare = before
        if deployment.pipeline:
            deployment.pipeline.begin()
        self.router.active = deployment
        logger.info("%s: version %s answers from now on, before it %s", self.model, version, former or "none")

    def _place_shadow(self, trial: TrafficSplit | None) -> None:
        rollout = self.router
        deployment = self._find_trial(trial)
        pipeline = deployment.find() if deployment else None
        active = rollout.active.find() if rollout.active else None
        current = rollout.shadow
        if current and (current.pipeline is not pipeline or current.active is not active):
            current.stop()
            current = rollout.shadow = None
        if trial and pipeline and active and not current:
            pipeline.begin()
            rollout.shadow = ShadowRunner(pipeline, active, trial.traffic_fraction, self._telemetry)
        if trial and rollout.shadow:
            rollout.shadow.share = trial.traffic_fraction

    def _find_trial(self, trial: TrafficSplit | None) -> LoadedModel | None:
        return self.held.open.get(trial.version) if trial else None

    async def _judge(self) -> None:
        """Take back what does worse than the version before it, or beside it."""
        active = self.router.active.pipeline if self.router.active else None
        if not active:
            return
        trials: list[tuple[Pipeline, VersionMetrics]] = []
        if self.held.standby:
            trials.append((active, self.held.standby.record))
        if self.router.canary and self.router.canary.pipeline:
            trials.append((self.router.canary.pipeline, collect_metrics(active)))
        if self.router.shadow:
            trials.append((self.router.shadow.pipeline, collect_metrics(active)))
        # What opens takes turns of the processor from those that answer, and from the one on trial more than before.
        limits = replace(self._limits, slowest=inf) if self.held.opening else self._limits
        for pipeline, record in trials:
            if verdict := analyze(collect_metrics(pipeline), record, limits):
                await self._take_back(pipeline.contract.version, "rollback", verdict.cause, verdict.reason)
                self._place()
                return

    async def _take_back(
        self,
        version: str,
        action: Literal["rollback", "reject"],
        cause: Literal[RollbackCause, "load_failed"],
        reason: str,
    ) -> None:
        """Take a version out of the registry's state, so that no process serves it until somebody asks again."""
        logger.error("%s %s is taken back (%s): %s", self.model, version, cause, reason)
        self._telemetry.rollbacks.labels(self.model, cause).inc()
        held = self.held
        try:
            held.state = await asyncio.to_thread(
                self._registry.quarantine, self.model, version, action, author=AUTHOR, reason=f"{cause}: {reason}"
            )
        except UsegError as error:
            logger.error("the registry does not know of it: %s", error)
            held.state = held.state.quarantine(version)
        held.refused[version] = RejectedVersion(reason=reason, revision=held.state.revision)
        self.router.obstacle = unready_reason(self.model, held)

    async def _close_unused(self) -> None:
        """Close versions that have no role any more, once their last requests are answered."""
        held, rollout = self.held, self.router
        if held.standby and held.standby.until <= asyncio.get_running_loop().time():
            held.standby = rollout.spare = None
        kept = {*held.state.versions_in_use, *([held.standby.version] if held.standby else [])}
        for version, deployment in list(held.open.items()):
            is_idle = deployment.pipeline is None or deployment.pipeline.is_idle
            if version not in kept and deployment is not rollout.active and is_idle:
                del held.open[version]
                await deployment.stop()
                await asyncio.to_thread(release_memory)
                logger.info("%s %s is closed", self.model, version)

    def _tell(self) -> None:
        held, orphans = self.held, self.held.orphans
        for version in sorted(orphans - self._orphans):
            template = "%s %s answers, but the registry does not give it any more: a restart would not bring it back"
            logger.error(template, self.model, version)
        for version in sorted(self._orphans - orphans):
            logger.info("%s %s is no orphan any more", self.model, version)
        self._orphans = orphans
        roles = {each: version_role(held, self.router, each) for each in held.versions}
        self._telemetry.set_version_roles(self.model, roles)


def release_memory() -> None:
    """Hand freed memory to the system: glibc keeps what threads that have ended had allocated."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library
        return
