"""The two COCO files over a store's shards: panoptic, and the masks before they were merged."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from model.files import replace_file
from training.labels.shards import Record


def write_panoptic(path: Path, records: Iterable[Record], thing_clusters: int, stuff_clusters: int) -> None:
    """COCO's panoptic JSON; `records` is gone through twice, and never held."""
    annotations = (
        {"image_id": number, "file_name": record.file_name, "segments_info": record.segments}
        for number, record in enumerate(records, start=1)
    )
    categories = [_name(each, "thing", each) for each in range(1, thing_clusters + 1)]
    categories += [_name(thing_clusters + each, "stuff", each) for each in range(1, stuff_clusters + 1)]
    _write_lists(path, {"images": _list_images(records), "annotations": annotations, "categories": categories})


def write_instances(path: Path, records: Iterable[Record], thing_clusters: int) -> None:
    """COCO's instances JSON; a mask has a score where whatever found it gave one."""
    described = ((number, entry) for number, record in enumerate(records, start=1) for entry in record.instances)
    annotations = ({"id": place, "image_id": number, **entry} for place, (number, entry) in enumerate(described, 1))
    categories = [_name(each, "thing", each) for each in range(1, thing_clusters + 1)]
    _write_lists(path, {"images": _list_images(records), "annotations": annotations, "categories": categories})


def _list_images(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    for number, photo in enumerate((record.photo for record in records), start=1):
        yield {
            "id": number,
            "file_name": photo.name,
            "height": photo.height,
            "width": photo.width,
            "sha256": photo.digest,
        }


def _name(category: int, kind: str, number: int) -> dict[str, Any]:
    name = f"{kind} {number}"
    return {"id": category, "name": name, "supercategory": name, "isthing": int(kind == "thing")}


def _write_lists(path: Path, lists: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """A JSON object of lists, entry by entry: memory does not grow with their length."""
    with replace_file(path) as sibling, sibling.open("w", encoding="utf-8") as stream:
        for opening, (key, entries) in zip(chain("{", repeat(", ")), lists.items(), strict=False):
            stream.write(f'{opening}"{key}": [')
            for comma, entry in zip(chain([""], repeat(", ")), entries, strict=False):
                stream.write(comma + json.dumps(entry))
            stream.write("]")
        stream.write("}")
