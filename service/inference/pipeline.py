"""Segments one image: decode, infer, postprocess, encode."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import orjson
from jaxtyping import UInt8

from model.backends.session import AutoSession, Session, find_hot_swap
from model.contract import Contract, RawOutputs, Task
from model.detail import PreparedImage, prepare_image
from model.errors import ArtifactError
from model.formats.coco import (
    to_coco_annotation,
    to_coco_instances,
    to_geojson_features,
    to_hf_masks,
    to_npz,
    to_segments_info,
)
from model.formats.image_files import encode_cluster_png, encode_jpeg, encode_overlay, encode_panoptic_png
from model.images import DecodedImage, check_pixels, decode_image, limit_size
from model.postprocessing.panoptic import Segmentation, make_postprocessor, merge_categories, select_segments
from service.inference.batch_scheduler import BatchScheduler
from service.inference.live_category_names import LiveCategoryNames
from service.metrics import RequestRecord, Telemetry, VersionStats
from service.requests import LOWEST_PRIORITY, FormatName, RequestContext, SegmentOptions
from service.settings import Settings

T = TypeVar("T")
ImageContent = bytes | UInt8[np.ndarray, "H W 3"]
"""An encoded file, or upright RGB pixels."""
_TIMED_RUN_TIMEOUT_S = 60.0

MediaType = Literal[
    "application/json",
    "image/png",
    "image/jpeg",
    "application/geo+json",
    'image/png;profile="clusters"',
    "application/x-npz",
    "application/vnd.hf.image-segmentation+json",
    "application/zip",
]
_FORMATS: dict[FormatName, tuple[MediaType, str]] = {
    "json": ("application/json", ".json"),
    "geojson": ("application/geo+json", ".geojson"),
    "png": ("image/png", ".png"),
    "coco-instances": ("application/json", ".instances.json"),
    "coco-polygons": ("application/json", ".polygons.json"),
    "clusters": ('image/png;profile="clusters"', ".clusters.png"),
    "overlay": ("image/jpeg", ".overlay.jpg"),
    "npz": ("application/x-npz", ".npz"),
    "huggingface": ("application/vnd.hf.image-segmentation+json", ".huggingface.json"),
}
"""Media type and file suffix of each format."""
_FORMAT_OF_MEDIA_TYPE = {media_type: name for name, (media_type, _) in _FORMATS.items() if not name.startswith("coco-")}


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """An image and its segments."""

    image: DecodedImage
    """In the size of the result."""
    original_size: tuple[int, int]
    """Height and width of the file after EXIF rotation."""
    segmentations: tuple[tuple[Task, Segmentation], ...]
    """One for each task, in the order of the request."""
    clusters: Mapping[Task, Segmentation]
    """The same before clusters of one category were merged."""
    contract: Contract
    """With the category names of the segments."""


@dataclass(frozen=True, kw_only=True)
class ResponsePart:
    """One file of a response."""

    content: bytes
    suffix: str
    task: Task | None
    """None for a file that covers all tasks."""
    annotations: Sequence[dict[str, Any]] | None = None
    """COCO annotations for a zip file; ids and file names are set when it is written."""


class Pipeline:
    """One model version at work. Images are decoded and encoded on threads, so that the event loop stays free."""

    def __init__(
        self,
        load: Callable[[], tuple[Contract, Session]],
        contract: Contract,
        session: Session,
        settings: Settings,
        telemetry: Telemetry,
        names_file: Path,
    ) -> None:
        """`load` has returned contract and session; it is called again if an inference thread dies."""
        self.names = LiveCategoryNames(contract, names_file)
        self.stats = VersionStats(contract, telemetry)
        self.scheduler = BatchScheduler(_unwrap(session), settings, telemetry, self._reload)
        self._load = load
        self._loaded = (contract, session)
        codec_threads = settings.streams * settings.intra_op_threads
        self.max_concurrent_images = codec_threads + settings.streams * settings.max_batch_size
        """Images of one request that are segmented at once, so that other requests have room."""
        self._telemetry = telemetry
        self._max_image_pixels = settings.max_image_pixels
        self._threads = ThreadPoolExecutor(max_workers=codec_threads, thread_name_prefix="codec")
        self._names_task: asyncio.Task[None] | None = None

    @property
    def contract(self) -> Contract:
        """The artifact's contract with the current category names."""
        return self.names.contract

    @property
    def backend(self) -> str:
        """The backend in use; it changes when a faster session takes over."""
        return self._loaded[1].backend

    @property
    def skipped_backends(self) -> Mapping[str, str]:
        """Why faster backends are not in use, by their names; empty unless the backend is chosen automatically."""
        session = self._loaded[1]
        return session.skipped_backends if isinstance(session, AutoSession) else {}

    @property
    def is_idle(self) -> bool:
        """Whether no request is at work."""
        return not self.scheduler.in_flight and self.scheduler.is_idle

    async def start(self) -> None:
        """Start to accept images."""
        await asyncio.to_thread(self.names.refresh)
        self._names_task = asyncio.create_task(self.names.poll())
        await self.scheduler.start()

    async def stop(self) -> None:
        """Stop the scheduler and the threads."""
        if self._names_task:
            self._names_task.cancel()
        await self.scheduler.stop()
        await asyncio.to_thread(partial(self._threads.shutdown, cancel_futures=True))
        self.stats.close()
        self._stop_hot_swap()

    async def run(
        self,
        content: ImageContent,
        options: SegmentOptions,
        encode: Callable[[SegmentationResult], T],
        context: RequestContext,
        record: RequestRecord,
        contract: Contract,
    ) -> T:
        """Segment one image and return `encode(result)`, which runs on a codec thread.

        `contract` is the pipeline's at the start of the request: its names stay the same while others change them.
        Raises InputError for an invalid image or option, and what the scheduler raises.
        """
        started = time.perf_counter()
        record.enter("decode")
        image, prepared = await self.offload(partial(self._decode, content, options, record))
        record.enter("queue")
        outputs = await self._infer(prepared, context, record)
        record.enter("merge")
        postprocess = partial(self._postprocess, image, prepared, outputs, options, encode, record, contract)
        encoded = await self.offload(postprocess)
        self.stats.record_image(time.perf_counter() - started)
        return encoded

    async def _infer(self, prepared: PreparedImage, context: RequestContext, record: RequestRecord) -> list[RawOutputs]:
        """Run the network on all inputs of an image; each waits in the queue like an image of its own."""
        if len(prepared.inputs) > 1:
            self.scheduler.check_wait(context, images=len(prepared.inputs))
        started = time.perf_counter()
        on_start = partial(record.enter, "infer")
        runs = [
            asyncio.ensure_future(self.scheduler.submit(each.pixels, each.size, context, on_start=on_start))
            for each in prepared.inputs
        ]
        try:
            results = await asyncio.gather(*runs)
        finally:
            for run in runs:  # one that has failed takes the others with it
                run.cancel()
        elapsed_s = time.perf_counter() - started
        infer_s = min(elapsed_s, sum(run_s for _, run_s in results))  # inputs of one batch share a run
        record.add("queue", elapsed_s - infer_s, ended_ago_s=infer_s)
        record.add("infer", infer_s)
        return [raw for raw, _ in results]

    async def offload(self, work: Callable[[], T]) -> T:
        """Run `work` on a codec thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def render_photo(self, content: bytes, longest_edge: int | None) -> bytes:
        """Return the image of a file as it is segmented, upright and in sRGB, as JPEG. Raises InputError."""
        image = decode_image(content, max_image_pixels=self._max_image_pixels)
        return encode_jpeg(limit_size(image, longest_edge or max(image.height, image.width)).image)

    async def time_run(self) -> float:
        """Return the seconds that the network takes for one image under the current load. Raises as `submit`."""
        input_size = self.contract.input_sizes[0]
        size = (input_size.height_px, input_size.width_px)
        deadline = asyncio.get_running_loop().time() + _TIMED_RUN_TIMEOUT_S
        context = RequestContext(deadline=deadline, priority=LOWEST_PRIORITY)
        return (await self.scheduler.submit(np.zeros((3, *size), np.uint8), size, context))[1]

    def _reload(self) -> Session:
        """Return a new session after the inference thread died. Raises ArtifactError if the artifact has changed."""
        contract, session = self._load()
        if contract != self._loaded[0]:
            raise ArtifactError("the artifact changed while it was served: restart the server to use the new one")
        self._stop_hot_swap()
        self._loaded = (contract, session)
        return _unwrap(session)

    def _stop_hot_swap(self) -> None:
        if hot_swap := find_hot_swap(self._loaded[1]):
            hot_swap.close()

    def _decode(
        self, content: ImageContent, options: SegmentOptions, record: RequestRecord
    ) -> tuple[DecodedImage, PreparedImage]:
        """Return the image in the size of the result, and what the network sees of it."""
        with record.time("decode"):
            if isinstance(content, bytes):
                image = decode_image(content, max_image_pixels=self._max_image_pixels)
            else:
                check_pixels(content.shape[1], content.shape[0], self._max_image_pixels)
                image = DecodedImage(image=content, num_frames=1, orientation=1)
            prepared = prepare_image(image.image, self.contract, options.detail)
            limited = limit_size(image, options.longest_edge or max(image.height, image.width))
        self._telemetry.image_pixels.observe(image.height * image.width)
        return limited, prepared

    def _postprocess(
        self,
        image: DecodedImage,
        prepared: PreparedImage,
        outputs: list[RawOutputs],
        options: SegmentOptions,
        encode: Callable[[SegmentationResult], T],
        record: RequestRecord,
        contract: Contract,
    ) -> T:
        is_selected = options.select_classes(contract)
        thresholds = options.override(contract.thresholds)
        letterbox = replace(prepared.letterbox, height=image.height, width=image.width)
        with record.time("merge"):
            postprocess = make_postprocessor(
                prepared.merge(outputs), letterbox, contract, prepared.override(thresholds)
            )
            clusters = {task: postprocess(task) for task in options.tasks}
            if is_selected is not None:
                clusters = {task: select_segments(each, is_selected) for task, each in clusters.items()}
            merged = clusters
            if options.merge_clusters:
                merged = {task: merge_categories(each, task) for task, each in clusters.items()}
        is_default = is_selected is None and thresholds == contract.thresholds and options.detail == "standard"
        self.stats.record_outputs(clusters, is_default=is_default)
        with record.time("encode"):
            return encode(
                SegmentationResult(
                    image=image,
                    original_size=(prepared.letterbox.height, prepared.letterbox.width),
                    segmentations=tuple(merged.items()),
                    clusters=clusters,
                    contract=contract,
                )
            )


def _unwrap(session: Session) -> Session:
    """Return the session that runs: the one that backend "auto" chose, if it did."""
    return session.session if isinstance(session, AutoSession) else session


def encode_result(
    result: SegmentationResult, options: SegmentOptions, media_type: MediaType
) -> tuple[ResponsePart, ...]:
    """Return the files for one image: one, unless the media type is an archive."""
    if media_type == "application/json":
        return (ResponsePart(content=orjson.dumps(result_to_json(result)), suffix=".json", task=None),)
    single = _FORMAT_OF_MEDIA_TYPE.get(media_type)
    return tuple(
        _encode_part(name, result, task, segmentation, is_zip=single is None)
        for task, segmentation in result.segmentations
        for name in ((single,) if single else options.formats)
    )


def result_to_json(result: SegmentationResult) -> dict[str, Any]:
    """Return the JSON of one image, as `SegmentationResponse` or `MultiTaskResponse` documents it."""
    results = [
        {"task": task, "segments_info": to_segments_info(segmentation)} for task, segmentation in result.segmentations
    ]
    head = {"image": _image_to_json(result), "model": model_to_json(result.contract)}
    return head | (results[0] if len(results) == 1 else {"results": results})


def model_to_json(contract: Contract) -> dict[str, str]:
    """Return name and version of the model."""
    return {"name": contract.name, "version": contract.version}


def _image_to_json(result: SegmentationResult) -> dict[str, Any]:
    image = result.image
    return {
        "width": image.width,
        "height": image.height,
        "original_width": result.original_size[1],
        "original_height": result.original_size[0],
        "num_frames": image.num_frames,
        "frame_index": 0,
        "exif_transposed": image.orientation != 1,
        "warnings": image.warnings,
    }


def _encode_part(
    name: FormatName, result: SegmentationResult, task: Task, segmentation: Segmentation, *, is_zip: bool
) -> ResponsePart:
    content, annotations, contract = b"", None, result.contract
    match name:
        case "json":
            content = orjson.dumps(result_to_json(replace(result, segmentations=((task, segmentation),))))
        case "geojson":
            collection = {
                "type": "FeatureCollection",
                "image": _image_to_json(result),
                "model": model_to_json(contract),
                "task": task,
                "features": to_geojson_features(segmentation),
            }
            content = orjson.dumps(collection, option=orjson.OPT_SERIALIZE_NUMPY)
        case "png":
            content = encode_panoptic_png(segmentation.label_map)
            annotations = [to_coco_annotation(segmentation, contract, 0, "")] if is_zip else None
        case "coco-instances" | "coco-polygons":  # in zips alone, as no media type selects them
            annotations = to_coco_instances(segmentation, contract, "rle" if name == "coco-instances" else "polygons")
        case "clusters":
            content = encode_cluster_png(result.clusters[task], contract)
        case "overlay":
            content = encode_overlay(result.image.image, segmentation)
        case "npz":
            content = to_npz(segmentation)
        case "huggingface":
            content = orjson.dumps(to_hf_masks(segmentation))
    return ResponsePart(content=content, suffix=_FORMATS[name][1], task=task, annotations=annotations)
