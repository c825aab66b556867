"""A network's answer before anything is decided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float32, Int64

from model.contract import Contract
from model.errors import ContractMismatch


@dataclass(frozen=True, kw_only=True)
class RawOutputs:
    """The answer for one picture, static in shape, detections in no order."""

    scores: Float32[np.ndarray, "D"]
    clusters: Int64[np.ndarray, "D"]
    """Thing clusters counted from 0."""
    boxes: Float32[np.ndarray, "D 4"]
    """x0, y0, x1, y1 in pixels of the canvas."""
    masks: Float32[np.ndarray, "D h w"]
    """Probabilities at the contract's stride in the picture, or in the cells of each box, as the contract says."""
    semantic: Float32[np.ndarray, "S+1 h w"]
    """Logits; 0 is "things", s is stuff cluster s."""


OUTPUT_NAMES = tuple(entry.name for entry in fields(RawOutputs))
"""The outputs of every network, by name and in order."""


Shape = Sequence[int | None]
"""Lengths of axes without the batch; None takes any."""


def check_shapes(actual: Mapping[str, Shape], contract: Contract) -> None:
    """Raise ContractMismatch if a graph's inputs and outputs, by name, are not what the contract says."""
    given, expected = (
        {name: _label_lengths(shape) for name, shape in each.items()} for each in (actual, io_shapes(contract))
    )
    if given != expected:
        raise ContractMismatch(f"the network has {given}, its contract says {expected}")


def io_shapes(contract: Contract) -> dict[str, Shape]:
    """Every input and output; a length is None where it is the canvas's and there are several."""
    height = width = rows = columns = None
    if len(contract.input_sizes) == 1:
        height, width = contract.input_sizes[0].height_px, contract.input_sizes[0].width_px
        rows, columns = height // contract.stride_px, width // contract.stride_px
    side = contract.box_mask_size
    return {
        "pixels": [3, height, width],
        "sizes": [2],
        "scores": [contract.max_detections],
        "clusters": [contract.max_detections],
        "boxes": [contract.max_detections, 4],
        "masks": [contract.max_detections, *((side, side) if side else (rows, columns))],
        "semantic": [contract.stuff_clusters + 1, rows, columns],
    }


def _label_lengths(shape: Shape) -> list[int | str]:
    return ["any" if length is None else length for length in shape]
