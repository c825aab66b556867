"""An artifact on its way to the callers: opening, then ready or refused, in the end stopped."""

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from model.backends.handover import HandoverSession
from model.backends.session import Session
from model.contract import Contract
from model.errors import ArtifactError, NotReady, UsegError
from service.pipeline import Pipeline
from service.settings import Settings
from service.telemetry import Telemetry

logger = logging.getLogger(__name__)

Opener = Callable[[], tuple[Contract, Session]]
"""Gives a checked artifact, or raises UsegError; called once, off the event loop."""


class Deployment:
    """Opens an artifact in the background, so that the process answers while it warms up."""

    def __init__(self, opener: Opener, settings: Settings, telemetry: Telemetry) -> None:
        self._opener = opener
        self._settings = settings
        self._telemetry = telemetry
        self._pipeline: Pipeline | None = None
        self._session: Session | None = None
        self._refusal: UsegError | None = None
        self._obstacle = "the artifact is being opened: try again in a moment"
        self._opening: asyncio.Task[None] | None = None
        self._is_settled = asyncio.Event()

    async def start(self) -> None:
        """Begin to open the artifact."""
        self._opening = asyncio.create_task(self._open())

    async def stop(self) -> None:
        """Take no more pictures, and end what was started."""
        if self._opening:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        pipeline, self._pipeline = self._pipeline, None
        self._obstacle = "the service is shutting down: try again in a moment"
        if pipeline:
            await pipeline.stop()
        if isinstance(self._session, HandoverSession):
            self._session.close()

    async def settle(self) -> None:
        """Return once pictures are taken. Raises the error for which the artifact was refused."""
        await self._is_settled.wait()
        if self._refusal:
            raise self._refusal

    def require(self) -> Pipeline:
        """The artifact at work. Raises NotReady, with the reason, while there is none."""
        if not self._pipeline:
            raise NotReady(self._obstacle)
        return self._pipeline

    def describe(self) -> None:
        """Tell the telemetry what answers now; a session may have handed over to a faster one."""
        if self._pipeline and self._session:
            contract = self._pipeline.contract
            self._telemetry.model.info(
                {"name": contract.name, "version": contract.version, "backend": self._session.backend}
            )

    async def _open(self) -> None:
        try:
            contract, session = await asyncio.to_thread(self._open_warm)
        except UsegError as error:
            self._refuse(error)
        except Exception as error:  # a backend may raise anything; the process stays up to say that it is not ready
            logger.exception("the artifact could not be run")
            self._refuse(ArtifactError(f"the artifact could not be run: {type(error).__name__}, see the log"))
        else:
            pipeline = Pipeline(contract, session, self._settings, self._telemetry)
            await pipeline.start()
            self._pipeline, self._session = pipeline, session
            self.describe()
        self._is_settled.set()

    def _refuse(self, error: UsegError) -> None:
        logger.error("the artifact was refused: %s", error)
        self._refusal = error
        self._obstacle = f"the artifact was refused: {error}"

    def _open_warm(self) -> tuple[Contract, Session]:
        """The artifact after a first run on each canvas, slower than all that follow."""
        contract, session = self._opener()
        for canvas in contract.canvases:
            size = (canvas.height_px, canvas.width_px)
            session.run(np.zeros((1, 3, *size), np.uint8), np.array([size]))
        return contract, session
