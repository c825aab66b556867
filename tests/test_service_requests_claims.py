"""Requests may hurry: a time limit and a priority come in headers."""

import asyncio

import httpx
import pytest
from fake_service import draw_halves, open_client, post, save
from live_service import GatedSession
from starlette.requests import Request

from model.errors import OptionInvalid
from service.engine.queue import Claim
from service.requests.claims import read_claim

HALVES = save(draw_halves())
pytestmark = pytest.mark.anyio


def read(headers: dict[str, str], limit_s: float = 30.0) -> tuple[Claim, float]:
    """The claim, and the seconds it has."""
    raw = [(name.lower().encode(), text.encode()) for name, text in headers.items()]
    scope = {"type": "http", "headers": raw, "state": {"owner": "alice"}}
    claim = read_claim(Request(scope), limit_s)
    return claim, claim.deadline - asyncio.get_running_loop().time()


async def test_without_headers_it_is_the_services_limit_and_an_ordinary_picture() -> None:
    claim, left_s = read({})
    assert (claim.owner, claim.priority) == ("alice", 2)
    assert left_s == pytest.approx(30.0, abs=1.0)  # the clock runs on between the two readings


async def test_a_caller_may_shorten_its_time_and_not_lengthen_it() -> None:
    assert read({"X-Request-Timeout-Ms": "2000"})[1] == pytest.approx(2.0, abs=0.5)
    assert read({"X-Request-Timeout-Ms": "900000"})[1] == pytest.approx(30.0, abs=1.0)
    assert read({"X-Request-Priority": "1"})[0].priority == 1


@pytest.mark.parametrize("name", ["X-Request-Timeout-Ms", "X-Request-Priority"])
@pytest.mark.parametrize("text", ["0", "-1", "1.5", "soon", "", "4000000000"])
async def test_what_is_no_number_in_range_is_invalid(name: str, text: str) -> None:
    with pytest.raises(OptionInvalid, match=name):
        read({name: text})


async def test_a_priority_out_of_range_is_invalid() -> None:
    with pytest.raises(OptionInvalid, match="1 \\(first\\) to 3, got 4"):
        read({"X-Request-Priority": "4"})


async def test_an_answer_after_the_callers_own_deadline_is_504() -> None:
    session = GatedSession()
    async with open_client(session.open) as client:
        answer: httpx.Response = await post(client, HALVES, headers={"X-Request-Timeout-Ms": "50"})
        session.gate.set()
        assert (answer.status_code, answer.json()["type"]) == (504, "urn:useg:problem:deadline-passed")
