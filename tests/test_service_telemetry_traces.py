"""A request goes on in its caller's trace, and a broken header begins a new one."""

import re

import pytest

from service.telemetry.tracing import begin_trace

GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_our_span_is_in_the_callers_trace() -> None:
    trace = begin_trace(GIVEN)
    assert (trace.trace_id, trace.parent_id, trace.flags) == (GIVEN[3:35], GIVEN[36:52], "01")
    assert re.fullmatch(f"00-{GIVEN[3:35]}-[0-9a-f]{{16}}-01", trace.render())
    assert trace.span_id != trace.parent_id


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        "ff" + GIVEN[2:],
        GIVEN.upper(),
        GIVEN[:-1],
        GIVEN + "\r\nX: y",
    ],
)
def test_a_trace_begins_here_where_none_is_given(given: str | None) -> None:
    trace = begin_trace(given)
    assert (trace.parent_id, trace.flags) == (None, "00")
    assert begin_trace(given).trace_id != trace.trace_id


def test_a_later_version_is_read_as_far_as_we_know_it() -> None:
    assert begin_trace("01" + GIVEN[2:] + "-more").trace_id == GIVEN[3:35]
