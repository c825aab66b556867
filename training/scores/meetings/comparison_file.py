"""Comparisons on disk: what several processes, or a killed one, leave to whoever scores them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from model.errors import LabelStoreError
from model.files import replace_file
from model.rle import Outline
from training.scores.meetings.answers import Detection
from training.scores.meetings.comparison import Comparison
from training.scores.meetings.overlap import Overlap
from training.scores.sets.truth import TrueObject

GROUP = 16
"""Pictures a file: what a killed run may lose is some seconds of work."""


def write_comparisons(path: Path, comparisons: Sequence[Comparison]) -> None:
    """As JSON, numbers to their last digit."""
    with replace_file(path) as sibling:
        sibling.write_text(json.dumps([_describe(each) for each in comparisons]), encoding="ascii")


def read_comparisons(path: Path) -> tuple[Comparison, ...]:
    """Raises LabelStoreError if the file is missing or is not what was written."""
    try:
        return tuple(_parse(each) for each in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabelStoreError(f"{path} holds no comparisons ({error}): delete it and rerun") from error


@dataclass(frozen=True, kw_only=True)
class StoredComparisons(Sequence[Comparison]):
    """Comparisons in files of GROUP each, the last of fewer; no more than one file's are in memory at a time."""

    files: Sequence[Path]
    places: range
    _held: dict[Path, tuple[Comparison, ...]] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Comparison]:
        return (self._read(place) for place in self.places)

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredComparisons": ...
    def __getitem__(self, index: int | slice) -> "Comparison | StoredComparisons":
        if isinstance(index, slice):
            return StoredComparisons(files=self.files, places=self.places[index])
        return self._read(self.places[index])

    def _read(self, place: int) -> Comparison:
        path = self.files[place // GROUP]
        if path not in self._held:
            self._held.clear()
            self._held[path] = read_comparisons(path)
        return self._held[path][place % GROUP]


def _describe(comparison: Comparison) -> dict[str, Any]:
    return {
        **vars(comparison),
        **{name: _describe_overlap(getattr(comparison, name)) for name in ("panoptic", "semantic")},
        "objects": [{**vars(each), "rle": _describe_rle(each.rle)} for each in comparison.objects],
        "detections": [asdict(each) for each in comparison.detections],
    }


def _parse(content: dict[str, Any]) -> Comparison:
    overlaps = {name: _parse_overlap(content[name]) for name in ("panoptic", "semantic")}
    objects = tuple(TrueObject(**{**each, "bbox": tuple(each["bbox"])}) for each in content["objects"])
    detections = tuple(
        Detection(**{**each, "outline": _parse_outline(each["outline"])}) for each in content["detections"]
    )
    known = {"size": tuple(content["size"]), **overlaps, "objects": objects, "detections": detections}
    return Comparison(**{**content, **known})


def _describe_overlap(overlap: Overlap | None) -> dict[str, Any] | None:
    return None if overlap is None else {name: array.tolist() for name, array in vars(overlap).items()}


def _parse_overlap(content: dict[str, Any] | None) -> Overlap | None:
    if content is None:
        return None
    counts = {name: np.array(content[name], np.int64) for name in ("pixels", "predicted", "true")}
    return Overlap(**counts, is_crowd=np.array(content["is_crowd"], bool))


def _describe_rle(rle: dict[str, Any] | None) -> dict[str, Any] | None:
    """pycocotools writes text as bytes, and reads either."""
    counts = rle and rle["counts"]
    return rle and {**rle, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _parse_outline(content: dict[str, Any]) -> Outline:
    return Outline(**{**content, "size": tuple(content["size"]), "bbox": tuple(content["bbox"])})
