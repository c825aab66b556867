"""A model is warmed up before it is ready, and its backend may change while it serves."""

import threading

import numpy as np
import pytest
from fake_service import CONTRACT, RedSession, open_client

from model.backends.session import AutoSession, HotSwapSession, Session
from model.contract import Contract
from model.network_io import RawOutputs

pytestmark = pytest.mark.anyio
WAIT_S = 10.0


class BlueSession(RedSession):
    backend = "faster"


def open_handover(is_allowed: threading.Event, opened: list[HotSwapSession]) -> tuple[Contract, Session]:
    def build() -> Session:
        assert is_allowed.wait(WAIT_S)
        return BlueSession()

    opened.append(HotSwapSession(RedSession(), build))
    return CONTRACT, opened[0]


async def test_metrics_name_the_current_backend() -> None:
    is_allowed = threading.Event()
    opened: list[HotSwapSession] = []
    async with open_client(lambda: open_handover(is_allowed, opened)) as client:
        assert 'useg_model_info{backend="fake"' in (await client.get("/metrics")).text
        is_allowed.set()
        opened[0].wait_ready(WAIT_S)
        text = (await client.get("/metrics")).text
        assert 'useg_model_info{backend="faster"' in text
        assert 'backend="fake"' not in text


async def test_a_session_that_is_still_loading_when_the_server_stops_is_dropped() -> None:
    is_allowed = threading.Event()
    opened: list[HotSwapSession] = []
    async with open_client(lambda: open_handover(is_allowed, opened)):
        pass
    opened[0].wait_ready(WAIT_S)  # closed: returns although no session was made
    is_allowed.set()
    for thread in threading.enumerate():
        if thread.name == "handover":
            thread.join(WAIT_S)
    assert opened[0].backend == "fake"
    assert len(opened[0].run(np.zeros((1, 3, 56, 56), np.uint8), np.array([[56, 56]]))) == 1


async def test_the_smallest_and_the_largest_batch_run_before_the_server_is_ready() -> None:
    counts: list[int] = []

    class CountingSession(RedSession):
        def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
            counts.append(len(pixels))
            return super().run(pixels, sizes)

    async with open_client(lambda: (CONTRACT, CountingSession()), max_batch_size=6):
        assert counts == [1, 6]
    counts.clear()
    async with open_client(lambda: (CONTRACT, CountingSession()), max_batch_size=6, max_batch_pixels=2 * 56 * 56 + 1):
        assert counts == [1, 2]


async def test_the_chosen_backend_and_the_skipped_ones_are_reported() -> None:
    chosen = AutoSession(session=BlueSession(), skipped_backends={"cuda": "no GPU"})
    async with open_client(lambda: (CONTRACT, chosen)) as client:
        (version,) = (await client.get("/v1/models")).json()["models"][0]["versions"]
        assert (version["backend"], version["skipped_backends"]) == ("faster", {"cuda": "no GPU"})
        parameters = (await client.get(f"/v2/models/{CONTRACT.name}/config")).json()["parameters"]
        assert {name: each["string_value"] for name, each in parameters.items()} == {
            "backend": "faster",
            "skipped_backends.cuda": "no GPU",
        }
        metrics = (await client.get("/metrics")).text
        assert 'useg_skipped_backend_info{backend="cuda",model="fake",reason="no GPU",version="1+test"} 1.0' in metrics
