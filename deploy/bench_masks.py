#!/usr/bin/env python3
"""What discovered masks are worth on a labelled set, and what they cost.

    python deploy/bench_masks.py SET --encoder FILE --features DIR [--layout panoptic] [--proposals vote]
        [--tokens keys] [--refinement none|guided|crf] [--most 100] ...

Finds masks in every picture, refines them and scores all of them, overlapping or not, class-agnostic, by pycocotools;
MaskCut's masks score by the order of their finding. Boundary F is taken over true objects and the mask that overlaps
each best, if by 0.5 or more before refinement: the same pairs for every refinement. Features that DIR lacks are
computed and kept there; a vote's views are fitted on the set's own photos. Prints JSON; times are CPU seconds a
photo, without the encoder.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pycocotools import mask as coco
from threadpoolctl import threadpool_limits

from model.contract import Canvas
from model.files import hash_file
from model.network.mask_transformer import STRIDE_PX
from model.pixels import place, read_photo, resize_map
from model.weights.checkpoints import load_encoder
from training.choices import LAYOUTS, PROPOSALS, TOKENS
from training.features import fill_cache, open_cache
from training.labels.clusters.photo_view import PhotoView, open_view
from training.labels.finder import Finder, sample_views
from training.labels.masks.discover import overlap
from training.labels.masks.discovery_recipe import DiscoveryConfig
from training.labels.masks.keys import fill_keys, open_key_cache
from training.labels.masks.proposals import Proposals
from training.labels.masks.refine import refine
from training.photos import PhotoFile, scan_photos
from training.scores.meetings.boundary import measure_boundary
from training.scores.meetings.instances import Described, InstanceScorer
from training.scores.sets.layouts import TruthSet
from training.scores.sets.truth import TrueObject, TruthPicture

T = TypeVar("T")
OBJECT = 1
"""The category of all."""


@dataclass
class Tally:
    """What the pictures so far came to."""

    truth: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    boundaries: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"find": 0.0, "refine": 0.0})

    def time(self, stage: str, work: Callable[[], T]) -> T:
        started = time.process_time()
        result = work()
        self.seconds[stage] += time.process_time() - started
        return result


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    config = DiscoveryConfig(
        **{
            entry.name: value
            for entry in fields(DiscoveryConfig)
            if (value := getattr(options, entry.name, None)) is not None and value != "none"
        }
    )
    truth = TruthSet(folder=options.set, layout=options.layout).read()
    pictures = {picture.path.resolve(): picture for picture in truth.pictures}
    photos = [each for each in scan_photos(options.set / "images").photos if each.path.resolve() in pictures]
    photos = photos[: options.limit]
    with threadpool_limits(1):
        finder, view = open_finder(options, config, photos)
        tally = Tally()
        for photo in photos:
            add(tally, pictures[photo.path.resolve()], view(photo), finder, options)
    described = Described(truth=tally.truth, results=tally.results, sizes=tally.sizes)
    scores = InstanceScorer([described], [OBJECT], "segm").summarise()
    result = {
        "pictures": len(photos),
        "masks_per_photo": round(len(tally.results) / len(photos), 2),
        **{name: None if value is None else round(100.0 * value, 2) for name, value in scores.items()},
        "boundary_f": round(100.0 * float(np.mean(tally.boundaries or [0.0])), 2),
        "boundary_pairs": len(tally.boundaries),
        "cpu_seconds_per_photo": {stage: round(each / len(photos), 4) for stage, each in tally.seconds.items()},
    }
    print(json.dumps(result))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, metavar="SET")
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="panoptic")
    parser.add_argument("--side-px", type=int, default=448)
    parser.add_argument("--proposals", choices=PROPOSALS)
    parser.add_argument("--tokens", choices=TOKENS)
    parser.add_argument("--cuts", type=int)
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--centred", action="store_true", default=None)
    parser.add_argument("--faithful", action="store_true", default=None)
    parser.add_argument("--refinement", choices=("none", "guided", "crf"), default="guided")
    parser.add_argument("--most", type=int, default=100, help="masks of a photo that are refined and scored")
    parser.add_argument("--limit", type=int, help="at most so many photos")
    return parser.parse_args()


def open_finder(
    options: argparse.Namespace, config: DiscoveryConfig, photos: list[PhotoFile]
) -> tuple[Finder, Callable[[PhotoFile], PhotoView]]:
    digest = hash_file(options.encoder)
    encoder = load_encoder(str(options.encoder), options.side_px)
    cache = open_cache(options.features, digest, options.side_px)
    fill_cache(cache, photos, encoder, options.side_px)
    view = partial(open_view, cache, side_px=options.side_px)
    keys = None
    if config.tokens == "keys":
        keys = open_key_cache(options.features, digest, options.side_px)
        fill_keys(keys, photos, encoder, options.side_px)
    views = sample_views(photos, view, encoder, 0) if config.proposals == "vote" else None
    return Finder(config=config, encoder=encoder, keys=keys, views=views), view


def add(tally: Tally, picture: TruthPicture, view: PhotoView, finder: Finder, options: argparse.Namespace) -> None:
    """Find, refine and enlarge the masks of one picture, and note what they and its objects are."""
    photo = view.photo
    found = tally.time("find", lambda: finder.find(view)).keep(options.most, -np.inf)
    square, placement = place(read_photo(photo.path).image, [Canvas.square(options.side_px)], STRIDE_PX)
    height, width = placement.size
    image = np.ascontiguousarray(square[:, :height, :width].transpose(1, 2, 0))
    coarse = enlarge(found, height, width, view.patch_px)
    fine = coarse
    if options.refinement != "none":
        fine = tally.time("refine", lambda: refine(found.soft, image, view.patch_px, options.refinement))
    large, small = ([resize_map(each.astype(np.float32), photo.height, photo.width) > 0.5 for each in stack]
                    for stack in (fine, coarse))  # fmt: skip
    tally.sizes[picture.image_id] = photo.height, photo.width
    for mask, score in zip(large, found.scores, strict=True):
        if mask.any():
            tally.results.append(describe(mask, picture.image_id, score=float(score)))
    for each in picture.annotation.read(photo.height, photo.width).objects:
        if each.rle is not None:
            tally.truth.append(outline(each, picture.image_id))
            if not each.is_crowd:
                tally.boundaries += compare(coco.decode(each.rle).astype(bool), small, large)


def enlarge(found: Proposals, height: int, width: int, patch_px: int) -> np.ndarray:
    """Masks in pixels, refined by nothing."""
    rows, columns = (length * patch_px for length in found.soft.shape[1:])
    masks = [resize_map(soft, rows, columns)[:height, :width] > 0.5 for soft in found.soft]
    return np.array(masks, bool).reshape(len(masks), height, width)


def describe(mask: np.ndarray, image_id: int, **more: float) -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(mask.view(np.uint8)))
    entry = {"image_id": image_id, "category_id": OBJECT, "segmentation": rle, "bbox": coco.toBbox(rle).tolist()}
    return {**entry, "area": float(coco.area(rle)), **more}


def outline(each: TrueObject, image_id: int) -> dict[str, Any]:
    entry = {"image_id": image_id, "category_id": OBJECT, "segmentation": each.rle, "bbox": list(each.bbox)}
    return {**entry, "area": each.area, "iscrowd": int(each.is_crowd)}


def compare(true: np.ndarray, coarse: list[np.ndarray], fine: list[np.ndarray]) -> list[float]:
    """Boundary F of the mask that was closest to the object before refinement, if it was close."""
    overlaps = [overlap(mask, true) for mask in coarse]
    best = int(np.argmax(overlaps)) if overlaps else -1
    return [measure_boundary(fine[best], true)] if best >= 0 and overlaps[best] >= 0.5 else []


if __name__ == "__main__":
    sys.exit(main())
