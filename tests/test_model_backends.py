"""Every backend that this machine has gives the same answers; those it lacks are skipped, and say what they need."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from model.backends.handover import HandoverSession
from model.backends.parity import FP32, Tolerance, compare, decide
from model.backends.runtime import open_session
from model.backends.session import BACKENDS, Backend, Session
from model.contract import Contract
from model.errors import BackendUnavailable
from model.raw import Raw
from model.release.export import draw_scene
from model.release.gate import Picture, stack

ARTIFACTS = ("tiny_artifact", pytest.param("tiny_cascade_artifact", marks=pytest.mark.slow))
EVERYWHERE = ("cpu", "torch")
"""Backends that no machine of ours may lack."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An artifact on a backend, its golden answers checked; beside it, what the CPU says."""

    artifact: Path
    contract: Contract
    session: Session
    reference: Session

    @property
    def tolerance(self) -> Tolerance:
        return getattr(self.session, "tolerance", FP32)

    def require_equal(self, expected: list[Raw], given: list[Raw], what: str) -> None:
        compare(decide(expected), decide(given), self.tolerance).require(what, self.tolerance)


@pytest.fixture(scope="module", params=ARTIFACTS)
def artifact(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module", params=BACKENDS)
def opened(request: pytest.FixtureRequest, artifact: Path) -> Opened:
    backend: Backend = request.param
    try:
        contract, session = open_session(artifact, backend=backend, threads=1)
    except BackendUnavailable as error:
        if backend in EVERYWHERE:
            raise
        pytest.skip(str(error))
    if isinstance(session, HandoverSession):
        session.settle()
    assert session.backend.split(" ")[0] == backend
    return Opened(artifact=artifact, contract=contract, session=session, reference=open_session(artifact, threads=1)[1])


def draw(contract: Contract, count: int) -> list[Picture]:
    """Scenes on the first canvas, the last one narrower than it."""
    scenes = [draw_scene(20 + seed, contract.canvases[0]) for seed in range(count)]
    height, width = scenes[-1].size
    return [*scenes[:-1], Picture(pixels=scenes[-1].pixels, size=(height, width - 8))]


def test_answers_are_those_of_the_cpu_on_every_canvas(opened: Opened) -> None:
    for canvas in opened.contract.canvases:
        scene = stack([draw_scene(11, canvas)])
        given = opened.session.run(*scene)
        assert given[0].masks.dtype == given[0].semantic.dtype == given[0].boxes.dtype == np.float32
        opened.require_equal(opened.reference.run(*scene), given, f"{canvas} on {opened.session.backend}")


def test_three_pictures_together_are_answered_as_each_alone(opened: Opened) -> None:
    pictures = draw(opened.contract, 3)
    together = opened.session.run(*stack(pictures))
    alone = [opened.session.run(*stack([picture]))[0] for picture in pictures]
    assert len(together) == 3
    opened.require_equal(alone, together, "together and alone")


def test_canvases_may_take_turns(opened: Opened) -> None:
    scenes = [stack([draw_scene(3, canvas)]) for canvas in opened.contract.canvases]
    first = [opened.session.run(*scene)[0] for scene in scenes]
    again = [opened.session.run(*scene)[0] for scene in scenes]
    for one, other in zip(first, again, strict=True):
        opened.require_equal([one], [other], "the same picture, later")


def test_answers_outlive_the_next_run(opened: Opened) -> None:
    scene, other = (stack([draw_scene(seed, opened.contract.canvases[0])]) for seed in (1, 2))
    answer = opened.session.run(*scene)[0]
    kept = {name: value.copy() for name, value in vars(answer).items()}
    opened.session.run(*other)
    assert {name: np.array_equal(value, kept[name]) for name, value in vars(answer).items()} == dict.fromkeys(
        kept, True
    )
