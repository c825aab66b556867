"""One picture's way through the service: decoded, answered by the network, merged, encoded."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from model.backends.session import Session
from model.contract import Contract
from model.panoptic import assemble
from model.pixels import Photo, Placement, decode_image, place
from model.raw import Raw
from service.answers import Answer, make_answer
from service.engine import Engine
from service.media import Media
from service.options import Options
from service.settings import Settings
from service.telemetry import Stopwatch, Telemetry

T = TypeVar("T")


class Pipeline:
    """An artifact at work. Decoding and encoding have threads of their own, so that the event loop stays free."""

    def __init__(self, contract: Contract, session: Session, settings: Settings, telemetry: Telemetry) -> None:
        self.contract = contract
        self.engine = Engine(
            session,
            telemetry,
            max_batch=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            capacity=settings.queue,
        )
        self._telemetry = telemetry
        self._limit_pixels = settings.limit_pixels
        self._threads = ThreadPoolExecutor(max_workers=settings.threads, thread_name_prefix="codec")
        self._places = settings.queue + settings.max_batch

    async def start(self) -> None:
        """Begin to take pictures."""
        await self.engine.start()

    async def stop(self) -> None:
        """End the engine and the threads."""
        await self.engine.stop()
        await asyncio.to_thread(partial(self._threads.shutdown, cancel_futures=True))

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place for one request, its body not yet read.

        As many as can wait and run; without that bound, bodies and decoded pictures would pile up before the queue.
        Raises Busy if all are taken.
        """
        if self._places < 1:
            raise self.engine.make_busy()
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1

    async def segment(
        self, content: bytes, options: Options, media: Media, deadline: float, stopwatch: Stopwatch
    ) -> Answer:
        """The answer to an image file. Raises any InputError of its decoding, and all that the engine raises."""
        photo, pixels, placement = await self._offload(partial(self._prepare, content, stopwatch))
        inference = await self.engine.submit(pixels, placement.size, deadline)
        stopwatch.add("queue", inference.queue_s)
        stopwatch.add("infer", inference.infer_s)
        return await self._offload(partial(self._finish, photo, inference.raw, placement, options, media, stopwatch))

    async def _offload(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _prepare(self, content: bytes, stopwatch: Stopwatch) -> tuple[Photo, UInt8[np.ndarray, "3 H W"], Placement]:
        with stopwatch.time("decode"):
            photo = decode_image(content, limit_pixels=self._limit_pixels)
            return photo, *place(photo.image, self.contract.canvases, self.contract.stride_px)

    def _finish(
        self, photo: Photo, raw: Raw, placement: Placement, options: Options, media: Media, stopwatch: Stopwatch
    ) -> Answer:
        thresholds = self.contract.thresholds
        if options.threshold is not None:
            thresholds = replace(thresholds, score=options.threshold)
        with stopwatch.time("merge"):
            segmentation = assemble(raw, placement, self.contract, options.task, thresholds)
        self._telemetry.segments.observe(len(segmentation.segments))
        with stopwatch.time("encode"):
            return make_answer(photo, segmentation, self.contract, options.task, media)
