"""One model version: loaded in the background, then ready or failed, finally stopped."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from model.backends.session import AutoSession, HotSwapSession, Session
from model.contract import Contract
from model.errors import ArtifactError, NotReady, ShuttingDown, UsegError
from service.inference.batch_scheduler import is_finite
from service.inference.pipeline import Pipeline
from service.metrics import ModelState, Telemetry
from service.settings import Settings

logger = logging.getLogger(__name__)

ArtifactLoader = Callable[[Path], tuple[Contract, Session]]
"""Returns the checked artifact of a directory and its session, or raises UsegError.

Called off the event loop, and again if the inference thread died.
"""


class LoadedModel:
    """Loads an artifact in the background, so that the server answers health checks meanwhile."""

    def __init__(
        self, load: Callable[[], tuple[Contract, Session]], settings: Settings, telemetry: Telemetry, names_file: Path
    ) -> None:
        self._load_artifact = load
        self._names_file = names_file
        self._settings = settings
        self._telemetry = telemetry
        self._session: Session | None = None
        self._contract: Contract | None = None
        self._error: UsegError | None = None
        self._unready_reason = "the artifact is loading: try again in a moment"
        self._loading: asyncio.Task[None] | None = None
        self._is_loaded = asyncio.Event()
        self.pipeline: Pipeline | None = None
        """None before the artifact is loaded and after `stop`."""
        self.is_draining = False

    async def start(self) -> None:
        """Start loading the artifact."""
        self._loading = asyncio.create_task(self._load())

    def drain(self) -> None:
        """Report as not ready from now on, and run batches without delay; requests are still accepted."""
        self.is_draining = True
        if self.pipeline:
            self.pipeline.scheduler.drain()

    async def stop(self) -> None:
        """Reject further images and release what was started."""
        if self._loading:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        pipeline, self.pipeline = self.pipeline, None
        self._unready_reason = "the server is shutting down: try again in a moment"
        if pipeline:
            await pipeline.stop()
        self._close_session()

    async def wait_ready(self) -> None:
        """Return once images are accepted. Raises the error with which loading failed."""
        await self._is_loaded.wait()
        if self._error:
            raise self._error

    def get_pipeline(self) -> Pipeline:
        """Return the pipeline. Raises NotReady, with the reason, while it is not ready."""
        if not self.pipeline:
            raise ShuttingDown(self._unready_reason) if self.is_draining else NotReady(self._unready_reason)
        if not self.pipeline.scheduler.is_alive:
            raise NotReady("the inference worker died and is being restarted: try again in a moment")
        return self.pipeline

    @property
    def backend(self) -> str:
        """The backend in use; it changes when a faster session takes over."""
        return self._session.backend if self._session else ""

    @property
    def skipped_backends(self) -> dict[str, str]:
        """Why faster backends are not in use, by their names; empty unless the backend is chosen automatically."""
        return dict(self._session.skipped_backends) if isinstance(self._session, AutoSession) else {}

    @property
    def state(self) -> ModelState:
        if self._error:
            return "failed"
        if not self.pipeline:
            return "loading"
        return "ready" if self.pipeline.scheduler.is_alive else "restarting"

    async def _load(self) -> None:
        started = time.perf_counter()
        try:
            contract, session = await asyncio.to_thread(self._load_and_warm_up)
        except UsegError as error:
            self._fail(error)
        except Exception as error:  # a backend may raise anything; the server stays up to report it
            logger.exception("the artifact could not be run")
            self._fail(ArtifactError(f"the artifact could not be run: {type(error).__name__}, see the log"))
        else:
            pipeline = Pipeline(
                contract, _unwrap(session), self._settings, self._telemetry, self._names_file, self._reload
            )
            await pipeline.start()
            self._telemetry.model_load_duration.set(time.perf_counter() - started)
            self.pipeline, self._session, self._contract = pipeline, session, contract
        self._is_loaded.set()

    def _fail(self, error: UsegError) -> None:
        logger.error("the artifact could not be loaded: %s", error)
        self._error = error
        self._unready_reason = f"the artifact could not be loaded: {error}"

    def _reload(self) -> Session:
        """Return a new session after the inference thread died. Raises ArtifactError if the artifact has changed."""
        contract, session = self._load_and_warm_up()
        if self._contract and contract != self._contract:
            raise ArtifactError("the artifact changed while it was served: restart the server to use the new one")
        self._close_session()
        self._session = session
        return _unwrap(session)

    def _close_session(self) -> None:
        if self._session and isinstance(session := _unwrap(self._session), HotSwapSession):
            session.close()

    def _load_and_warm_up(self) -> tuple[Contract, Session]:
        """Load the artifact and run the smallest and the largest batch of each input size.

        First runs are slower than later ones, and allocate as much memory as any.
        """
        contract, session = self._load_artifact()
        for input_size in contract.input_sizes:
            size = (input_size.height_px, input_size.width_px)
            max_images = self._settings.max_batch_pixels // (size[0] * size[1])
            for count in sorted({1, max(1, min(self._settings.max_batch_size, max_images))}):
                outputs = session.run(np.zeros((count, 3, *size), np.uint8), np.array([size] * count))
                if not all(is_finite(each) for each in outputs):
                    raise ArtifactError(f"{contract.name} {contract.version} outputs numbers that are not finite")
        return contract, session


def _unwrap(session: Session) -> Session:
    """Return the session that runs: the one that backend "auto" chose, if it did."""
    return session.session if isinstance(session, AutoSession) else session
