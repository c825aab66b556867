"""Our own way from a photo to panoptic JSON, in pieces that another server can call."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from model.backends.loader import load_session
from model.images import DecodedImage, Letterbox, decode_image, letterbox_image
from model.network_io import RawOutputs
from model.postprocessing.panoptic import make_postprocessor
from service.inference.pipeline import SegmentationResult
from service.requests import SegmentOptions
from service.responses.encoders import (
    ImageResponse,
    compose_response,
    encode_result,
    image_warnings,
)
from service.settings import find_bundled_artifact

Prepared = tuple[DecodedImage, UInt8[np.ndarray, "3 H W"], Letterbox]


class Chain:
    """The same artifact, decoding and encoding as ours; only what stands around them differs."""

    def __init__(self, artifact: Path | None = None, threads: int = 2) -> None:
        cv2.setNumThreads(1)
        self.contract, self._session = load_session(artifact or find_bundled_artifact(), threads=threads)

    def prepare(self, content: bytes) -> Prepared:
        photo = decode_image(content)
        return photo, *letterbox_image(photo.image, self.contract.input_sizes, self.contract.stride_px)

    def run(self, batch: Sequence[Prepared]) -> list[RawOutputs]:
        sizes = np.array([placement.size for _, _, placement in batch])
        return self._session.run(np.stack([pixels for _, pixels, _ in batch]), sizes)

    def finish(self, prepared: Prepared, raw: RawOutputs) -> bytes:
        photo, _, placement = prepared
        options = SegmentOptions()
        answer = make_postprocessor(raw, placement, self.contract, self.contract.thresholds)("panoptic")
        size = (photo.height, photo.width)
        found = SegmentationResult(image=photo, original_size=size, segmentations=(("panoptic", answer),))
        parts = encode_result(found, self.contract, options, "application/json")
        item = ImageResponse(name=None, size=size, parts=parts, warnings=image_warnings(photo))
        return compose_response([item], self.contract, "application/json", is_batch=False).content
