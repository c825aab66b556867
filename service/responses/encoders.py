"""One picture's segments as bytes, in every type that we answer in."""

import io
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import orjson

from model.contract import Contract, Task
from model.formats.coco import list_coco_categories, to_coco_annotation
from model.formats.encoders import (
    encode_cluster_png,
    encode_overlay,
    encode_panoptic_png,
    to_geojson_features,
    to_hf_masks,
    to_npz,
    to_segments_info,
)
from model.images import DecodedImage
from model.postprocessing.panoptic import Segmentation
from service.requests.parameters import FormatName, SegmentParameters
from service.responses.media_types import MediaType
from service.responses.problems import PROBLEM_MEDIA_TYPE


@dataclass(frozen=True, kw_only=True)
class EncodedResponse:
    """What is sent, but for the headers that every answer has."""

    content: bytes
    media: str
    notes: tuple[str, ...] = ()
    """What the caller should know about how the picture was read; plain ASCII."""
    status: int = 200


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """A picture and what was found in it."""

    photo: DecodedImage
    """In the size of the answer."""
    original_size: tuple[int, int]
    """Height and width of the picture as it came, upright."""
    segmentations: tuple[tuple[Task, Segmentation], ...]
    """One for each task, in the order they were asked for."""


@dataclass(frozen=True, kw_only=True)
class ResponsePart:
    """One file of an answer."""

    content: bytes
    media: str
    suffix: str
    task: Task | None
    """None for one that covers them all."""
    annotation: dict[str, Any] | None = None
    """Of a panoptic PNG for a data set, COCO's; the place and name of the file are still to come."""


def encode_result(
    found: SegmentationResult, contract: Contract, options: SegmentParameters, media: MediaType
) -> tuple[ResponsePart, ...]:
    """The files of an answer in a type; one, unless the type is an archive's."""
    if media == "application/json":
        content = orjson.dumps(result_to_json(found, contract))
        return (ResponsePart(content=content, media=media, suffix=".json", task=None),)
    names = (_FORMAT_OF_MEDIA_TYPE[media],) if media in _FORMAT_OF_MEDIA_TYPE else options.parts
    return tuple(
        ResponsePart(
            content=_encode_format(name, found, task, segmentation, contract),
            media=_FORMATS[name][0],
            suffix=_FORMATS[name][1],
            task=task,
            annotation=to_coco_annotation(segmentation, contract, 0, "")
            if (media, name) == ("application/zip", "png")
            else None,
        )
        for task, segmentation in found.segmentations
        for name in names
    )


def result_to_json(found: SegmentationResult, contract: Contract) -> dict[str, Any]:
    """The JSON answer; `service.responses.schemas` documents it, and a test holds the two together."""
    answers = [
        {"task": task, "segments_info": to_segments_info(segmentation, contract)}
        for task, segmentation in found.segmentations
    ]
    head = {"image": _image_to_json(found), "model": model_to_json(contract)}
    return head | (answers[0] if len(answers) == 1 else {"answers": answers})


def model_to_json(contract: Contract) -> dict[str, str]:
    """Who answers."""
    return {"name": contract.name, "version": contract.version}


def image_warnings(photo: DecodedImage) -> tuple[str, ...]:
    """What was left out of the picture."""
    return (f"only the first of {photo.num_frames} frames was segmented",) if photo.num_frames > 1 else ()


def _image_to_json(found: SegmentationResult) -> dict[str, Any]:
    photo = found.photo
    return {
        "width": photo.width,
        "height": photo.height,
        "original_width": found.original_size[1],
        "original_height": found.original_size[0],
        "frames": photo.num_frames,
        "frame_used": 0,
        "orientation_applied": photo.orientation != 1,
        "notes": image_warnings(photo),
    }


def _encode_format(
    name: FormatName, found: SegmentationResult, task: Task, segmentation: Segmentation, contract: Contract
) -> bytes:
    match name:
        case "json":
            return orjson.dumps(result_to_json(replace(found, segmentations=((task, segmentation),)), contract))
        case "polygons":
            return _encode_geojson(found, task, segmentation, contract)
        case "png":
            return encode_panoptic_png(segmentation.label_map)
        case "clusters":
            return encode_cluster_png(segmentation, contract)
        case "overlay":
            return encode_overlay(found.photo.image, segmentation)
        case "npz":
            return to_npz(segmentation, contract)
        case "huggingface":
            return orjson.dumps(to_hf_masks(segmentation, contract))


def _encode_geojson(found: SegmentationResult, task: Task, segmentation: Segmentation, contract: Contract) -> bytes:
    collection = {
        "type": "FeatureCollection",
        "image": _image_to_json(found),
        "model": model_to_json(contract),
        "task": task,
        "features": to_geojson_features(segmentation, contract),
    }
    return orjson.dumps(collection, option=orjson.OPT_SERIALIZE_NUMPY)


