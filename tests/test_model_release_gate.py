"""A network whose answers depend on who runs it, or on its neighbours, does not pass."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from model.backends.onnx_session import OnnxSession
from model.backends.torch_session import TorchSession
from model.contract import Canvas, Contract, read_contract
from model.errors import ParityError
from model.raw import Raw
from model.release.export import draw_scene
from model.release.gate import check_batches, check_parity
from model.run import load_run

SCENES = [draw_scene(seed, Canvas.square(tiny.SIDE_PX)) for seed in range(3)]


class MoodySession:
    """Answers like another session, but for the last picture of a batch."""

    backend = "moody"

    def __init__(self, session: OnnxSession, drift: float) -> None:
        self._session = session
        self._drift = drift

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[Raw]:
        answers = self._session.run(pixels, sizes)
        if len(pixels) > 1:
            answers[-1].scores[0] += self._drift
        return answers


class StuffySession:
    """Answers like another session, but for one semantic cell in a thousand, where the picture is."""

    backend = "stuffy"

    def __init__(self, session: OnnxSession) -> None:
        self._session = session

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[Raw]:
        answers = self._session.run(pixels, sizes)
        for answer in answers:
            answer.semantic[:, 3, 3] = answer.semantic[::-1, 3, 3]
        return answers


@pytest.fixture
def session(tiny_artifact: Path) -> OnnxSession:
    return OnnxSession(tiny_artifact / "network.onnx", threads=1)


@pytest.fixture
def contract(tiny_artifact: Path) -> Contract:
    return read_contract(tiny_artifact)


def test_a_network_that_answers_otherwise_is_found_out(
    session: OnnxSession, contract: Contract, tiny_run: Path
) -> None:
    _, network = load_run(tiny_run)
    for parameter in network.decoder.quality_head.parameters():
        parameter.data += 1.0
    with pytest.raises(ParityError, match="picture 0 on torch and cpu"):
        check_parity(TorchSession(network), session, SCENES, contract)


def test_a_session_equals_itself(session: OnnxSession, contract: Contract) -> None:
    figures = check_parity(session, session, SCENES, contract)
    assert figures == {
        "score_difference": 0.0,
        "detections_equal": 1.0,
        "masks_equal": 1.0,
        "semantic_equal": 1.0,
        "panoptic_equal": 1.0,
    }


def test_one_cell_of_another_label_is_found_out(session: OnnxSession, contract: Contract) -> None:
    # One cell of 14 x 14 is more than the thousandth that may differ.
    with pytest.raises(ParityError, match=r"semantic_equal 0\.99490"):
        check_parity(session, StuffySession(session), SCENES, contract)


def test_an_answer_that_depends_on_its_batch_is_found_out(session: OnnxSession) -> None:
    check_batches(session, SCENES)
    with pytest.raises(ParityError, match="alone and at position 1 in a batch of 2"):
        check_batches(MoodySession(session, drift=0.01), SCENES)
