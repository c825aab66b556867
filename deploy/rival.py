"""Our own way from a photo to panoptic JSON, in pieces that another server can call."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from model.backends.runtime import open_session
from model.panoptic import make_assembler
from model.pixels import Photo, Placement, decode_image, place
from model.raw import Raw
from service.answers.answers import Found, encode_parts, list_notes
from service.answers.archives import Item, compose
from service.requests.options import Options
from service.settings import find_bundled_artifact

Prepared = tuple[Photo, UInt8[np.ndarray, "3 H W"], Placement]


class Chain:
    """The same artifact, decoding and encoding as ours; only what stands around them differs."""

    def __init__(self, artifact: Path | None = None, threads: int = 2) -> None:
        cv2.setNumThreads(1)
        self.contract, self._session = open_session(artifact or find_bundled_artifact(), threads=threads)

    def prepare(self, content: bytes) -> Prepared:
        photo = decode_image(content)
        return photo, *place(photo.image, self.contract.canvases, self.contract.stride_px)

    def run(self, batch: Sequence[Prepared]) -> list[Raw]:
        sizes = np.array([placement.size for _, _, placement in batch])
        return self._session.run(np.stack([pixels for _, pixels, _ in batch]), sizes)

    def finish(self, prepared: Prepared, raw: Raw) -> bytes:
        photo, _, placement = prepared
        options, media = Options(), "application/json"
        answer = make_assembler(raw, placement, self.contract, self.contract.thresholds)("panoptic")
        size = (photo.height, photo.width)
        found = Found(photo=photo, original_size=size, segmentations=(("panoptic", answer),))
        parts = encode_parts(found, self.contract, options, media)
        item = Item(name=None, size=size, parts=parts, notes=list_notes(photo))
        return compose([item], self.contract, media, is_batch=False).content
