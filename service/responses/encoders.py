"""Response formats: content negotiation, the formats of one image, and responses with several results."""

import io
import re
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Literal, get_args

import orjson

from model.contract import Contract, Task
from model.errors import NotAcceptable
from model.formats.coco import (
    to_coco_annotation,
    to_coco_dataset,
    to_coco_instances,
    to_geojson_features,
    to_hf_masks,
    to_segments_info,
)
from model.formats.npz import to_npz
from model.formats.overlay import encode_overlay
from model.formats.png import encode_cluster_png, encode_panoptic_png
from model.postprocessing.panoptic import Segmentation
from service.inference.pipeline import SegmentationResult
from service.requests import FormatName, SegmentOptions
from service.responses.problems import PROBLEM_MEDIA_TYPE

MediaType = Literal[
    "application/json",
    "image/png",
    "image/jpeg",
    "application/geo+json",
    'image/png;profile="clusters"',
    "application/x-npz",
    "application/vnd.hf.image-segmentation+json",
    "application/zip",
    "multipart/mixed",
]
MEDIA_TYPES: tuple[MediaType, ...] = get_args(MediaType)
"""Media types of a single result; the first is the default, and the earlier of equal quality is chosen."""
MULTI_RESULT_MEDIA_TYPES: tuple[MediaType, ...] = ("application/json", "application/zip", "multipart/mixed")
"""Media types of several images or tasks."""

_DEFAULT_PROFILES = {"image/png": "coco-panoptic"}
_QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time in a zip file: equal results are equal bytes."""

_FORMATS: dict[FormatName, tuple[str, str]] = {
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
_COCO_FILES = {".png": ".json", ".instances.json": ".instances.json", ".polygons.json": ".polygons.json"}
"""File suffix of the COCO JSON of all images in a zip, by the suffix of the parts that it lists."""


@dataclass(frozen=True, kw_only=True)
class ResponsePart:
    """One file of a response."""

    content: bytes
    media_type: str
    suffix: str
    task: Task | None
    """None for a file that covers all tasks."""
    annotations: Sequence[dict[str, Any]] | None = None
    """COCO annotations for a zip file; ids and file names are set when it is written."""


@dataclass(frozen=True, kw_only=True)
class ImageResponse:
    """The response for one image: its files, or the problem."""

    name: str | None
    """File name that the client sent."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the result."""
    parts: tuple[ResponsePart, ...] = ()
    warnings: tuple[str, ...] = ()
    problem: dict[str, Any] | None = None

    @property
    def status(self) -> int:
        return int(self.problem["status"]) if self.problem else HTTPStatus.OK


@dataclass(frozen=True, kw_only=True)
class EncodedResponse:
    """Body and status of a response."""

    content: bytes
    media_type: str
    warnings: tuple[str, ...] = ()
    """ASCII texts for `X-Image-Warnings`."""
    status: int = HTTPStatus.OK


@dataclass(frozen=True, kw_only=True)
class _MediaRange:
    """An entry of an `Accept` header."""

    name: str
    profile: str | None
    quality: float

    def specificity(self, name: str, profile: str | None) -> int:
        """Return how specifically the range matches a media type, 0 for no match."""
        if self.profile is not None:
            return 4 if (self.name, self.profile) == (name, profile) else 0
        return {name: 3, f"{name.split('/')[0]}/*": 2, "*/*": 1}.get(self.name, 0)


def negotiate_media_type(accept: str, *, is_multiple: bool = False) -> MediaType:
    """Return the best media type for an `Accept` header (RFC 9110, section 12.5.1).

    Only the parameters `q` and `profile` are used; a range with a malformed `q` is not acceptable.
    Raises NotAcceptable if nothing matches.
    """
    offered = MULTI_RESULT_MEDIA_TYPES if is_multiple else MEDIA_TYPES
    if not accept.strip():
        return offered[0]
    ranges = [_parse_media_range(text) for text in accept.split(",") if text.strip()]
    best = max(offered, key=lambda media_type: _quality(media_type, ranges))
    if _quality(best, ranges) <= 0.0:
        subject = " of several images or tasks" if is_multiple else ""
        raise NotAcceptable(f"no response{subject} matches 'Accept: {accept}': supported are {', '.join(offered)}")
    return best


