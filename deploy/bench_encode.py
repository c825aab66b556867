#!/usr/bin/env python3
"""What a picture costs around the network: decoding, placing, assembling, encoding.

    OMP_NUM_THREADS=1 python deploy/bench_encode.py [PHOTO] [--rounds 15] [--width 1920] [--height 1280]

Without a photo, draws one with the detail of a photo (noise at all scales). The network's raw answer is drawn, too: 36
soft ellipses and 12 kinds of stuff at a quarter of 448 px. Everything runs on one thread; prints JSON with the least
CPU milliseconds of each stage, and their sums for the answers in JSON and as panoptic PNG.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from model.contract import Canvas, Contract, Thresholds
from model.panoptic import assemble
from model.pixels import decode_image, place
from model.raw import Raw
from service.answers.answers import Found, encode_parts
from service.answers.media import Media
from service.requests.options import Options

T = TypeVar("T")
MEDIA: tuple[Media, ...] = (
    "application/json",
    "image/png",
    "image/jpeg",
    "application/geo+json",
    'image/png;profile="clusters"',
    "application/x-npz",
    "application/vnd.hf.image-segmentation+json",
)
THINGS, STUFF = 36, 12
SIDE_PX, STRIDE_PX = 448, 4
CELLS = SIDE_PX // STRIDE_PX
CONTRACT = Contract(
    name="bench",
    version="1",
    network="none",
    canvases=(Canvas.square(SIDE_PX),),
    stride_px=STRIDE_PX,
    detections=2 * THINGS,
    thing_clusters=64,
    stuff_clusters=27,
    thresholds=Thresholds(score=0.35, part=0.25),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--height", type=int, default=1280)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    content = options.photo.read_bytes() if options.photo else draw_photo(options.height, options.width)
    print(json.dumps(measure(content, options.rounds)))
    return 0


def measure(content: bytes, rounds: int) -> dict[str, object]:
    """Milliseconds of each stage and of both ways through them."""
    photo, decoding = time_least(lambda: decode_image(content), rounds)
    (_, placement), placing = time_least(lambda: place(photo.image, CONTRACT.canvases, STRIDE_PX), rounds)
    raw = draw_raw()
    found, assembling = time_least(
        lambda: assemble(raw, placement, CONTRACT, "panoptic", CONTRACT.thresholds), rounds
    )  # fmt: skip
    stages = {"decode": decoding, "place": placing, "assemble": assembling}
    encodings = {}
    sizes = {}
    answer = Found(photo=photo, original_size=(photo.height, photo.width), segmentations=(("panoptic", found),))
    for media in MEDIA:
        encode = partial(encode_parts, answer, CONTRACT, Options(), media)
        (part,), encodings[media] = time_least(encode, rounds if media in MEDIA[:2] else 3)
        sizes[media] = len(part.content)
    around = decoding + assembling
    return {
        "pixels": photo.width * photo.height,
        "segments": len(found.segments),
        "stages_ms": {name: round(each, 1) for name, each in stages.items()},
        "encode_ms": {name: round(each, 1) for name, each in encodings.items()},
        "bytes": sizes,
        "decode_assemble_encode_ms": {name: round(around + each, 1) for name, each in encodings.items()},
    }


def time_least(work: Callable[[], T], rounds: int) -> tuple[T, float]:
    """What the work returns, and its least CPU milliseconds."""
    least = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        result = work()
        least = min(least, time.process_time() - started)
    return result, least * 1000


def draw_photo(height: int, width: int) -> bytes:
    """A JPEG with about as much detail as a photo: 0.27 bytes a pixel at quality 90."""
    generator = np.random.default_rng(7)
    picture = np.full((height, width, 3), 128.0, np.float32)
    for octave in range(2, 10):
        cells = generator.normal(0.0, 26.0, (height >> (9 - octave), width >> (9 - octave), 3)).astype(np.float32)
        picture += cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC) / octave**0.75
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def draw_raw() -> Raw:
    """Soft ellipses of a few sizes, as many again below the score threshold, and smooth stuff."""
    generator = np.random.default_rng(11)
    rows, columns = np.mgrid[:CELLS, :CELLS].astype(np.float32)
    masks = []
    for _ in range(2 * THINGS):
        top, left = generator.uniform(0, 75), generator.uniform(0, CELLS)
        height, width = generator.uniform(4, 13, 2)
        distance = ((rows - top) / height) ** 2 + ((columns - left) / width) ** 2
        wobble = cv2.resize(generator.normal(0.0, 0.25, (12, 12)).astype(np.float32), (CELLS, CELLS))
        masks.append(1.0 / (1.0 + np.exp(6.0 * (distance + wobble - 1.0))))
    fields = generator.normal(0.0, 1.0, (STUFF, 5, 7)).astype(np.float32)
    stuff = np.stack([cv2.resize(each, (CELLS, CELLS), interpolation=cv2.INTER_CUBIC) for each in fields])
    rest = np.full((27 - STUFF, CELLS, CELLS), -9.0, np.float32)
    things = np.full((1, CELLS, CELLS), -2.0, np.float32)
    return Raw(
        scores=np.concatenate([generator.uniform(0.4, 1.0, THINGS), generator.uniform(0.0, 0.3, THINGS)]).astype(
            np.float32
        ),
        clusters=generator.integers(0, 64, 2 * THINGS),
        boxes=np.zeros((2 * THINGS, 4), np.float32),
        masks=np.stack(masks).astype(np.float32),
        semantic=np.concatenate([things, 4.0 * stuff, rest]),
    )


if __name__ == "__main__":
    sys.exit(main())
