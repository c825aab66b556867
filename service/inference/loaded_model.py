"""An artifact on its way to the callers: opening, then ready or refused, in the end stopped."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from model.backends.session import HotSwapSession, Session
from model.contract import Contract
from model.errors import ArtifactError, NotReady, ShuttingDown, UsegError
from service.inference.batch_scheduler import is_finite
from service.inference.pipeline import Pipeline
from service.settings import Settings
from service.telemetry.metrics import ModelState, Telemetry

logger = logging.getLogger(__name__)

ModelLoader = Callable[[], tuple[Contract, Session]]
"""Gives a checked artifact, or raises UsegError; called off the event loop, again if its session dies."""


class LoadedModel:
    """Opens an artifact in the background, so that the process answers while it warms up."""

    def __init__(
        self, opener: ModelLoader, settings: Settings, telemetry: Telemetry, glossary: Path | None = None
    ) -> None:
        """`glossary` is the file of the names that people give to its clusters."""
        self._opener = opener
        self._glossary = glossary
        self._settings = settings
        self._telemetry = telemetry
        self._pipeline: Pipeline | None = None
        self._session: Session | None = None
        self._contract: Contract | None = None
        self._refusal: UsegError | None = None
        self._obstacle = "the artifact is being opened: try again in a moment"
        self._opening: asyncio.Task[None] | None = None
        self._is_settled = asyncio.Event()
        self.is_draining = False
        """Whether the end is near: pictures are still taken, but the service says that it is not ready."""

    async def start(self) -> None:
        """Begin to open the artifact."""
        self._opening = asyncio.create_task(self._open())

    def drain(self) -> None:
        """Say from now on that the service is not ready, so that others are asked; what comes is still answered."""
        self.is_draining = True
        if self._pipeline:
            self._pipeline.engine.drain()

    async def stop(self) -> None:
        """Take no more pictures, and end what was started."""
        if self._opening:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        pipeline, self._pipeline = self._pipeline, None
        self._obstacle = "the service is shutting down: try again in a moment"
        if pipeline:
            await pipeline.stop()
        if isinstance(self._session, HotSwapSession):
            self._session.close()

    async def settle(self) -> None:
        """Return once pictures are taken. Raises the error for which the artifact was refused."""
        await self._is_settled.wait()
        if self._refusal:
            raise self._refusal

    def require(self) -> Pipeline:
        """The artifact at work. Raises NotReady, with the reason, while there is none."""
        if not self._pipeline:
            raise ShuttingDown(self._obstacle) if self.is_draining else NotReady(self._obstacle)
        if not self._pipeline.engine.is_alive:
            raise NotReady("the network died and is being started again: try again in a moment")
        return self._pipeline

    @property
    def pipeline(self) -> Pipeline | None:
        """The artifact at work, or about to be again; None before it was opened and after the end."""
        return self._pipeline

    @property
    def backend(self) -> str:
        """What answers now: a session may have handed over to a faster one."""
        return self._session.backend if self._session else ""

    @property
    def state(self) -> ModelState:
        if self._refusal:
            return "failed"
        if not self._pipeline:
            return "loading"
        return "ready" if self._pipeline.engine.is_alive else "restarting"

    def find(self) -> Pipeline | None:
        """The artifact at work, if it is."""
        return self._pipeline if self.state == "ready" else None

    async def _open(self) -> None:
        started = time.perf_counter()
        try:
            contract, session = await asyncio.to_thread(self._open_warm)
        except UsegError as error:
            self._refuse(error)
        except Exception as error:  # a backend may raise anything; the process stays up to say that it is not ready
            logger.exception("the artifact could not be run")
            self._refuse(ArtifactError(f"the artifact could not be run: {type(error).__name__}, see the log"))
        else:
            pipeline = Pipeline(
                contract, session, self._settings, self._telemetry, reopen=self._reopen, glossary=self._glossary
            )
            await pipeline.start()
            self._telemetry.model_load_duration.set(time.perf_counter() - started)
            self._pipeline, self._session, self._contract = pipeline, session, contract
        self._is_settled.set()

    def _refuse(self, error: UsegError) -> None:
        logger.error("the artifact was refused: %s", error)
        self._refusal = error
        self._obstacle = f"the artifact was refused: {error}"

    def _reopen(self) -> Session:
        """A new session, after the old one died; the contract stays what it was, or the artifact is refused."""
        contract, session = self._open_warm()
        if self._contract and contract != self._contract:
            raise ArtifactError("the artifact was changed while it was served: restart the service to take the new one")
        if isinstance(self._session, HotSwapSession):
            self._session.close()
        self._session = session
        return session

    def _open_warm(self) -> tuple[Contract, Session]:
        """The artifact after first runs on each canvas, slower than all that follow and as hungry for memory as any."""
        contract, session = self._opener()
        for canvas in contract.input_sizes:
            size = (canvas.height_px, canvas.width_px)
            affordable = self._settings.max_batch_pixels // (canvas.height_px * canvas.width_px)
            for count in sorted({1, max(1, min(self._settings.max_batch_size, affordable))}):
                raws = session.run(np.zeros((count, 3, *size), np.uint8), np.array([size] * count))
                if not all(is_finite(raw) for raw in raws):
                    raise ArtifactError(f"{contract.name} {contract.version} gives numbers that are not finite")
        return contract, session
