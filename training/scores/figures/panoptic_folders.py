"""Two folders of COCO panoptic PNGs held against each other: what panopticapi's `pq_compute` does, but faster."""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int32

from model.errors import LabelStoreError
from training.labels.store import read_label
from training.scores.figures.figures import measure_panoptic
from training.scores.figures.intervals import Interval, stack
from training.scores.figures.scores import PanopticCounts, count_panoptic
from training.scores.meetings.overlap import measure_overlap

_WITHOUT_ALPHA = 0xFFFFFF


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One picture's true and predicted segments, each id with the place of its category."""

    true_png: Path
    true: dict[int, int]
    crowds: frozenset[int]
    predicted_png: Path
    predicted: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """All pictures of two sets in COCO's panoptic format, categories with things first."""

    pairs: tuple[Pair, ...]
    numbers: tuple[int, ...]
    """Category ids of the data set, by place."""
    things: int


def read_pairs(truth: Path, answer: Path) -> Pairs:
    """Two JSON files whose PNGs lie in a folder of the same name beside each.

    Raises LabelStoreError if one is broken, or a picture of the truth has no answer.
    """
    try:
        known, found = (json.loads(path.read_bytes()) for path in (truth, answer))
        things = sorted(each["id"] for each in known["categories"] if each["isthing"])
        numbers = (*things, *sorted(each["id"] for each in known["categories"] if not each["isthing"]))
        places = {number: place for place, number in enumerate(numbers)}
        answers = {each["image_id"]: each for each in found["annotations"]}
        pairs = tuple(
            Pair(
                true_png=truth.with_suffix("") / each["file_name"],
                true=_list_segments(each, places),
                crowds=frozenset(segment["id"] for segment in each["segments_info"] if segment.get("iscrowd")),
                predicted_png=answer.with_suffix("") / answers[each["image_id"]]["file_name"],
                predicted=_list_segments(answers[each["image_id"]], places),
            )
            for each in known["annotations"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelStoreError(f"{truth} and {answer} are no pair in COCO's panoptic format: {error!r}") from error
    return Pairs(pairs=pairs, numbers=numbers, things=len(things))


def count_pairs(pairs: Pairs, *, processes: int) -> PanopticCounts:
    """Panoptic counts of every picture, in order; each process takes every so manieth one."""
    parts = [(pairs.pairs[first::processes], len(pairs.numbers)) for first in range(processes)]
    if processes == 1:
        return stack(_count(parts[0]))
    with ProcessPoolExecutor(processes) as pool:
        counted = list(pool.map(_count, parts))
    return stack([counted[place % processes][place // processes] for place in range(len(pairs.pairs))])


def score_folders(truth: Path, answer: Path, *, processes: int) -> dict[str, Interval]:
    """PQ, SQ and RQ of two folders, with intervals."""
    pairs = read_pairs(truth, answer)
    return measure_panoptic(count_pairs(pairs, processes=processes), pairs.things)


class IdReader:
    """Panoptic PNGs as segment ids, read into memory that is used again.

    Fresh megabytes for every picture would cost a quarter of the time of reading and counting it.
    """

    def __init__(self) -> None:
        self._rgba = np.empty((0, 0, 4), np.uint8)

    def read(self, path: Path) -> Int32[np.ndarray, "H W"]:
        """Valid until the next call. Raises LabelStoreError as `read_label` does."""
        picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED) if path.is_file() else None
        if picture is None or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
            return read_label(path)
        if self._rgba.shape[:2] != picture.shape[:2]:
            self._rgba = np.empty((*picture.shape[:2], 4), np.uint8)
        cv2.cvtColor(picture, cv2.COLOR_BGR2RGBA, dst=self._rgba)
        ids: Int32[np.ndarray, "H W"] = self._rgba.view("<i4")[..., 0]
        np.bitwise_and(ids, _WITHOUT_ALPHA, out=ids)
        return ids


def _count(part: tuple[Sequence[Pair], int]) -> list[PanopticCounts]:
    cv2.setNumThreads(1)  # the processes share the cores already
    pairs, categories = part
    readers = IdReader(), IdReader()
    return [_count_pair(each, categories, *readers) for each in pairs]


def _count_pair(pair: Pair, categories: int, true_reader: IdReader, predicted_reader: IdReader) -> PanopticCounts:
    true_map, predicted_map = true_reader.read(pair.true_png), predicted_reader.read(pair.predicted_png)
    if true_map.shape != predicted_map.shape:
        raise LabelStoreError(f"{pair.predicted_png} has the shape {predicted_map.shape}, its truth {true_map.shape}")
    return count_panoptic(measure_overlap(predicted_map, pair.predicted, true_map, pair.true, pair.crowds), categories)


def _list_segments(annotation: dict[str, Any], places: dict[int, int]) -> dict[int, int]:
    return {each["id"]: places[each["category_id"]] for each in annotation["segments_info"]}
