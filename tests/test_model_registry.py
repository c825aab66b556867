"""The registry on disk, and the deployment of a model."""

import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_registry import NAME, make_registry, write_artifact

from model.contract import NETWORK_FILE, read_contract
from model.errors import ArtifactError, ConfigError, ModelNotFound, RegistryConflict, RegistryError
from model.registry.category_names import edit_names, names_path, read_names
from model.registry.versions import MAX_EVENTS, DeploymentEvent, DeploymentState, Registry, TrafficSplit


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return make_registry(tmp_path, {"1": "good", "2": "good"})


def test_an_added_version_is_a_complete_copy(tmp_path: Path, registry: Registry) -> None:
    shutil.rmtree(tmp_path / "artifact-1")
    assert (registry.list_models(), registry.list_versions(NAME)) == ((NAME,), ("1", "2"))
    contract = read_contract(registry.find_version(NAME, "1"))
    assert (contract.name, contract.version) == (NAME, "1")
    assert registry.read_state(NAME).active is None


def test_the_names_of_an_artifact_are_added_with_it(tmp_path: Path, registry: Registry) -> None:
    artifact = tmp_path / "artifact-1"
    names = edit_names(names_path(artifact), read_contract(artifact), lambda old: old.rename({1: "pepper"}, "ann"))
    contract = registry.add(artifact, version="3", author="test")
    assert read_names(names_path(registry.folder / NAME / "3"), contract) == names


def test_versions_never_change(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(RegistryConflict, match="give another version"):
        registry.add(tmp_path / "artifact-1", author="test")


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "1.names.json", "deployment.json", "a b", "ü", "x" * 65])
def test_names_that_are_not_plain_file_names_are_rejected(tmp_path: Path, registry: Registry, name: str) -> None:
    with pytest.raises(ConfigError, match="has letters, digits"):
        registry.add(tmp_path / "artifact-1", model=name or " ", version="9", author="test")
    with pytest.raises(ConfigError, match="has letters, digits"):
        registry.add(tmp_path / "artifact-1", version=name or " ", author="test")
    with pytest.raises(ModelNotFound):
        registry.find_version(NAME, name)
    with pytest.raises(ModelNotFound):
        registry.read_state(name)


def test_a_damaged_artifact_is_neither_added_nor_activated(tmp_path: Path, registry: Registry) -> None:
    broken = write_artifact(tmp_path / "broken", "3")
    (broken / NETWORK_FILE).write_bytes(b"goo")
    (registry.find_version(NAME, "2") / NETWORK_FILE).write_bytes(b"")
    for change in (lambda: registry.add(broken, author="test"), lambda: registry.activate(NAME, "2", author="test")):
        with pytest.raises(ArtifactError, match="was changed"):
            change()
    assert (registry.list_versions(NAME), registry.read_state(NAME).active) == (("1", "2"), None)
    assert [each.name for each in (registry.folder / NAME).iterdir() if each.is_dir()] in (["1", "2"], ["2", "1"])


def test_changes_are_recorded_with_author_and_reason(registry: Registry) -> None:
    registry.activate(NAME, "1", author="alice", reason="the first")
    registry.deploy_as(NAME, "canary", "2", 0.25, author="bob")
    state = registry.promote(NAME, author="bob", reason="good masks")
    assert state == Registry(registry.folder).read_state(NAME)
    assert (state.active, state.previous_versions, state.revision) == ("2", ("1",), 5)
    recorded = [(event.action, event.version, event.author, event.reason) for event in state.history[2:]]
    assert recorded == [
        ("activate", "1", "alice", "the first"),
        ("canary", "2", "bob", "traffic fraction 0.25"),
        ("promote", "2", "bob", "good masks"),
    ]
    assert state.history[-1].timestamp.endswith("+00:00")
    state = registry.roll_back(NAME, author="alice", reason="no")
    assert (state.active, state.history[-1].action, state.history[-1].version) == ("1", "rollback", "2")


def test_a_version_in_use_is_not_removed(registry: Registry) -> None:
    registry.activate(NAME, "1", author="test")
    with pytest.raises(RegistryConflict, match="cannot be removed"):
        registry.remove(NAME, "1", author="test")
    registry.activate(NAME, "2", author="test")
    state = registry.remove(NAME, "1", author="test")
    assert (registry.list_versions(NAME), state.previous_versions) == (("2",), ())
    with pytest.raises(RegistryConflict, match="no previous version"):
        registry.roll_back(NAME, author="test")


def test_a_version_is_quarantined_once_and_only_from_its_role(registry: Registry) -> None:
    registry.activate(NAME, "1", author="test")
    registry.activate(NAME, "2", author="test")
    state = registry.quarantine(NAME, "2", "rollback", author="service", reason="drift")
    assert (state.active, state.history[-1].reason) == ("1", "drift")
    assert registry.quarantine(NAME, "2", "rollback", author="service", reason="drift") == state
    rejected = registry.quarantine(NAME, "1", "reject", author="service", reason="wrong")  # no previous version
    assert (rejected.active, rejected.revision) == ("1", state.revision + 1)
    assert registry.quarantine(NAME, "1", "reject", author="another", reason="wrong") == rejected