def encode_result(
    result: SegmentationResult, contract: Contract, options: SegmentOptions, media_type: MediaType
) -> tuple[ResponsePart, ...]:
    """Return the files for one image: one, unless the media type is an archive."""
    if media_type == "application/json":
        content = orjson.dumps(result_to_json(result, contract))
        return (ResponsePart(content=content, media_type=media_type, suffix=".json", task=None),)
    single = _FORMAT_OF_MEDIA_TYPE.get(media_type)
    return tuple(
        _encode_part(name, result, task, segmentation, contract, is_zip=media_type == "application/zip")
        for task, segmentation in result.segmentations
        for name in ((single,) if single else options.formats)
    )


def compose_response(
    images: Sequence[ImageResponse], contract: Contract, media_type: MediaType, *, is_batch: bool
) -> EncodedResponse:
    """Return the response to a request; that to a batch has the status of each image, and is 207 if one failed."""
    status = HTTPStatus.MULTI_STATUS if any(image.problem for image in images) else HTTPStatus.OK
    warnings = () if is_batch else images[0].warnings
    if media_type == "application/zip":
        content = _encode_zip(images, contract)
        return EncodedResponse(content=content, media_type=media_type, warnings=warnings, status=status)
    if media_type == "multipart/mixed":
        boundary = uuid.uuid4().hex
        content = _encode_multipart(images, boundary)
        full_type = f"{media_type}; boundary={boundary}"
        return EncodedResponse(content=content, media_type=full_type, warnings=warnings, status=status)
    if is_batch:
        return EncodedResponse(content=_encode_batch_json(images, contract), media_type=media_type, status=status)
    (part,) = images[0].parts
    return EncodedResponse(content=part.content, media_type=part.media_type, warnings=warnings)


def result_to_json(result: SegmentationResult, contract: Contract) -> dict[str, Any]:
    """Return the JSON of one image, as `SegmentationResponse` or `MultiTaskResponse` documents it."""
    results = [
        {"task": task, "segments_info": to_segments_info(segmentation)} for task, segmentation in result.segmentations
    ]
    head = {"image": _image_to_json(result), "model": model_to_json(contract)}
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
    name: FormatName,
    result: SegmentationResult,
    task: Task,
    segmentation: Segmentation,
    contract: Contract,
    *,
    is_zip: bool,
) -> ResponsePart:
    content, annotations = b"", None
    match name:
        case "json":
            content = orjson.dumps(result_to_json(replace(result, segmentations=((task, segmentation),)), contract))
        case "geojson":
            content = _encode_geojson(result, task, segmentation, contract)
        case "png":
            content = encode_panoptic_png(segmentation.label_map)
            annotations = [to_coco_annotation(segmentation, contract, 0, "")] if is_zip else None
        case "coco-instances" | "coco-polygons":
            annotations = to_coco_instances(segmentation, contract, "rle" if name == "coco-instances" else "polygons")
            if not is_zip:
                content = _encode_instances(result, contract, annotations)
        case "clusters":
            content = encode_cluster_png(result.clusters[task], contract)
        case "overlay":
            content = encode_overlay(result.image.image, segmentation)
        case "npz":
            content = to_npz(segmentation)
        case "huggingface":
            content = orjson.dumps(to_hf_masks(segmentation))
    media_type, suffix = _FORMATS[name]
    return ResponsePart(content=content, media_type=media_type, suffix=suffix, task=task, annotations=annotations)


def _encode_instances(result: SegmentationResult, contract: Contract, annotations: Sequence[dict[str, Any]]) -> bytes:
    image = {"id": 1, "file_name": "", "height": result.image.height, "width": result.image.width}
    return orjson.dumps(to_coco_dataset(contract, [image], [{"image_id": 1, **each} for each in annotations]))


def _encode_geojson(result: SegmentationResult, task: Task, segmentation: Segmentation, contract: Contract) -> bytes:
    collection = {
        "type": "FeatureCollection",
        "image": _image_to_json(result),
        "model": model_to_json(contract),
        "task": task,
        "features": to_geojson_features(segmentation),
    }
    return orjson.dumps(collection, option=orjson.OPT_SERIALIZE_NUMPY)


def _parse_media_type(text: str) -> tuple[str, str | None]:
    """Return the media type in lower case without parameters, and its profile."""
    name, *parameters = (piece.strip() for piece in text.split(";"))
    profiles = (piece.partition("=")[2].strip('" ') for piece in parameters if piece.lower().startswith("profile="))
    return name.lower(), next(profiles, None)


