"""Inputs and outputs of a network: raw outputs per image, and the shapes that a contract promises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float32, Int64

from model.contract import Contract
from model.errors import ContractMismatch

Shape = Sequence[int | None]
"""Lengths of the axes after the batch axis; None allows any length."""


@dataclass(frozen=True, kw_only=True)
class RawOutputs:
    """Raw outputs for one image, with static shapes; detections are unordered."""

    scores: Float32[np.ndarray, "D"]
    clusters: Int64[np.ndarray, "D"]
    """Thing clusters, counted from 0."""
    boxes: Float32[np.ndarray, "D 4"]
    """x0, y0, x1, y1 in input pixels."""
    masks: Float32[np.ndarray, "D h w"]
    """Probabilities: over the image at the contract's stride, or inside each box (`Contract.box_mask_size`)."""
    semantic: Float32[np.ndarray, "S+1 h w"]
    """Logits; channel 0 is "things", channel s is stuff cluster s."""
    embeddings: Float32[np.ndarray, "E rows columns"] | None = None
    """Unit vectors of the patches of the input, by which segments get categories; None if the network has none."""


_OUTPUT_NAMES = tuple(entry.name for entry in fields(RawOutputs))


def output_names(embedding_dim: int) -> tuple[str, ...]:
    """Return the names of the outputs of a network, in order."""
    return _OUTPUT_NAMES if embedding_dim else _OUTPUT_NAMES[:-1]


def check_shapes(actual: Mapping[str, Shape], contract: Contract) -> None:
    """Raise ContractMismatch if inputs and outputs of a graph, by name, differ from the contract."""
    given, expected = ({name: list(shape) for name, shape in each.items()} for each in (actual, io_shapes(contract)))
    if given != expected:
        raise ContractMismatch(f"the network has {given}, its contract says {expected}")


def io_shapes(contract: Contract) -> dict[str, Shape]:
    """Return the shapes of all inputs and outputs; with several input sizes, image axes are None."""
    height = width = rows = columns = patch_rows = patch_columns = None
    if len(contract.all_input_sizes) == 1:
        height, width = contract.input_sizes[0].height_px, contract.input_sizes[0].width_px
        rows, columns = height // contract.stride_px, width // contract.stride_px
        patch_rows, patch_columns = (side // contract.embedding_stride_px for side in (height, width))
    side = contract.box_mask_size
    shapes: dict[str, Shape] = {
        "pixels": [3, height, width],
        "sizes": [2],
        "scores": [contract.max_detections],
        "clusters": [contract.max_detections],
        "boxes": [contract.max_detections, 4],
        "masks": [contract.max_detections, *((side, side) if side else (rows, columns))],
        "semantic": [contract.stuff_clusters + 1, rows, columns],
    }
    if contract.embedding_dim:
        shapes["embeddings"] = [contract.embedding_dim, patch_rows, patch_columns]
    return shapes
