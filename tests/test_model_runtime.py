"""A session that does not give its artifact's golden answers is refused."""

from pathlib import Path

import numpy as np
import pytest

from model.errors import ArtifactError, ParityError
from model.parity import SCORE_TOLERANCE
from model.raw import Raw
from model.runtime import check_golden, write_golden

PIXELS = np.zeros((2, 3, 8, 8), np.uint8)


class FixedSession:
    """Gives one answer for every picture."""

    backend = "fixed"

    def __init__(self, answer: Raw) -> None:
        self.answer = answer

    def run(self, pixels: np.ndarray) -> list[Raw]:
        return [self.answer] * len(pixels)


def draw_answer(score: float = 0.9, cluster: int = 1, mask: float = 0.8, weak_mask: float = 0.2) -> Raw:
    """One sure detection and one far below any threshold."""
    masks = np.zeros((2, 8, 8), np.float32)
    masks[0, :4], masks[1] = mask, weak_mask
    semantic = np.zeros((3, 8, 8), np.float32)
    semantic[2, :, 4:] = 1.0
    return Raw(
        scores=np.array([score, 0.01], np.float32),
        clusters=np.array([cluster, 0]),
        boxes=np.zeros((2, 4), np.float32),
        masks=masks,
        semantic=semantic,
    )


@pytest.fixture
def golden_file(tmp_path: Path) -> Path:
    """The golden answers of `draw_answer()`."""
    path = tmp_path / "golden.npz"
    write_golden(FixedSession(draw_answer()), PIXELS, path)
    return path


def test_a_session_that_gives_the_golden_answers_passes(golden_file: Path) -> None:
    check_golden(FixedSession(draw_answer()), golden_file)


def test_a_score_within_the_tolerance_passes(golden_file: Path) -> None:
    check_golden(FixedSession(draw_answer(score=0.9 + 0.9 * SCORE_TOLERANCE)), golden_file)


def test_masks_of_weak_detections_may_differ(golden_file: Path) -> None:
    check_golden(FixedSession(draw_answer(weak_mask=0.9)), golden_file)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (draw_answer(score=0.9 + 1.5 * SCORE_TOLERANCE), "score_difference 0.0015"),
        (draw_answer(score=np.nan), "score_difference nan"),
        (draw_answer(cluster=2), r"clusters_equal 0\.00000"),
        (draw_answer(mask=0.3), "masks_equal 0.5"),
    ],
    ids=["score", "no number", "cluster", "mask"],
)
def test_another_answer_is_refused_with_what_differs(golden_file: Path, answer: Raw, said: str) -> None:
    with pytest.raises(ParityError, match=said):
        check_golden(FixedSession(answer), golden_file)


def test_golden_answers_of_another_network_are_refused(golden_file: Path) -> None:
    with np.load(golden_file) as stored:
        arrays = dict(stored)
    np.savez(golden_file, allow_pickle=False, **{**arrays, "scores": np.zeros((2, 5))})
    with pytest.raises(ParityError, match="another network"):
        check_golden(FixedSession(draw_answer()), golden_file)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_a_file_without_golden_answers_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="holds no golden answers"):
        check_golden(FixedSession(draw_answer()), path)
