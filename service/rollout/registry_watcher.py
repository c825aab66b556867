"""All models of a registry, each led by what the registry says of it."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from model.backends.loader import load_session
from model.backends.session import Session
from model.contract import Contract
from model.errors import UsegError
from model.registry.category_names import names_path
from model.registry.signatures import read_trusted_keys, verify_signature
from model.registry.versions import Registry
from service.inference.loaded_model import LoadedModel, ModelLoader
from service.rollout.controller import ArtifactLoader, RolloutController
from service.rollout.model_repository import SingleModelSource
from service.rollout.model_status import ModelHistory
from service.rollout.router import TrafficRouter
from service.settings import Settings
from service.telemetry.metrics import Telemetry

logger = logging.getLogger(__name__)


class RegistryWatcher:
    """Looks at a registry again and again; `make_follower` gives a model's follower by its name."""

    def __init__(self, registry: Registry, make_follower: Callable[[str], RolloutController], poll_s: float) -> None:
        self.registry = registry
        self.followers: dict[str, RolloutController] = {}
        self._make_follower = make_follower
        self._poll_s = poll_s
        self._task: asyncio.Task[None] | None = None
        self._is_settled = asyncio.Event()
        self._trouble = ""

    def list_routers(self) -> Mapping[str, TrafficRouter]:
        return {name: follower.router for name, follower in self.followers.items()}

    async def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    def drain(self) -> None:
        for follower in self.followers.values():
            follower.drain()

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for follower in self.followers.values():
            await follower.stop()

    async def settle(self) -> None:
        """Return once pictures are taken; a registry in which nothing can be served may yet get something."""
        await self._is_settled.wait()

    def list_statuses(self) -> list[ModelHistory]:
        return [follower.describe() for follower in self.followers.values()]

    async def look(self) -> None:
        """One look at the registry, and at each of its models.

        A model that is gone is answered for as long as a version of it is open.
        """
        names = await self._list_models()
        for name in names:
            if name not in self.followers:
                self.followers[name] = self._make_follower(name)
        gone = [self.followers.pop(name) for name in self.followers.keys() - names if self.followers[name].is_empty]
        for follower in gone:
            await follower.stop()
        for follower in list(self.followers.values()):
            await _step(follower)
        followers = self.followers.values()
        if any(each.router.active for each in followers) and all(each.is_settled for each in followers):
            self._is_settled.set()

    async def _list_models(self) -> tuple[str, ...]:
        """The models that the registry has; those that are known while it cannot be read."""
        try:
            names = await asyncio.to_thread(self.registry.list_models)
        except UsegError as error:
            if str(error) != self._trouble:
                logger.error("all stays as it is: %s", error)
            self._trouble = str(error)
            return tuple(self.followers)
        self._trouble = ""
        return names

    async def _follow(self) -> None:
        """The loop: it ends when cancelled and for nothing else."""
        while True:
            await self.look()
            await asyncio.sleep(self._poll_s)


async def _step(follower: RolloutController) -> None:
    """One step; a model whose step fails stays as it is, and the others are not kept from theirs."""
    try:
        await follower.step()
    except Exception:  # whatever it was: without the loop, nothing would be rolled back any more
        logger.exception("%s stays as it is", follower.model)


def make_version_source(
    settings: Settings,
    telemetry: Telemetry,
    opener: ModelLoader | None = None,
    open_artifact: ArtifactLoader | None = None,
) -> SingleModelSource | RegistryWatcher:
    """What leads the fleet that the settings ask for. Raises ConfigError and RegistryError.

    `opener` gives the artifact that a service without a registry has, by default the one in the settings.
    """
    open_artifact = open_artifact or make_artifact_loader(settings)
    if settings.registry:
        registry = Registry(settings.registry)
        registry.list_models()
        make_follower = partial(_make_follower, registry, open_artifact, settings, telemetry)
        return RegistryWatcher(registry, make_follower, settings.registry_poll_interval_s)
    names = settings.category_names_file or names_path(settings.artifact)
    opener = opener or partial(open_artifact, settings.artifact)
    return SingleModelSource(LoadedModel(opener, settings, telemetry, names))


def make_artifact_loader(settings: Settings) -> ArtifactLoader:
    """Opens what is in a folder as the settings say; where keys are trusted, what one of them signed alone."""
    open_folder = partial(load_session, backend=settings.backend, threads=settings.intra_op_threads)
    if settings.trusted_keys_file is None:
        return open_folder
    trusted = read_trusted_keys(settings.trusted_keys_file)

    def open_signed(folder: Path) -> tuple[Contract, Session]:
        verify_signature(folder, trusted)
        return open_folder(folder)

    return open_signed


def _make_follower(
    registry: Registry, opener: ArtifactLoader, settings: Settings, telemetry: Telemetry, model: str
) -> RolloutController:
    return RolloutController(registry, model, opener, settings, telemetry)
