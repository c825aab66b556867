"""What runs a network: one protocol for every backend."""

from typing import Literal, Protocol, get_args

import numpy as np
from jaxtyping import Int64, UInt8

from model.raw import Raw

Backend = Literal["cpu", "openvino", "cuda", "tensorrt", "torch"]
"""ONNX Runtime on a CPU, OpenVINO on a CPU, ONNX Runtime with CUDA or with TensorRT; torch on whatever it finds."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)


class Session(Protocol):
    """Something that runs a network."""

    @property
    def backend(self) -> str:
        """What answers now, which need not be what was asked for."""
        ...

    def run(self, pixels: UInt8[np.ndarray, "B 3 H W"], sizes: Int64[np.ndarray, "B 2"]) -> list[Raw]:
        """One answer a picture, in order; each is the same alone and in any batch.

        Pictures of `sizes` (height, width) lie at the top left of their pixels, which are one of the contract's
        canvases.
        """
        ...
