"""A picture's way through the service: decoded, answered by the network, merged, encoded."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from model.backends.session import Session
from model.contract import Contract, Task
from model.images import DecodedImage, Letterbox, decode_image, letterbox_image, limit_size
from model.network_io import RawOutputs
from model.postprocessing.panoptic import Segmentation, make_postprocessor, select_clusters
from service.inference.admission import AdmissionController
from service.inference.batch_scheduler import BatchScheduler
from service.inference.live_category_names import LiveCategoryNames
from service.requests import LOWEST_PRIORITY, RequestContext, SegmentOptions
from service.settings import Settings
from service.telemetry.metrics import SharedGauge, Telemetry
from service.telemetry.stage_timer import StageTimer
from service.telemetry.version_stats import DriftMonitor, RecentOutcomes, VersionStats

T = TypeVar("T")
_TIMED_RUN_TIMEOUT_S = 60.0
"""Longest wait for a run that is timed."""


@dataclass(frozen=True, kw_only=True)
class _DecodedImage:
    photo: DecodedImage
    """In the size of the answer."""
    original_size: tuple[int, int]
    pixels: UInt8[np.ndarray, "3 H W"]
    size: tuple[int, int]
    """Height and width on the canvas."""
    letterbox: Letterbox
    """From the canvas to the size of the answer."""


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """An image and its segments."""

    image: DecodedImage
    """In the size of the result."""
    original_size: tuple[int, int]
    """Height and width of the file after EXIF rotation."""
    segmentations: tuple[tuple[Task, Segmentation], ...]
    """One for each task, in the order of the request."""


class Pipeline:
    """An artifact at work. Decoding and encoding have threads of their own, so that the event loop stays free."""

    def __init__(
        self,
        contract: Contract,
        session: Session,
        settings: Settings,
        telemetry: Telemetry,
        *,
        reopen: Callable[[], Session] | None = None,
        glossary: Path | None = None,
    ) -> None:
        self.names = LiveCategoryNames(contract, glossary)
        self._following: asyncio.Task[None] | None = None
        self.engine = BatchScheduler(
            session,
            telemetry,
            max_batch_size=settings.max_batch_size,
            max_queue_delay_ms=settings.max_queue_delay_ms,
            capacity=settings.max_queue_size,
            max_batch_pixels=settings.max_batch_pixels,
            max_queue_wait_s=settings.max_queue_wait_s,
            inference_timeout_s=settings.inference_timeout_s,
            reopen=reopen,
        )
        self._telemetry = telemetry
        self.drift = DriftMonitor(contract, telemetry)
        self._limit_pixels = settings.max_image_pixels
        self._threads = ThreadPoolExecutor(max_workers=settings.intra_op_threads, thread_name_prefix="codec")
        self._places = AdmissionController(
            settings.max_queue_size + settings.max_batch_size,
            self.engine.make_busy,
            SharedGauge(telemetry.requests_in_flight),
        )
        self.max_concurrent_images = settings.intra_op_threads + settings.max_batch_size
        self._capacity = SharedGauge(telemetry.queue_capacity)
        self._capacity.set(settings.max_queue_size)
        self.track = RecentOutcomes()
        self.tally = VersionStats(contract.name, contract.version)
        telemetry.init_series(contract)

    @property
    def contract(self) -> Contract:
        """The artifact's, with the names that its clusters have at the moment."""
        return self.names.contract

    async def start(self) -> None:
        """Begin to take pictures."""
        await asyncio.to_thread(self.names.refresh)
        self._following = asyncio.create_task(self.names.follow())
        await self.engine.start()

    async def stop(self) -> None:
        """End the engine and the threads."""
        if self._following:
            self._following.cancel()
        await self.engine.stop()
        await asyncio.to_thread(partial(self._threads.shutdown, cancel_futures=True))
        self.drift.forget()
        self._telemetry.remove_series(self.contract)
        self._capacity.set(0)

    @property
    def is_idle(self) -> bool:
        """Whether no request is with this version."""
        return self._places.is_empty and self.engine.is_idle

    def begin(self) -> None:
        """Forget what was noted, as the version gets another role."""
        self.track.clear()
        self.drift.begin()

    async def time_run(self) -> float:
        """How long the network takes for a picture, in seconds, under the load of the moment. Raises as `submit`."""
        canvas = self.contract.input_sizes[0]
        size = (canvas.height_px, canvas.width_px)
        claim = RequestContext(
            deadline=asyncio.get_running_loop().time() + _TIMED_RUN_TIMEOUT_S, priority=LOWEST_PRIORITY
        )
        return (await self.engine.submit(np.zeros((3, *size), np.uint8), size, claim)).infer_s

    def admit(self, claim: RequestContext) -> AbstractContextManager[None]:
        """A place for one request, its body not yet read; as many as can wait and run. Raises Busy."""
        self.engine.require_place(claim)
        return self._places.admit(claim)

    async def run(
        self,
        content: bytes,
        options: SegmentOptions,
        encode: Callable[[SegmentationResult], T],
        claim: RequestContext,
        stopwatch: StageTimer,
    ) -> T:
        """Decode, infer and postprocess one image, and return `encode(result)`, which runs on a codec thread.

        Raises InputError for an invalid image or option, and what the scheduler raises.
        """
        started = time.perf_counter()
        with stopwatch.follow(self.tally) as own:
            own.enter("decode")
            prepared = await self.offload(partial(self._prepare, content, options, own))
            own.enter("queue")
            inference = await self.engine.submit(prepared.pixels, prepared.size, claim, partial(own.enter, "infer"))
            own.add("queue", inference.queue_s, ago_s=inference.infer_s)
            own.add("infer", inference.infer_s)
            own.enter("merge")
            result = await self.offload(partial(self._finish, prepared, inference.raw, options, encode, own))
        self.track.take(time.perf_counter() - started)
        return result

    async def offload(self, work: Callable[[], T]) -> T:
        """Run `work` on a codec thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _prepare(self, content: bytes, options: SegmentOptions, stopwatch: StageTimer) -> _DecodedImage:
        with stopwatch.time("decode"):
            photo = decode_image(content, max_image_pixels=self._limit_pixels)
            pixels, placement = letterbox_image(photo.image, self.contract.input_sizes, self.contract.stride_px)
            shown = limit_size(photo, options.longest_edge or max(photo.height, photo.width))
        self._telemetry.image_pixels.observe(photo.height * photo.width)
        return _DecodedImage(
            photo=shown,
            original_size=(photo.height, photo.width),
            pixels=pixels,
            size=placement.size,
            letterbox=replace(placement, height=shown.height, width=shown.width),
        )

    def _finish(
        self,
        prepared: _DecodedImage,
        raw: RawOutputs,
        options: SegmentOptions,
        encode: Callable[[SegmentationResult], T],
        stopwatch: StageTimer,
    ) -> T:
        contract = self.contract
        clusters = options.find_clusters(contract)
        thresholds = options.override(contract.thresholds)
        with stopwatch.time("merge"):
            assemble = make_postprocessor(raw, prepared.letterbox, contract, thresholds)
            answers = [(task, assemble(task)) for task in options.tasks]
            if clusters is not None:
                answers = [(task, select_clusters(answer, clusters)) for task, answer in answers]
        self._observe(answers[0][1])
        if clusters is None and thresholds == contract.thresholds and "panoptic" in options.tasks:
            self.drift.observe(dict(answers)["panoptic"])
        with stopwatch.time("encode"):
            return encode(
                SegmentationResult(
                    image=prepared.photo, original_size=prepared.original_size, segmentations=tuple(answers)
                )
            )

    def _observe(self, answer: Segmentation) -> None:
        """Count what would tell that answers drift."""
        which = (self.tally.model, self.tally.version)
        self.tally.last_answer_s = time.time()
        self._telemetry.segments.labels(*which).observe(len(answer.segments))
        void = 1.0 - np.count_nonzero(answer.label_map) / answer.label_map.size
        self._telemetry.void.labels(*which).observe(void)
        if answer.segments:
            mean = sum(segment.score for segment in answer.segments) / len(answer.segments)
            self._telemetry.mean_score.labels(*which).observe(mean)
