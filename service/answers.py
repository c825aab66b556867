"""A segmentation as the bytes and headers of an HTTP answer."""

from dataclasses import dataclass
from typing import Any

import orjson

from model.contract import Contract, Task
from model.encodings import describe, encode_overlay, encode_panoptic_png
from model.panoptic import Segmentation
from model.pixels import Photo
from service.media import Media


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is sent, but for the headers that every answer has."""

    content: bytes
    media: Media
    notes: tuple[str, ...]
    """What the caller should know about how the picture was read; plain ASCII."""


def make_answer(photo: Photo, segmentation: Segmentation, contract: Contract, task: Task, media: Media) -> Answer:
    """The segmentation in the type that was asked for."""
    match media:
        case "application/json":
            content = orjson.dumps(describe_answer(photo, segmentation, contract, task))
        case "image/png":
            content = encode_panoptic_png(segmentation.label_map)
        case "image/jpeg":
            content = encode_overlay(photo.image, segmentation)
    return Answer(content=content, media=media, notes=list_notes(photo))


def describe_answer(photo: Photo, segmentation: Segmentation, contract: Contract, task: Task) -> dict[str, Any]:
    """The JSON answer; `service.schemas.SegmentationAnswer` documents it, and a test holds the two together."""
    return {
        "image": {
            "width": photo.width,
            "height": photo.height,
            "frames": photo.frames,
            "frame_used": 0,
            "orientation_applied": photo.orientation != 1,
            "notes": list_notes(photo),
        },
        "model": {"name": contract.name, "version": contract.version},
        "task": task,
        "segments_info": describe(segmentation, contract),
    }


def list_notes(photo: Photo) -> tuple[str, ...]:
    """What was left out of the picture."""
    return (f"only the first of {photo.frames} frames was segmented",) if photo.frames > 1 else ()
