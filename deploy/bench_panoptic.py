#!/usr/bin/env python3
"""How fast panoptic quality is counted, against the published algorithm in one process.

    python deploy/bench_panoptic.py TRUTH.json PNG_FOLDER [--pairs 5000] [--processes 2] [--baseline 200]

Takes labelled pictures in COCO's panoptic format, makes an answer to each by moving its segments a little, writes
pairs until there are enough, and times reading and counting them all. The baseline is the algorithm of panopticapi's
evaluation.py, written anew after its description: sort all pairs of ids of a picture, then look at each; it runs on
the first `--baseline` pairs. Both must agree to 1e-9. Prints JSON; on a machine that is busy with other things, only
its CPU times say something, and `times_faster_on_free_cores`, which comes from them.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from model.encodings import encode_panoptic_png
from training.labels.store import read_label
from training.scores.figures.figures import measure_panoptic
from training.scores.figures.intervals import weigh
from training.scores.figures.panoptic_folders import Pair, Pairs, count_pairs, read_pairs
from training.scores.figures.scores import score_panoptic

SHIFT_PX = 7
T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--baseline", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        truth, answer = write_sets(options.truth, options.folder, Path(scratch), options.pairs)
        pairs, reading = measure(lambda: read_pairs(truth, answer))
        counts, counting = measure(lambda: count_pairs(pairs, processes=options.processes))
        _, drawing = measure(lambda: measure_panoptic(counts, pairs.things))
        first = pairs.pairs[: options.baseline]
        expected, published = measure(lambda: score_as_published(first, len(pairs.numbers), truth))
        few = Pairs(pairs=first, numbers=pairs.numbers, things=pairs.things)
        found, alone = measure(lambda: count_pairs(few, processes=1))
    figures = score_panoptic(weigh(found, np.ones(len(first))))
    assert abs(float(figures["pq"]) - expected) < 1e-9, (figures, expected)
    few_share = len(first) / len(pairs.pairs)
    result = {
        "pairs": len(pairs.pairs),
        "processes": options.processes,
        "wall_s": round(reading.wall_s + counting.wall_s + drawing.wall_s, 2),
        "wall_s_of_the_intervals": round(drawing.wall_s, 2),
        "ms_per_pair": {
            "wall": per_pair(counting.wall_s, len(pairs.pairs)),
            "cpu": per_pair(counting.cpu_s, len(pairs.pairs)),
            "wall_in_one_process": per_pair(alone.wall_s, len(first)),
            "wall_of_the_published_algorithm": per_pair(published.wall_s, len(first)),
            "cpu_of_the_published_algorithm": per_pair(published.cpu_s, len(first)),
        },
        "times_faster": round(published.wall_s / few_share / counting.wall_s, 2),
        "times_faster_on_free_cores": round(published.cpu_s / few_share / counting.cpu_s * options.processes, 2),
        "pq_of_the_first": round(100 * expected, 9),
    }
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


def per_pair(seconds: float, pairs: int) -> float:
    return round(1000 * seconds / pairs, 2)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one piece of work."""

    wall_s: float
    cpu_s: float
    """Of all processes: what a busy machine does not change."""


def measure(work: Callable[[], T]) -> tuple[T, Cost]:
    """The result and its cost."""
    before, started = os.times(), time.perf_counter()
    result = work()
    after, wall_s = os.times(), time.perf_counter() - started
    return result, Cost(wall_s=wall_s, cpu_s=sum(after[:4]) - sum(before[:4]))


def write_sets(truth: Path, folder: Path, scratch: Path, count: int) -> tuple[Path, Path]:
    """The labelled pictures over and over, and an answer to each; every pair has files of its own."""
    content = json.loads(truth.read_bytes())
    annotations = content["annotations"]
    for side in ("truth", "answer"):
        (scratch / side).mkdir()
    numbered = []
    for number in range(count):
        annotation = annotations[number % len(annotations)]
        name = f"{number}.png"
        original = (folder / annotation["file_name"]).read_bytes()
        (scratch / "truth" / name).write_bytes(original)
        if number < len(annotations):
            moved = np.roll(read_label(folder / annotation["file_name"]), SHIFT_PX, axis=(0, 1))
            (scratch / "answer" / name).write_bytes(encode_panoptic_png(moved))
        else:
            (scratch / "answer" / name).write_bytes(
                (scratch / "answer" / f"{number % len(annotations)}.png").read_bytes()
            )
        numbered.append({**annotation, "image_id": number, "file_name": name})
    for side in ("truth", "answer"):
        (scratch / f"{side}.json").write_text(json.dumps({**content, "annotations": numbered}))
    return scratch / "truth.json", scratch / "answer.json"


def score_as_published(pairs: tuple[Pair, ...], categories: int, truth: Path) -> float:
    """PQ over all categories, the way panopticapi counts: one picture after the other, ids paired by sorting.

    The areas of true segments are the file's, as there.
    """
    annotations = json.loads(truth.read_bytes())["annotations"]
    known = {each["file_name"]: {s["id"]: s["area"] for s in each["segments_info"]} for each in annotations}
    iou = np.zeros(categories)
    matched, wrong, missed = (np.zeros(categories) for _ in range(3))
    for pair in pairs:
        true_map, predicted_map = read_ids(pair.true_png), read_ids(pair.predicted_png)
        areas = dict(zip(*np.unique(predicted_map, return_counts=True), strict=True))
        joint = true_map.astype(np.uint64) * 16_777_216 + predicted_map.astype(np.uint64)
        shared: dict[tuple[int, int], int] = defaultdict(int)
        for value, count in zip(*np.unique(joint, return_counts=True), strict=True):
            shared[int(value) // 16_777_216, int(value) % 16_777_216] = int(count)
        found, met = set(), set()
        for (true, predicted), count in shared.items():
            if true not in pair.true or predicted not in pair.predicted or true in pair.crowds:
                continue
            if pair.true[true] != pair.predicted[predicted]:
                continue
            ratio = count / (areas[predicted] + known[pair.true_png.name][true] - count - shared.get((0, predicted), 0))
            if ratio > 0.5:
                iou[pair.true[true]] += ratio
                matched[pair.true[true]] += 1
                found.add(true)
                met.add(predicted)
        crowds = {pair.true[each]: each for each in pair.crowds}
        for true, category in pair.true.items():
            missed[category] += true not in found and true not in pair.crowds
        for predicted, category in pair.predicted.items():
            if predicted not in met:
                excused = shared.get((0, predicted), 0) + shared.get((crowds.get(category, -1), predicted), 0)
                wrong[category] += not excused / areas[predicted] > 0.5
    weight = matched + wrong / 2 + missed / 2
    return float((iou[weight > 0] / weight[weight > 0]).mean())


def read_ids(path: Path) -> np.ndarray:
    """R + 256 G + 65536 B, read with Pillow as there."""
    with Image.open(path) as picture:
        rgb = np.array(picture, dtype=np.uint32)
    ids: np.ndarray = rgb[:, :, 0] + 256 * rgb[:, :, 1] + 65_536 * rgb[:, :, 2]
    return ids


if __name__ == "__main__":
    sys.exit(main())
