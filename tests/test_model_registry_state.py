"""What is served changes by steps that fit, and each can be taken back."""

import json
from typing import Any

import pytest

from model.errors import RegistryConflict, UsegError
from model.registry.state import MOST_EVENTS, Event, State, Trial, parse_state, write_state


def make_event(version: str = "1") -> Event:
    return Event(at="2026-11-23T04:00:00+00:00", action="activate", version=version, by="alice", reason="why not")


def test_each_activation_remembers_the_one_before() -> None:
    state = State().activate("1").activate("2").activate("3")
    assert (state.active, state.former) == ("3", ("1", "2"))
    back = state.activate("1")
    assert (back.active, back.former) == ("1", ("2", "3"))


def test_a_version_that_is_active_is_asked_for_again() -> None:
    state = State().activate("1").activate("2")
    assert state.activate("2") == state


def test_rollbacks_go_back_one_by_one_and_never_forth() -> None:
    state = State().activate("1").activate("2").activate("3")
    taken, state = state.roll_back()
    assert (taken, state.active, state.former) == ("3", "2", ("1",))
    taken, state = state.roll_back()
    assert (taken, state.active, state.former) == ("2", "1", ())
    with pytest.raises(RegistryConflict, match="no earlier version"):
        state.roll_back()


def test_a_rollback_ends_the_canary_first_then_the_shadow() -> None:
    state = State().activate("1").activate("2")
    state = state.try_out("shadow", Trial(version="3", share=0.1)).try_out("canary", Trial(version="4", share=0.2))
    assert state.used == {"2", "3", "4"}
    taken, state = state.roll_back()
    assert (taken, state.canary, state.active) == ("4", None, "2")
    taken, state = state.roll_back()
    assert (taken, state.shadow, state.active) == ("3", None, "2")
    assert state.roll_back()[0] == "2"


def test_a_canary_that_is_promoted_is_one_no_more() -> None:
    state = State().activate("1").try_out("canary", Trial(version="2", share=1.0)).promote()
    assert (state.active, state.former, state.canary) == ("2", ("1",), None)
    with pytest.raises(RegistryConflict, match="no canary"):
        state.promote()


def test_a_version_has_one_role_at_a_time() -> None:
    state = State().activate("1").try_out("shadow", Trial(version="2", share=0.5))
    state = state.try_out("canary", Trial(version="2", share=0.1))
    assert (state.shadow, state.canary) == (None, Trial(version="2", share=0.1))
    assert state.activate("2").canary is None


@pytest.mark.parametrize("version", ["1", "2"])
def test_what_is_active_or_without_company_cannot_be_tried(version: str) -> None:
    with pytest.raises(RegistryConflict):
        State(active="1" if version == "1" else None).try_out("canary", Trial(version=version, share=0.1))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_lies_above_0_and_is_at_most_1(share: float) -> None:
    with pytest.raises(RegistryConflict, match="share"):
        Trial(version="1", share=share)


def test_the_last_version_there_is_cannot_be_withdrawn() -> None:
    assert State(active="1").withdraw("1").active == "1"
    assert State(active="2", former=("1",)).withdraw("2") == State(active="1")
    assert State(active="2", former=("1",)).withdraw("1") == State(active="2")


def test_the_history_is_bounded_and_every_note_is_a_revision() -> None:
    state = State()
    for number in range(MOST_EVENTS + 5):
        state = state.note(make_event(str(number)))
    assert (len(state.history), state.revision) == (MOST_EVENTS, MOST_EVENTS + 5)
    assert state.history[-1].version == str(MOST_EVENTS + 4)


def test_json_gives_the_state_back() -> None:
    state = State().activate("1").activate("2").try_out("canary", Trial(version="3", share=0.25)).note(make_event("é"))
    assert parse_state(write_state(state)) == state


@pytest.mark.parametrize(
    "changed",
    [
        {"format_version": 2},
        {"actve": "1"},
        {"active": 1},
        {"former": "1"},
        {"revision": "1"},
        {"canary": {"version": "1", "share": 0}},
        {"canary": {"version": "1"}},
        {"shadow": {"version": "1", "share": 0.1, "whim": 1}},
        {"history": [{"at": "now"}]},
        {"history": [{"at": "", "action": "explode", "version": "1", "by": "", "reason": ""}]},
    ],
)
def test_anything_else_is_refused(changed: dict[str, Any]) -> None:
    content = json.loads(write_state(State())) | changed
    with pytest.raises((UsegError, ValueError, KeyError, TypeError)):
        parse_state(json.dumps(content))