def test_concurrent_changes_are_all_made(registry: Registry) -> None:
    registry.activate(NAME, "1", author="test")
    before = registry.read_state(NAME).revision

    with ThreadPoolExecutor(4) as threads:
        changes = [threads.submit(registry.deploy_as, NAME, "canary", "2", 0.5, author="test") for _ in range(20)]
    assert [change.exception() for change in changes] == [None] * 20
    assert registry.read_state(NAME).revision == before + 20


@pytest.mark.parametrize(
    "changed",
    [
        {"format_version": 1},
        {"actve": "1"},
        {"revision": "1"},
        {"canary": {"version": "1", "traffic_fraction": 0}},
        {"shadow": {"version": "1", "traffic_fraction": 0.1, "whim": 1}},
        {"history": [{"timestamp": "", "action": "explode", "version": "1", "author": "", "reason": ""}]},
        None,
    ],
)
def test_an_invalid_state_is_an_error_and_stays_unchanged(registry: Registry, changed: dict[str, Any] | None) -> None:
    path = registry.folder / NAME / "deployment.json"
    text = json.dumps(json.loads(path.read_text()) | changed) if changed else "{"
    path.write_text(text)
    with pytest.raises(RegistryError, match=r"deployment\.json is not a valid"):
        registry.activate(NAME, "1", author="test")
    assert path.read_text() == text


def test_unknown_models_and_versions_are_reported_with_known_ones(registry: Registry) -> None:
    with pytest.raises(ModelNotFound, match="no model 'none': there is fake"):
        registry.promote("none", author="test")
    assert registry.list_models() == (NAME,)
    with pytest.raises(ModelNotFound, match="no version '3': there is 1, 2"):
        registry.activate(NAME, "3", author="test")
    with pytest.raises(RegistryError, match="is not a registry"):
        Registry(registry.folder / "none").list_models()


ADD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from model.registry import versions as registry

def copy_half_and_die(source, target):
    Path(target).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

registry.shutil.copyfile = copy_half_and_die
registry.Registry(Path(sys.argv[1])).add(Path(sys.argv[2]), version="3", author="test")
"""


def test_a_killed_add_leaves_the_registry_unchanged(tmp_path: Path, registry: Registry) -> None:
    command = [sys.executable, "-c", ADD_AND_DIE, str(registry.folder), str(tmp_path / "artifact-1")]
    assert (
        subprocess.run(command, timeout=60, check=False, cwd=Path(__file__).parent.parent).returncode == -signal.SIGKILL
    )
    left = [each.name for each in (registry.folder / NAME).iterdir() if each.is_dir() and each.name.startswith(".")]
    assert len(left) == 1
    assert (registry.list_versions(NAME), registry.read_state(NAME).revision) == (("1", "2"), 2)
    registry.add(tmp_path / "artifact-1", version="3", author="test")
    assert registry.list_versions(NAME) == ("1", "2", "3")
    assert not any(each.is_dir() and each.name.startswith(".") for each in (registry.folder / NAME).iterdir())


def test_an_activation_remembers_the_previous_versions_and_rollbacks_go_back_one_by_one() -> None:
    state = DeploymentState().activate("1").activate("2").activate("3")
    assert (state.active, state.previous_versions) == ("3", ("1", "2"))
    assert state.activate("3") == state
    assert state.activate("1") == DeploymentState(active="1", previous_versions=("2", "3"))
    for version, active, previous in (("3", "2", ("1",)), ("2", "1", ())):
        stopped, state = state.roll_back()
        assert (stopped, state.active, state.previous_versions) == (version, active, previous)


def test_a_rollback_stops_the_canary_first_then_the_shadow() -> None:
    state = DeploymentState().activate("1").activate("2")
    state = state.deploy_as("shadow", TrafficSplit(version="3", traffic_fraction=0.1)).deploy_as(
        "canary", TrafficSplit(version="4", traffic_fraction=0.2)
    )
    assert state.versions_in_use == {"2", "3", "4"}
    version, state = state.roll_back()
    assert (version, state.canary, state.active) == ("4", None, "2")
    version, state = state.roll_back()
    assert (version, state.shadow, state.active) == ("3", None, "2")
    assert state.roll_back()[0] == "2"


def test_a_version_has_one_role_at_a_time() -> None:
    state = DeploymentState().activate("1").deploy_as("shadow", TrafficSplit(version="2", traffic_fraction=0.5))
    state = state.deploy_as("canary", TrafficSplit(version="2", traffic_fraction=0.1))
    assert (state.shadow, state.canary) == (None, TrafficSplit(version="2", traffic_fraction=0.1))
    promoted = DeploymentState(active="2", previous_versions=("1",))
    assert (state.activate("2"), state.promote()) == (promoted, ("2", promoted))
    with pytest.raises(RegistryConflict, match="no canary"):
        promoted.promote()


def test_the_history_is_bounded_and_every_event_is_a_revision() -> None:
    state = DeploymentState()
    for number in range(MAX_EVENTS + 5):
        event = DeploymentEvent(timestamp="", action="activate", version=str(number), author="é", reason="why not")
        state = state.record(event)
    assert (len(state.history), state.revision) == (MAX_EVENTS, MAX_EVENTS + 5)
    assert state.history[-1].version == str(MAX_EVENTS + 4)