def _parse_media_range(text: str) -> _MediaRange:
    name, profile = _parse_media_type(text)
    parameters = [piece.strip().lower() for piece in text.split(";")[1:]]
    quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
    return _MediaRange(name=name, profile=profile, quality=float(quality) if _QUALITY.fullmatch(quality) else 0.0)


def _quality(media_type: MediaType, ranges: list[_MediaRange]) -> float:
    """Return the quality of the most specific range that matches, the last of equally specific ones."""
    name, profile = _parse_media_type(media_type)
    profile = profile or _DEFAULT_PROFILES.get(name)
    matching = [each for each in ranges if each.specificity(name, profile)]
    return max(reversed(matching), key=lambda each: each.specificity(name, profile)).quality if matching else 0.0


def _image_status(index: int, image: ImageResponse) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": index, "name": image.name, "status": image.status}
    return entry | ({"error": image.problem} if image.problem else {})


def _encode_batch_json(images: Sequence[ImageResponse], contract: Contract) -> bytes:
    entries = [
        _image_status(index, image) | ({"result": orjson.Fragment(image.parts[0].content)} if image.parts else {})
        for index, image in enumerate(images)
    ]
    return orjson.dumps({"model": model_to_json(contract), "results": entries})


def _encode_multipart(images: Sequence[ImageResponse], boundary: str) -> bytes:
    """Encode the files in the order of the images, each with the index and status of its image."""
    lines: list[bytes] = []
    for index, image in enumerate(images):
        problem = ResponsePart(
            content=orjson.dumps(image.problem), media_type=PROBLEM_MEDIA_TYPE, suffix=".problem.json", task=None
        )
        for part in image.parts or (problem,):
            file_name = f"{_file_stem(index)}{f'-{part.task}' if part.task else ''}{part.suffix}"
            head = (
                f"--{boundary}\r\nContent-Type: {part.media_type}\r\n"
                f'Content-Disposition: attachment; filename="{file_name}"\r\n'
                f"Content-Length: {len(part.content)}\r\nX-Item-Index: {index}\r\nX-Item-Status: {image.status}\r\n"
                + (f"X-Item-Task: {part.task}\r\n" if part.task else "")
            )
            lines += [head.encode("ascii"), b"\r\n", part.content, b"\r\n"]
    return b"".join([*lines, f"--{boundary}--\r\n".encode("ascii")])


def _encode_zip(images: Sequence[ImageResponse], contract: Contract) -> bytes:
    """Encode one folder per task, and next to it a COCO JSON file of all images for each of COCO's formats."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        coco: dict[tuple[Task | None, str], list[tuple[int, ResponsePart]]] = {}
        for index, image in enumerate(images):
            for part in image.parts:
                if part.content:
                    _add_to_zip(archive, f"{part.task}/{_file_stem(index)}{part.suffix}", part.content)
                if part.annotations is not None:
                    coco.setdefault((part.task, _COCO_FILES[part.suffix]), []).append((index, part))
        for (task, suffix), parts in coco.items():
            _add_to_zip(archive, f"{task}{suffix}", orjson.dumps(_merge_coco(parts, images, contract)))
        statuses = [_image_status(index, image) for index, image in enumerate(images)]
        _add_to_zip(archive, "results.json", orjson.dumps(statuses))
    return buffer.getvalue()


def _merge_coco(
    parts: Sequence[tuple[int, ResponsePart]], images: Sequence[ImageResponse], contract: Contract
) -> dict[str, Any]:
    """Return COCO's JSON of the parts; image ids start at 1, as the file names do."""
    entries, annotations = [], []
    for index, part in parts:
        height, width = images[index].size
        entries.append({"id": index + 1, "file_name": images[index].name or "", "height": height, "width": width})
        ids: dict[str, Any] = {"image_id": index + 1}
        if part.content:
            ids["file_name"] = f"{_file_stem(index)}{part.suffix}"
        annotations += [each | ids for each in part.annotations or ()]
    return to_coco_dataset(contract, entries, annotations)


def _add_to_zip(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    is_text = name.endswith("json")
    entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED)


def _file_stem(index: int) -> str:
    return f"{index + 1:06}"
