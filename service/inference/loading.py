"""Loads artifacts: on the backend in the settings, off the event loop, warmed up before they serve."""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from model.backends.loader import load_session
from model.backends.openvino import default_compile_cache
from model.backends.session import Session
from model.contract import Contract
from model.errors import ArtifactError, UsegError
from model.registry.signatures import read_trusted_keys, verify_signature
from service.inference.batch_scheduler import is_finite
from service.inference.pipeline import Pipeline
from service.metrics import Telemetry
from service.settings import Settings

logger = logging.getLogger(__name__)

ArtifactLoader = Callable[[Path], tuple[Contract, Session]]
"""Returns the checked artifact of a directory and its session, or raises UsegError.

Called off the event loop, and again if the inference thread died.
"""


def make_artifact_loader(settings: Settings) -> ArtifactLoader:
    """Return a loader for the backend in the settings; if they name trusted keys, it requires a signature.

    Raises ConfigError for unusable public keys.
    """
    trusted = read_trusted_keys(settings.trusted_keys_file) if settings.trusted_keys_file else None

    def load(directory: Path) -> tuple[Contract, Session]:
        if trusted is not None:
            verify_signature(directory, trusted)
        return load_session(
            directory,
            backend=settings.backend,
            threads=settings.intra_op_threads,
            streams=settings.streams,
            compile_cache=settings.compile_cache or default_compile_cache(),
        )

    return load


async def load_pipeline(
    load: Callable[[], tuple[Contract, Session]], settings: Settings, telemetry: Telemetry, names_file: Path
) -> Pipeline:
    """Load an artifact and start its pipeline. Raises UsegError, with the reason, if it cannot be run."""
    started = time.perf_counter()
    load_warm = partial(_load_and_warm_up, load, settings)
    try:
        contract, session = await asyncio.to_thread(load_warm)
    except UsegError:
        raise
    except Exception as error:  # a backend may raise anything; the server stays up to report it
        logger.exception("the artifact could not be run")
        raise ArtifactError(f"the artifact could not be run: {type(error).__name__}, see the log") from error
    pipeline = Pipeline(load_warm, contract, session, settings, telemetry, names_file)
    await pipeline.start()
    telemetry.model_load_duration.set(time.perf_counter() - started)
    return pipeline


def _load_and_warm_up(load: Callable[[], tuple[Contract, Session]], settings: Settings) -> tuple[Contract, Session]:
    """Load the artifact and run the smallest and the largest batch of each input size.

    First runs are slower than later ones, and allocate as much memory as any.
    """
    contract, session = load()
    for input_size in contract.input_sizes:
        size = (input_size.height_px, input_size.width_px)
        max_images = settings.max_batch_pixels // (size[0] * size[1])
        for count in sorted({1, max(1, min(settings.max_batch_size, max_images))}):
            outputs = session.run(np.zeros((count, 3, *size), np.uint8), np.array([size] * count))
            if not all(is_finite(each) for each in outputs):
                raise ArtifactError(f"{contract.name} {contract.version} outputs numbers that are not finite")
    return contract, session
