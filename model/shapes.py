"""The shapes that a contract promises, and whether a graph has them."""

from collections.abc import Mapping, Sequence

from model.contract import Contract
from model.errors import ContractMismatch

Shape = Sequence[int | None]
"""Lengths of axes without the batch; None takes any."""


def require_shapes(actual: Mapping[str, Shape], contract: Contract) -> None:
    """Raise ContractMismatch if a graph's inputs and outputs, by name, are not what the contract says."""
    given, expected = (
        {name: _name_lengths(shape) for name, shape in each.items()} for each in (actual, list_shapes(contract))
    )
    if given != expected:
        raise ContractMismatch(f"the network has {given}, its contract says {expected}")


def list_shapes(contract: Contract) -> dict[str, Shape]:
    """Every input and output; a length is None where it is the canvas's and there are several."""
    height = width = rows = columns = None
    if len(contract.canvases) == 1:
        height, width = contract.canvases[0].height_px, contract.canvases[0].width_px
        rows, columns = height // contract.stride_px, width // contract.stride_px
    side = contract.box_mask_side
    return {
        "pixels": [3, height, width],
        "sizes": [2],
        "scores": [contract.detections],
        "clusters": [contract.detections],
        "boxes": [contract.detections, 4],
        "masks": [contract.detections, *((side, side) if side else (rows, columns))],
        "semantic": [contract.stuff_clusters + 1, rows, columns],
    }


def _name_lengths(shape: Shape) -> list[int | str]:
    return ["any" if length is None else length for length in shape]
