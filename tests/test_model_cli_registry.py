"""`useg registry`, `useg sign` and `useg create-signing-key`."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_registry import write_artifact

from model.cli import main


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact", "1")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([str(word) for word in words]) == 0
    return dict(json.loads(capsys.readouterr().out))


def fail(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    return printed.err


def test_a_version_is_added_deployed_rolled_back_and_removed(
    tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = tmp_path / "registry"
    added = run(capsys, "registry", "add", registry, artifact)
    assert added == {"model": "fake", "version": "1", "artifact": str(registry / "fake" / "1")}
    run(capsys, "registry", "add", registry, artifact, "--version", "2")
    assert run(capsys, "registry", "activate", registry, "1", "--author", "alice", "--reason", "first")["active"] == "1"
    canary = run(capsys, "registry", "canary", registry, "2", "--traffic-fraction", "0.25")
    assert canary["canary"] == {"version": "2", "traffic_fraction": 0.25}
    assert run(capsys, "registry", "shadow", registry, "2")["shadow"] == {"version": "2", "traffic_fraction": 0.1}
    run(capsys, "registry", "canary", registry, "2")
    promoted = run(capsys, "registry", "promote", registry)
    assert (promoted["active"], promoted["previous_versions"]) == ("2", ["1"])
    back = run(capsys, "registry", "rollback", registry, "--reason", "worse masks")
    assert (back["active"], back["history"][0]["reason"]) == ("1", "worse masks")
    assert run(capsys, "registry", "remove", registry, "2")["versions"] == ["1"]
    (model,) = run(capsys, "registry", "list", registry)["models"]
    assert [event["action"] for event in model["history"]][-3:] == ["promote", "rollback", "remove"]
    assert model["history"][2]["author"] == "alice"


def test_errors_are_one_line(tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = tmp_path / "registry"
    assert "is not a registry" in fail(capsys, "registry", "list", registry)
    run(capsys, "registry", "add", registry, artifact)
    assert "give another version" in fail(capsys, "registry", "add", registry, artifact)
    assert "activate one before a canary" in fail(capsys, "registry", "canary", registry, "1")
    assert "no version '9'" in fail(capsys, "registry", "activate", registry, "9")
    run(capsys, "registry", "add", registry, artifact, "--model", "other")
    assert "holds fake, other: give --model" in fail(capsys, "registry", "activate", registry, "1")
    assert run(capsys, "registry", "activate", registry, "1", "--model", "other")["name"] == "other"


def test_a_signing_key_is_created_and_signs(tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cryptography", reason="useg[signing] is not installed")
    made = run(capsys, "create-signing-key", tmp_path / "key", "--name", "alice")
    assert made["trusted_keys_line"].startswith("alice:")
    assert run(capsys, "sign", artifact, "--key", tmp_path / "key")["signed"] is True
    assert (artifact / "contract.sig").is_file()
    assert "never overwritten" in fail(capsys, "create-signing-key", tmp_path / "key")
