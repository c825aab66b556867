"""Options are read strictly, and a wrong one is answered with what was meant."""

import pytest
from starlette.datastructures import QueryParams

from model.errors import OptionInvalid
from service.options import Options, read_options


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("", Options(task="panoptic", threshold=None)),
        ("task=semantic", Options(task="semantic")),
        ("threshold=0.25&task=instance", Options(task="instance", threshold=0.25)),
        ("threshold=0", Options(threshold=0.0)),
        ("threshold=1.0", Options(threshold=1.0)),
    ],
)
def test_known_options_are_read(query: str, options: Options) -> None:
    assert read_options(QueryParams(query)) == options


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("tasks=semantic", "unknown query parameter 'tasks', did you mean 'task'"),
        ("colour=red", "known are task, threshold"),
        ("task=panoptik", "did you mean 'panoptic'. known are panoptic, instance, semantic"),
        ("task=", "unknown task ''"),
        ("task=instance&task=semantic", "2 times"),
        ("threshold=1.1", "in 0..1, got '1.1'"),
        ("threshold=-0.1", "in 0..1"),
        ("threshold=nan", "in 0..1"),
        ("threshold=", "in 0..1"),
        ("threshold=1e-1", "in 0..1"),
    ],
)
def test_a_wrong_option_is_refused_with_what_would_be_right(query: str, words: str) -> None:
    with pytest.raises(OptionInvalid, match=words):
        read_options(QueryParams(query))
