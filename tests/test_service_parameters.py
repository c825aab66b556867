"""Parameters are validated strictly, and an invalid one is reported with what is expected."""

import asyncio
from dataclasses import replace

import pytest
from fake_service import CONTRACT, CountingSession, draw_halves, open_client, post, save
from fastapi.exceptions import RequestValidationError
from live_service import GatedSession

from model.contract import Contract, Thresholds
from model.embeddings import Category
from model.errors import InvalidParameter
from model.postprocessing.panoptic import Segment
from service.requests import SegmentOptions

HALVES = save(draw_halves())
pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("tasks=semantic", "unknown parameter 'tasks', did you mean 'task'"),
        ("xyz=red", "known are task, subtask, threshold, mask_threshold"),
        ("task=panoptik", "should be 'panoptic', 'instance' or 'semantic'"),
        ("task=instance&subtask=semantic", "'subtask' stands for 'task'"),
        ("threshold=1.1", "threshold: Input should be less than or equal to 1"),
        ("threshold=nan", "finite number"),
        ("longest_edge=31", "longest_edge: Input should be greater than or equal to 32"),
        ("longest_edge=64.5", "valid integer"),
        ("agnostic_nms=maybe", "valid boolean"),
        ("classes=", "at least 1 character"),
        ("overlap_threshold=0.5&overlap_mask_area_threshold=0.5", "stands for 'overlap_threshold'"),
        ("classes=potato", "unknown class 'potato'"),
        ("formats=pgn", "should be 'json', 'geojson', 'png'"),
    ],
)
async def test_an_invalid_query_parameter_is_reported(query: str, message: str) -> None:
    async with open_client() as client:
        response = await client.post(f"/v1/segment?{query}", files={"file": ("a.png", HALVES)})
    assert (response.status_code, response.json()["type"]) == (422, "urn:useg:problem:invalid-parameter")
    assert message in response.json()["detail"]


def test_options_of_a_body_are_merged_with_those_of_the_query() -> None:
    query = SegmentOptions(threshold=0.25)
    body = SegmentOptions.model_validate({"task": "instance", "classes": ["tomato", 3]})
    assert query.merge(body) == SegmentOptions(threshold=0.25, task=("instance",), classes=("tomato", "3"))
    with pytest.raises(InvalidParameter, match="'threshold' is set in the query and in the body"):
        query.merge(SegmentOptions(threshold=0.1))
    with pytest.raises(RequestValidationError):
        body.merge(SegmentOptions(subtask="semantic"))


def test_the_models_thresholds_apply_unless_the_request_sets_them() -> None:
    thresholds = Thresholds(score_threshold=0.4, min_component_area_fraction=0.2)
    assert SegmentOptions().override(thresholds) == thresholds
    options = SegmentOptions(
        threshold=0.1,
        mask_threshold=0.6,
        overlap_threshold=0.25,
        min_stuff_area_fraction=0.0,
        agnostic_nms=True,
    )
    given = {"score_threshold": 0.1, "mask_threshold": 0.6, "overlap_threshold": 0.25, "min_stuff_area_fraction": 0.0}
    assert options.override(thresholds) == replace(thresholds, **given, duplicate_iou_threshold=0.5)
    assert SegmentOptions(overlap_mask_area_threshold=0.75).override(thresholds).overlap_threshold == 0.25


def select_clusters(options: SegmentOptions, contract: Contract) -> set[int]:
    """Return the clusters whose segments are selected, if each has the category of its cluster."""
    is_selected = options.select_classes(contract)
    assert is_selected
    segments = [
        Segment(id=1, cluster=cluster, is_thing=True, score=1.0, category=contract.categories.get(cluster))
        for cluster in range(1, contract.thing_clusters + contract.stuff_clusters + 1)
    ]
    return {segment.cluster for segment in segments if is_selected(segment)}


def test_classes_are_cluster_ids_or_category_names() -> None:
    assert SegmentOptions().select_classes(CONTRACT) is None
    assert select_clusters(SegmentOptions(classes=("tomato", "3")), CONTRACT) == {1, 3}
    names = {1: "salt, pepper", 2: "\"the\" 'dog'", 3: "1"}  # a name comes before a cluster id
    named = replace(CONTRACT, categories={each: Category(id=each, name=name) for each, name in names.items()})
    for cluster, name in names.items():
        options = SegmentOptions.model_validate({"classes": f" {name}"})
        assert select_clusters(options, named) == ({1, 3} if name == "1" else {cluster})
    assert select_clusters(SegmentOptions(classes=("salt, pepper", "2,1")), named) == {1, 2, 3}
    with pytest.raises(InvalidParameter, match="unknown class 'tomatoe', did you mean 'tomato'"):
        SegmentOptions(classes=("tomatoe",)).select_classes(CONTRACT)
    with pytest.raises(InvalidParameter, match=r"cluster id 1\.\.3"):
        SegmentOptions(classes=("4",)).select_classes(CONTRACT)


async def test_an_invalid_header_is_reported_by_its_name() -> None:
    invalid = {"X-Request-Timeout-Ms": ("0", "soon", "4000000000"), "X-Request-Priority": ("0", "4", "1.5")}
    async with open_client() as client:
        for name, value in ((name, value) for name, values in invalid.items() for value in values):
            response = await post(client, HALVES, headers={name: value})
            assert (response.status_code, response.json()["detail"].partition(":")[0]) == (422, name)


async def test_a_client_may_shorten_the_timeout_but_not_extend_it() -> None:
    session = GatedSession()
    async with open_client(session.open, request_timeout_s=0.2) as client:
        for timeout_ms in ("50", "900000"):
            started = asyncio.get_running_loop().time()
            response = await post(client, HALVES, headers={"X-Request-Timeout-Ms": timeout_ms})
            assert (response.status_code, response.json()["type"]) == (504, "urn:useg:problem:deadline-exceeded")
            assert asyncio.get_running_loop().time() - started < 10.0
        session.gate.set()


async def test_windows_of_high_detail_go_through_the_queue() -> None:
    session = CountingSession()
    async with open_client(lambda _: (CONTRACT, session), max_queue_size=3) as client:
        photo = save(draw_halves())  # 56x28 px fill the width: two windows beside the whole image
        session.counts.clear()
        standard, high, low = [
            await post(client, photo, params={"detail": detail}) for detail in ("standard", "high", "low")
        ]
        assert session.counts == [1, 1, 1, 1]
        assert high.json()["segments_info"] == standard.json()["segments_info"]
        assert "infer;dur=" in high.headers["server-timing"]
        assert low.status_code == 422
        assert "no detail 'low': send 'standard' or 'high'" in low.json()["detail"]
    async with open_client(max_queue_size=2) as client:
        assert (await post(client, photo, params={"detail": "high"})).status_code == 503
