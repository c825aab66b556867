"""One picture's segments as bytes, in every type that we answer in."""

from dataclasses import dataclass, replace
from typing import Any

import orjson

from model.coco_panoptic import annotate
from model.contract import Contract, Task
from model.encodings import (
    describe,
    describe_features,
    describe_masks,
    encode_arrays,
    encode_cluster_png,
    encode_overlay,
    encode_panoptic_png,
)
from model.panoptic import Segmentation
from model.pixels import Photo
from service.answers.media import Media
from service.requests.options import Options, PartName


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is sent, but for the headers that every answer has."""

    content: bytes
    media: str
    notes: tuple[str, ...] = ()
    """What the caller should know about how the picture was read; plain ASCII."""
    status: int = 200


@dataclass(frozen=True, kw_only=True)
class Found:
    """A picture and what was found in it."""

    photo: Photo
    """In the size of the answer."""
    original_size: tuple[int, int]
    """Height and width of the picture as it came, upright."""
    segmentations: tuple[tuple[Task, Segmentation], ...]
    """One for each task, in the order they were asked for."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of an answer."""

    content: bytes
    media: str
    suffix: str
    task: Task | None
    """None for one that covers them all."""
    annotation: dict[str, Any] | None = None
    """Of a panoptic PNG for a data set, COCO's; the place and name of the file are still to come."""


def encode_parts(found: Found, contract: Contract, options: Options, media: Media) -> tuple[Part, ...]:
    """The files of an answer in a type; one, unless the type is an archive's."""
    if media == "application/json":
        content = orjson.dumps(describe_answer(found, contract))
        return (Part(content=content, media=media, suffix=".json", task=None),)
    names = (_NAMES[media],) if media in _NAMES else options.parts
    return tuple(
        Part(
            content=_write(name, found, task, segmentation, contract),
            media=_TYPES[name][0],
            suffix=_TYPES[name][1],
            task=task,
            annotation=annotate(segmentation, contract, 0, "") if (media, name) == ("application/zip", "png") else None,
        )
        for task, segmentation in found.segmentations
        for name in names
    )


def describe_answer(found: Found, contract: Contract) -> dict[str, Any]:
    """The JSON answer; `service.answers.schemas` documents it, and a test holds the two together."""
    answers = [
        {"task": task, "segments_info": describe(segmentation, contract)} for task, segmentation in found.segmentations
    ]
    head = {"image": _describe_image(found), "model": describe_model(contract)}
    return head | (answers[0] if len(answers) == 1 else {"answers": answers})


def describe_model(contract: Contract) -> dict[str, str]:
    """Who answers."""
    return {"name": contract.name, "version": contract.version}


def list_notes(photo: Photo) -> tuple[str, ...]:
    """What was left out of the picture."""
    return (f"only the first of {photo.frames} frames was segmented",) if photo.frames > 1 else ()


def _describe_image(found: Found) -> dict[str, Any]:
    photo = found.photo
    return {
        "width": photo.width,
        "height": photo.height,
        "original_width": found.original_size[1],
        "original_height": found.original_size[0],
        "frames": photo.frames,
        "frame_used": 0,
        "orientation_applied": photo.orientation != 1,
        "notes": list_notes(photo),
    }


def _write(name: PartName, found: Found, task: Task, segmentation: Segmentation, contract: Contract) -> bytes:
    match name:
        case "json":
            return orjson.dumps(describe_answer(replace(found, segmentations=((task, segmentation),)), contract))
        case "polygons":
            return _write_features(found, task, segmentation, contract)
        case "png":
            return encode_panoptic_png(segmentation.label_map)
        case "clusters":
            return encode_cluster_png(segmentation, contract)
        case "overlay":
            return encode_overlay(found.photo.image, segmentation)
        case "npz":
            return encode_arrays(segmentation, contract)
        case "huggingface":
            return orjson.dumps(describe_masks(segmentation, contract))


def _write_features(found: Found, task: Task, segmentation: Segmentation, contract: Contract) -> bytes:
    collection = {
        "type": "FeatureCollection",
        "image": _describe_image(found),
        "model": describe_model(contract),
        "task": task,
        "features": describe_features(segmentation, contract),
    }
    return orjson.dumps(collection, option=orjson.OPT_SERIALIZE_NUMPY)


_TYPES: dict[PartName, tuple[str, str]] = {
    "json": ("application/json", ".json"),
    "polygons": ("application/geo+json", ".geojson"),
    "png": ("image/png", ".png"),
    "clusters": ('image/png;profile="clusters"', ".clusters.png"),
    "overlay": ("image/jpeg", ".overlay.jpg"),
    "npz": ("application/x-npz", ".npz"),
    "huggingface": ("application/vnd.hf.image-segmentation+json", ".huggingface.json"),
}
"""The type of each part, and how the name of its file ends."""
_NAMES = {media: name for name, (media, _) in _TYPES.items()}
