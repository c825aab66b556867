"""Several files in one answer: pictures, tasks and formats, each picture with a status of its own."""

import io
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson

from model.coco_panoptic import list_categories
from model.contract import Contract
from service.answers.answers import Answer, Part, describe_model
from service.answers.errors import PROBLEM_MEDIA
from service.answers.media import Media

_MOMENT = (1980, 1, 1, 0, 0, 0)
"""The first that a zip file can name: equal answers are equal bytes."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """What became of one picture."""

    name: str | None
    """Of the file, as the caller named it."""
    size: tuple[int, int] = (0, 0)
    """Height and width in the answer."""
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()
    problem: dict[str, Any] | None = None
    """Why there is no part."""

    @property
    def status(self) -> int:
        return int(self.problem["status"]) if self.problem else HTTPStatus.OK


def compose(items: Sequence[Item], contract: Contract, media: Media, *, is_batch: bool) -> Answer:
    """The whole answer. A batch tells the status of each picture, and is itself 207 if one of them failed."""
    status = HTTPStatus.MULTI_STATUS if any(item.problem for item in items) else HTTPStatus.OK
    notes = () if is_batch else items[0].notes
    if media == "application/zip":
        return Answer(content=_zip(items, contract), media=media, notes=notes, status=status)
    if media == "multipart/mixed":
        boundary = uuid.uuid4().hex
        content = _mix(items, boundary)
        return Answer(content=content, media=f"{media}; boundary={boundary}", notes=notes, status=status)
    if is_batch:
        return Answer(content=_list_items(items, contract), media=media, status=status)
    return Answer(content=items[0].parts[0].content, media=items[0].parts[0].media, notes=notes)


def _describe_item(index: int, item: Item) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": index, "name": item.name, "status": item.status}
    return entry | ({"problem": item.problem} if item.problem else {})


def _list_items(items: Sequence[Item], contract: Contract) -> bytes:
    """The JSON answer to a batch."""
    entries = [
        _describe_item(index, item) | ({"answer": orjson.Fragment(item.parts[0].content)} if item.parts else {})
        for index, item in enumerate(items)
    ]
    return orjson.dumps({"model": describe_model(contract), "items": entries})


def _mix(items: Sequence[Item], boundary: str) -> bytes:
    """Parts in the order of the pictures; `X-Item` tells of which, `X-Status` what became of it."""
    lines: list[bytes] = []
    for index, item in enumerate(items):
        refusal = Part(content=orjson.dumps(item.problem), media=PROBLEM_MEDIA, suffix=".problem.json", task=None)
        for part in item.parts or (refusal,):
            file_name = f"{_number(index)}{f'-{part.task}' if part.task else ''}{part.suffix}"
            head = (
                f"--{boundary}\r\nContent-Type: {part.media}\r\n"
                f'Content-Disposition: attachment; filename="{file_name}"\r\n'
                f"Content-Length: {len(part.content)}\r\nX-Item: {index}\r\nX-Status: {item.status}\r\n"
                + (f"X-Task: {part.task}\r\n" if part.task else "")
            )
            lines += [head.encode("ascii"), b"\r\n", part.content, b"\r\n"]
    return b"".join([*lines, f"--{boundary}--\r\n".encode("ascii")])


def _zip(items: Sequence[Item], contract: Contract) -> bytes:
    """A folder for each task; with panoptic PNGs in it, beside it the JSON file that makes it a COCO data set."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, item in enumerate(items):
            for part in item.parts:
                _add(archive, f"{part.task}/{_number(index)}{part.suffix}", part.content)
        for task in dict.fromkeys(part.task for item in items for part in item.parts if part.annotation):
            _add(archive, f"{task}.json", orjson.dumps(_collect(items, contract, task)))
        listing = [_describe_item(index, item) for index, item in enumerate(items)]
        _add(archive, "items.json", orjson.dumps(listing))
    return buffer.getvalue()


def _collect(items: Sequence[Item], contract: Contract, task: str | None) -> dict[str, Any]:
    """COCO's panoptic JSON of all pictures; their ids count from 1, as their files do."""
    images, annotations = [], []
    for index, item in enumerate(items):
        for part in item.parts:
            if part.annotation and part.task == task:
                file_name = f"{_number(index)}{part.suffix}"
                annotations.append(part.annotation | {"image_id": index + 1, "file_name": file_name})
                height, width = item.size
                images.append({"id": index + 1, "file_name": item.name or "", "height": height, "width": width})
    info = {"description": f"{contract.name} {contract.version}"}
    return {"info": info, "images": images, "annotations": annotations, "categories": list_categories(contract)}


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    is_text = name.endswith("json")
    entry = zipfile.ZipInfo(name, _MOMENT)
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED)


def _number(index: int) -> str:
    return f"{index + 1:06}"