_FORMATS: dict[FormatName, tuple[str, str]] = {
    "json": ("application/json", ".json"),
    "polygons": ("application/geo+json", ".geojson"),
    "png": ("image/png", ".png"),
    "clusters": ('image/png;profile="clusters"', ".clusters.png"),
    "overlay": ("image/jpeg", ".overlay.jpg"),
    "npz": ("application/x-npz", ".npz"),
    "huggingface": ("application/vnd.hf.image-segmentation+json", ".huggingface.json"),
}
"""The type of each part, and how the name of its file ends."""
_FORMAT_OF_MEDIA_TYPE = {media: name for name, (media, _) in _FORMATS.items()}


_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The first that a zip file can name: equal answers are equal bytes."""


@dataclass(frozen=True, kw_only=True)
class ImageResponse:
    """What became of one picture."""

    name: str | None
    """Of the file, as the caller named it."""
    size: tuple[int, int] = (0, 0)
    """Height and width in the answer."""
    parts: tuple[ResponsePart, ...] = ()
    notes: tuple[str, ...] = ()
    problem: dict[str, Any] | None = None
    """Why there is no part."""

    @property
    def status(self) -> int:
        return int(self.problem["status"]) if self.problem else HTTPStatus.OK


def compose_response(
    items: Sequence[ImageResponse], contract: Contract, media: MediaType, *, is_batch: bool
) -> EncodedResponse:
    """The whole answer. A batch tells the status of each picture, and is itself 207 if one of them failed."""
    status = HTTPStatus.MULTI_STATUS if any(item.problem for item in items) else HTTPStatus.OK
    notes = () if is_batch else items[0].notes
    if media == "application/zip":
        return EncodedResponse(content=_encode_zip(items, contract), media=media, notes=notes, status=status)
    if media == "multipart/mixed":
        boundary = uuid.uuid4().hex
        content = _encode_multipart(items, boundary)
        return EncodedResponse(content=content, media=f"{media}; boundary={boundary}", notes=notes, status=status)
    if is_batch:
        return EncodedResponse(content=_encode_batch_json(items, contract), media=media, status=status)
    return EncodedResponse(content=items[0].parts[0].content, media=items[0].parts[0].media, notes=notes)


def _image_status(index: int, item: ImageResponse) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": index, "name": item.name, "status": item.status}
    return entry | ({"problem": item.problem} if item.problem else {})


def _encode_batch_json(items: Sequence[ImageResponse], contract: Contract) -> bytes:
    """The JSON answer to a batch."""
    entries = [
        _image_status(index, item) | ({"answer": orjson.Fragment(item.parts[0].content)} if item.parts else {})
        for index, item in enumerate(items)
    ]
    return orjson.dumps({"model": model_to_json(contract), "items": entries})


def _encode_multipart(items: Sequence[ImageResponse], boundary: str) -> bytes:
    """Parts in the order of the pictures; `X-ImageResponse` tells of which, `X-Status` what became of it."""
    lines: list[bytes] = []
    for index, item in enumerate(items):
        refusal = ResponsePart(
            content=orjson.dumps(item.problem), media=PROBLEM_MEDIA_TYPE, suffix=".problem.json", task=None
        )
        for part in item.parts or (refusal,):
            file_name = f"{_file_stem(index)}{f'-{part.task}' if part.task else ''}{part.suffix}"
            head = (
                f"--{boundary}\r\nContent-Type: {part.media}\r\n"
                f'Content-Disposition: attachment; filename="{file_name}"\r\n'
                f"Content-Length: {len(part.content)}\r\nX-Item: {index}\r\nX-Status: {item.status}\r\n"
                + (f"X-Task: {part.task}\r\n" if part.task else "")
            )
            lines += [head.encode("ascii"), b"\r\n", part.content, b"\r\n"]
    return b"".join([*lines, f"--{boundary}--\r\n".encode("ascii")])


def _encode_zip(items: Sequence[ImageResponse], contract: Contract) -> bytes:
    """A folder for each task; with panoptic PNGs in it, beside it the JSON file that makes it a COCO data set."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, item in enumerate(items):
            for part in item.parts:
                _add_to_zip(archive, f"{part.task}/{_file_stem(index)}{part.suffix}", part.content)
        for task in dict.fromkeys(part.task for item in items for part in item.parts if part.annotation):
            _add_to_zip(archive, f"{task}.json", orjson.dumps(_coco_panoptic_json(items, contract, task)))
        listing = [_image_status(index, item) for index, item in enumerate(items)]
        _add_to_zip(archive, "items.json", orjson.dumps(listing))
    return buffer.getvalue()


def _coco_panoptic_json(items: Sequence[ImageResponse], contract: Contract, task: str | None) -> dict[str, Any]:
    """COCO's panoptic JSON of all pictures; their ids count from 1, as their files do."""
    images, annotations = [], []
    for index, item in enumerate(items):
        for part in item.parts:
            if part.annotation and part.task == task:
                file_name = f"{_file_stem(index)}{part.suffix}"
                annotations.append(part.annotation | {"image_id": index + 1, "file_name": file_name})
                height, width = item.size
                images.append({"id": index + 1, "file_name": item.name or "", "height": height, "width": width})
    info = {"description": f"{contract.name} {contract.version}"}
    return {"info": info, "images": images, "annotations": annotations, "categories": list_coco_categories(contract)}


def _add_to_zip(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    is_text = name.endswith("json")
    entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED)


def _file_stem(index: int) -> str:
    return f"{index + 1:06}"
