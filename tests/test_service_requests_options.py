"""Options are read strictly, and a wrong one is answered with what was meant."""

from typing import Any

import pytest
from fake_service import CONTRACT
from starlette.datastructures import QueryParams

from model.contract import Thresholds
from model.errors import OptionInvalid
from service.requests.options import Options, read_options


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("", Options(tasks=("panoptic",), threshold=None)),
        ("task=semantic", Options(tasks=("semantic",))),
        ("task=semantic,panoptic&task=semantic", Options(tasks=("semantic", "panoptic"))),
        ("subtask=instance", Options(tasks=("instance",))),
        ("threshold=0.25&task=instance", Options(tasks=("instance",), threshold=0.25)),
        ("threshold=0", Options(threshold=0.0)),
        ("threshold=1.0", Options(threshold=1.0)),
        ("mask_threshold=0.7&min_stuff_area=0.1", Options(mask_threshold=0.7, min_stuff_area=0.1)),
        ("overlap_mask_area_threshold=0.8", Options(overlap_mask_area_threshold=0.8)),
        ("classes=tomato,3&classes=brick wall", Options(classes=("tomato", "3", "brick wall"))),
        ("max_side=640&agnostic_nms=true", Options(max_side=640, agnostic_nms=True)),
        ("parts=npz,overlay", Options(parts=("npz", "overlay"))),
    ],
)
def test_known_options_are_read(query: str, options: Options) -> None:
    assert read_options(QueryParams(query)) == options


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
    with pytest.raises(OptionInvalid, match=words):
        read_options(QueryParams(query))


def test_parameters_of_a_body_join_those_of_the_query_in_their_own_types() -> None:
    body: dict[str, Any] = {"threshold": 0.25, "max_side": 64, "agnostic_nms": True, "classes": ["tomato", 3]}
    assert read_options(QueryParams("task=instance"), body) == Options(
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
    with pytest.raises(OptionInvalid, match=words):
        read_options(query, body)


def test_thresholds_of_the_contract_stay_where_none_is_asked_for() -> None:
    contracts = Thresholds(score=0.4, part=0.2)
    assert Options().adjust(contracts) == contracts
    chosen = Options(
        threshold=0.1, mask_threshold=0.6, overlap_mask_area_threshold=0.75, min_stuff_area=0.0, agnostic_nms=True
    )
    expected = Thresholds(score=0.1, mask=0.6, overlap=0.25, stuff_area=0.0, duplicate=0.5, part=0.2)
    assert chosen.adjust(contracts) == expected


def test_classes_are_found_by_cluster_number_or_by_category_name() -> None:
    assert Options().find_clusters(CONTRACT) is None
    assert Options(classes=("tomato", "3")).find_clusters(CONTRACT) == {1, 3}
    with pytest.raises(OptionInvalid, match="unknown class 'tomatoe', did you mean 'tomato'"):
        Options(classes=("tomatoe",)).find_clusters(CONTRACT)
    with pytest.raises(OptionInvalid, match=r"clusters are 1\.\.3"):
        Options(classes=("4",)).find_clusters(CONTRACT)
