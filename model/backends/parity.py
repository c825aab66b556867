"""Comparison of network outputs across backends, batches and machines."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Float32, Int64, UInt8, UInt16

from model.contract import RawOutputs
from model.errors import ParityError

_MIN_SCORE = 0.05
_PATCH_STEP = 4
"""Distance of the patches whose embeddings are compared, in patches."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Maximum differences of outputs that count as equal; fractions are of what the reference scores above noise."""

    max_score_difference: float = 1e-3
    """Of the same rank, since detections are unordered. Rounding changes scores by less than 1e-5 between torch and
    ONNX Runtime, a wrong graph by far more."""
    max_box_difference_px: float = 0.05
    min_equal_detections: float = 0.98
    """Of the same cluster, score and box. A near tie can be decided differently on another processor."""
    min_equal_pixels: float = 0.999
    """Of the masks of equal detections, and of the semantic map."""
    min_embedding_similarity: float = 0.999
    """Smallest cosine similarity of the embeddings of one patch."""


FP32_TOLERANCE = Tolerance()
EXPORT_TOLERANCE = Tolerance(max_score_difference=0.01)
"""On any photo: a cell of a small mask that crosses a threshold of the mask's stability changes its score by up to 5e-3
(24 images)."""
FP16_TOLERANCE = Tolerance(
    max_score_difference=0.03,
    max_box_difference_px=8.0,
    min_equal_detections=0.9,
    min_equal_pixels=0.99,
    min_embedding_similarity=0.98,
)
"""Measured on ten images: scores within 1.4e-2, 0.959 of the detections and 0.9992 of the pixels equal
(docs/experiments). Scores depend on mask areas, so one pixel moves the score of a small mask far."""
INT8_TOLERANCE = Tolerance(
    max_score_difference=0.02,
    max_box_difference_px=8.0,
    min_equal_detections=0.85,
    min_equal_pixels=0.985,
    min_embedding_similarity=0.8,
)
"""Between processors with VNNI (AVX2 or AVX-512), on two golden images: scores within 9e-3, 0.93 of the detections and
0.9939 of the pixels equal. Without VNNI, sums of int8 products overflow: 0.844 and 0.9737, which is refused."""


@dataclass(frozen=True, kw_only=True)
class DecodedOutputs:
    """Thresholded outputs of a batch, small enough to be stored with a network."""

    scores: Float32[np.ndarray, "B D"]
    clusters: Int64[np.ndarray, "B D"]
    boxes: Float32[np.ndarray, "B D 4"]
    masks: UInt8[np.ndarray, "B D h bytes"]
    """Masks at 0.5, as bits packed along the rows."""
    semantic: UInt16[np.ndarray, "B h w"]
    """Label of the highest logit of each pixel."""
    embeddings: Float16[np.ndarray, "B E rows columns"]
    """Embeddings of every fourth patch of every fourth row; of no patch if the network has none."""


def decode_outputs(outputs: Sequence[RawOutputs]) -> DecodedOutputs:
    """Threshold the outputs of a batch."""
    return DecodedOutputs(
        scores=np.stack([each.scores for each in outputs]),
        clusters=np.stack([each.clusters for each in outputs]),
        boxes=np.stack([each.boxes for each in outputs]),
        masks=np.packbits(np.stack([each.masks > 0.5 for each in outputs]), axis=-1),
        semantic=np.stack([each.semantic.argmax(0) for each in outputs]).astype(np.uint16),
        embeddings=np.stack([_thin_embeddings(each) for each in outputs]),
    )


def require_equal_outputs(
    reference: DecodedOutputs | Sequence[RawOutputs],
    outputs: Sequence[RawOutputs],
    what: str,
    tolerance: Tolerance = FP32_TOLERANCE,
) -> dict[str, float]:
    """Compare outputs for the same images, and return the values that `Tolerance` describes.

    Raises ParityError, with `what` was compared and the values, unless they are within the tolerance; NaN never is.
    """
    reference = reference if isinstance(reference, DecodedOutputs) else decode_outputs(reference)
    values = _compare_outputs(reference, decode_outputs(outputs), tolerance)
    if not (
        values["score_difference"] <= tolerance.max_score_difference
        and values["detections_equal"] >= tolerance.min_equal_detections
        and min(values["masks_equal"], values["semantic_equal"]) >= tolerance.min_equal_pixels
        and values["embedding_similarity"] >= tolerance.min_embedding_similarity
    ):
        listed = ", ".join(f"{name} {value:.5f}" for name, value in values.items())
        raise ParityError(f"{what}: outputs differ ({listed})")
    return values


def _compare_outputs(reference: DecodedOutputs, actual: DecodedOutputs, tolerance: Tolerance) -> dict[str, float]:
    for name, one in vars(reference).items():
        other = getattr(actual, name)
        if one.shape != other.shape:
            raise ParityError(f"outputs of another network: {name} have shapes {one.shape} and {other.shape}")
    ranked, actual_ranked = (np.sort(each.scores, axis=1) for each in (reference, actual))
    pairs = [(image, *pair) for image in range(len(ranked)) for pair in _match(reference, actual, image, tolerance)]
    images, rows, columns = np.array(pairs, np.int64).reshape(-1, 3).T
    flipped = np.unpackbits(reference.masks[images, rows] ^ actual.masks[images, columns])
    count = int((reference.scores >= _MIN_SCORE).sum())
    return {
        "score_difference": float(np.abs(ranked - actual_ranked).max()),
        "detections_equal": len(pairs) / count if count else 1.0,
        "masks_equal": 1.0 - int(flipped.sum()) / max(1, flipped.size),
        "semantic_equal": float((reference.semantic == actual.semantic).mean()),
        "embedding_similarity": _min_cosine(reference.embeddings, actual.embeddings),
    }


def _thin_embeddings(outputs: RawOutputs) -> Float16[np.ndarray, "E rows columns"]:
    if outputs.embeddings is None:
        return np.zeros((0, 0, 0), np.float16)
    return outputs.embeddings[:, ::_PATCH_STEP, ::_PATCH_STEP].astype(np.float16)


def _min_cosine(first: Float16[np.ndarray, "B E r c"], second: Float16[np.ndarray, "B E r c"]) -> float:
    """Return the smallest cosine similarity of two vectors along axis 1; 1 if there are none."""
    one, other = first.astype(np.float32), second.astype(np.float32)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / norms.clip(1e-9)).min(initial=1.0))


def _match(
    reference: DecodedOutputs, actual: DecodedOutputs, image: int, tolerance: Tolerance
) -> list[tuple[int, int]]:
    """Match detections of the reference that score above noise with equal ones, each at most once."""
    scores, actual_scores = reference.scores[image], actual.scores[image]
    is_same = (
        (reference.clusters[image][:, None] == actual.clusters[image])
        & (np.abs(reference.boxes[image][:, None] - actual.boxes[image]).max(-1) <= tolerance.max_box_difference_px)
        & (np.abs(scores[:, None] - actual_scores) <= tolerance.max_score_difference)
    )
    pairs = []
    for row in np.flatnonzero(scores >= _MIN_SCORE):
        if is_same[row].any():
            column = row if is_same[row, row] else int(is_same[row].argmax())
            pairs.append((int(row), int(column)))
            is_same[:, column] = False
    return pairs
