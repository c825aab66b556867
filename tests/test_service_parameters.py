"""Options are read strictly, and a wrong one is answered with what was meant."""

import asyncio
from typing import Any

import httpx
import pytest
from fake_service import CONTRACT, draw_halves, open_client, post, save
from live_service import GatedSession
from starlette.datastructures import QueryParams
from starlette.requests import Request

from model.contract import Thresholds
from model.errors import InvalidParameter
from service.requests.context import RequestContext, parse_request_context
from service.requests.parameters import SegmentParameters, parse_parameters


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("", SegmentParameters(tasks=("panoptic",), threshold=None)),
        ("task=semantic", SegmentParameters(tasks=("semantic",))),
        ("task=semantic,panoptic&task=semantic", SegmentParameters(tasks=("semantic", "panoptic"))),
        ("subtask=instance", SegmentParameters(tasks=("instance",))),
        ("threshold=0.25&task=instance", SegmentParameters(tasks=("instance",), threshold=0.25)),
        ("threshold=0", SegmentParameters(threshold=0.0)),
        ("threshold=1.0", SegmentParameters(threshold=1.0)),
        ("mask_threshold=0.7&min_stuff_area=0.1", SegmentParameters(mask_threshold=0.7, min_stuff_area=0.1)),
        ("overlap_mask_area_threshold=0.8", SegmentParameters(overlap_mask_area_threshold=0.8)),
        ("classes=tomato,3&classes=brick wall", SegmentParameters(classes=("tomato", "3", "brick wall"))),
        ("max_side=640&agnostic_nms=true", SegmentParameters(max_side=640, agnostic_nms=True)),
        ("parts=npz,overlay", SegmentParameters(parts=("npz", "overlay"))),
    ],
)
def test_known_options_are_read(query: str, options: SegmentParameters) -> None:
    assert parse_parameters(QueryParams(query)) == options


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("tasks=semantic", "unknown query parameter 'tasks', did you mean 'task'"),
        ("colour=red", "known are task, threshold, mask_threshold"),
        ("task=panoptik", "did you mean 'panoptic'. known are panoptic, instance, semantic"),
        ("task=", "unknown task ''"),
        ("task=,instance", "empty entry"),
        ("task=instance&subtask=semantic", "given twice, once under its other name"),
        ("threshold=0.1&threshold=0.2", "2 times"),
        ("threshold=1.1", "in 0..1, got '1.1'"),
        ("threshold=-0.1", "in 0..1"),
        ("threshold=nan", "in 0..1"),
        ("threshold=", "in 0..1"),
        ("threshold=1e-1", "in 0..1"),
        ("mask_threshold=2", "mask_threshold must be a decimal number in 0..1"),
        ("max_side=31", "whole number in 32..65500, got '31'"),
        ("max_side=99999", "in 32..65500"),
        ("max_side=64.0", "whole number"),
        ("agnostic_nms=yes", "true or false, got 'yes'"),
        ("classes=", "empty entry"),
        ("model=", "a name of 1 to 64 characters"),
        ("model=a&model=b", "2 times"),
        ("parts=pgn", "unknown part 'pgn', did you mean 'png'"),
    ],
)
def test_a_wrong_option_is_refused_with_what_would_be_right(query: str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        parse_parameters(QueryParams(query))


def test_parameters_of_a_body_join_those_of_the_query_in_their_own_types() -> None:
    body: dict[str, Any] = {"threshold": 0.25, "max_side": 64, "agnostic_nms": True, "classes": ["tomato", 3]}
    assert parse_parameters(QueryParams("task=instance"), body) == SegmentParameters(
        tasks=("instance",), threshold=0.25, max_side=64, agnostic_nms=True, classes=("tomato", "3")
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"task": "semantic"}, "unknown task|given twice|2 times"),
        ({"threshold": True}, "in 0..1, got True"),
        ({"threshold": float("nan")}, "in 0..1, got nan"),
        ({"max_side": 64.0}, "whole number"),
        ({"agnostic_nms": 1}, "true or false, got 1"),
        ({"mask_threshold": None}, "got None"),
        ({"classes": []}, "1 to 1000 entries, got 0"),
        ({"parts": [{}]}, "unknown part"),
    ],
)
def test_a_wrong_parameter_in_a_body_is_refused(body: dict[str, Any], words: str) -> None:
    query = QueryParams("subtask=instance")
    with pytest.raises(InvalidParameter, match=words):
        parse_parameters(query, body)


def test_thresholds_of_the_contract_stay_where_none_is_asked_for() -> None:
    contracts = Thresholds(score_threshold=0.4, min_component_area_fraction=0.2)
    assert SegmentParameters().adjust(contracts) == contracts
    chosen = SegmentParameters(
        threshold=0.1, mask_threshold=0.6, overlap_mask_area_threshold=0.75, min_stuff_area=0.0, agnostic_nms=True
    )
    expected = Thresholds(
        score_threshold=0.1,
        mask_threshold=0.6,
        overlap_threshold=0.25,
        min_stuff_area_fraction=0.0,
        duplicate_iou_threshold=0.5,
        min_component_area_fraction=0.2,
    )
    assert chosen.adjust(contracts) == expected


def test_classes_are_found_by_cluster_number_or_by_category_name() -> None:
    assert SegmentParameters().find_clusters(CONTRACT) is None
    assert SegmentParameters(classes=("tomato", "3")).find_clusters(CONTRACT) == {1, 3}
    with pytest.raises(InvalidParameter, match="unknown class 'tomatoe', did you mean 'tomato'"):
        SegmentParameters(classes=("tomatoe",)).find_clusters(CONTRACT)
    with pytest.raises(InvalidParameter, match=r"clusters are 1\.\.3"):
        SegmentParameters(classes=("4",)).find_clusters(CONTRACT)


HALVES = save(draw_halves())
pytestmark = pytest.mark.anyio


def read(headers: dict[str, str], limit_s: float = 30.0) -> tuple[RequestContext, float]:
    """The claim, and the seconds it has."""
    raw = [(name.lower().encode(), text.encode()) for name, text in headers.items()]
    scope = {"type": "http", "headers": raw, "state": {"owner": "alice"}}
    claim = parse_request_context(Request(scope), limit_s)
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
    with pytest.raises(InvalidParameter, match=name):
        read({name: text})


async def test_a_priority_out_of_range_is_invalid() -> None:
    with pytest.raises(InvalidParameter, match="1 \\(first\\) to 3, got 4"):
        read({"X-Request-Priority": "4"})


async def test_an_answer_after_the_callers_own_deadline_is_504() -> None:
    session = GatedSession()
    async with open_client(session.open) as client:
        answer: httpx.Response = await post(client, HALVES, headers={"X-Request-Timeout-Ms": "50"})
        session.gate.set()
        assert (answer.status_code, answer.json()["type"]) == (504, "urn:useg:problem:deadline-passed")
