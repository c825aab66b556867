"""What leads a service: one artifact or a registry, signed where that is asked for."""

from pathlib import Path

import pytest
from fake_registry import NAME, make_registry, open_artifact, write_artifact

from model.contract import Contract
from model.errors import ArtifactError, RegistryError, SignatureError
from model.registry.signatures import create_signing_key, sign_artifact
from model.registry.versions import Registry
from service.rollout.model_repository import SingleModelSource
from service.rollout.registry_watcher import RegistryWatcher, make_artifact_loader, make_version_source
from service.settings import Settings
from service.telemetry.metrics import Telemetry

pytestmark = pytest.mark.anyio


def test_a_registry_goes_before_the_artifact(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, {"1": "good"})
    assert isinstance(make_version_source(Settings(registry=registry.folder), Telemetry()), RegistryWatcher)
    assert isinstance(make_version_source(Settings(), Telemetry()), SingleModelSource)
    with pytest.raises(RegistryError, match="is not a registry"):
        make_version_source(Settings(registry=tmp_path / "none"), Telemetry())


def test_what_nobody_trusted_has_signed_is_not_opened(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="useg[signing] is not installed")
    artifact = write_artifact(tmp_path / "artifact", "1")
    (tmp_path / "trusted").write_text(create_signing_key(tmp_path / "key", "alice"))
    opener = make_artifact_loader(Settings(trusted_keys_file=tmp_path / "trusted"))
    with pytest.raises(SignatureError, match="is not signed"):
        opener(artifact)
    sign_artifact(artifact, tmp_path / "key", "alice")
    with pytest.raises(ArtifactError, match="refused by ONNX Runtime"):  # signed: its network is what is wrong now
        opener(artifact)


async def test_a_model_whose_step_fails_keeps_no_other_from_its_own(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, {"1": "good"})
    registry.activate(NAME, "1", author="test")
    contract: Contract = registry.add(tmp_path / "artifact-1", model="alone", author="test")
    registry.activate(contract.name, "1", author="test")
    leader = make_version_source(Settings(registry=registry.folder), Telemetry(), open_artifact=open_artifact)
    assert isinstance(leader, RegistryWatcher)
    await leader.look()
    (registry.folder / "alone").rename(tmp_path / "gone")  # somebody deletes a model that is served
    while not leader.followers[NAME].is_settled:
        await leader.look()
    assert leader.followers[NAME].router.require().contract.name == NAME
    await leader.stop()


async def test_a_registry_that_is_not_mounted_any_more_drops_no_model_that_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = make_registry(tmp_path, {"1": "good"})
    registry.activate(NAME, "1", author="test")
    leader = make_version_source(Settings(registry=registry.folder), Telemetry(), open_artifact=open_artifact)
    assert isinstance(leader, RegistryWatcher)
    while not leader.list_routers() or not leader.list_routers()[NAME].active:
        await leader.look()
    registry.folder.rename(tmp_path / "away")
    for is_mounted in (False, True, True):  # the folder is gone; then an empty one is left of it
        if is_mounted:
            registry.folder.mkdir(exist_ok=True)
        await leader.look()
        assert leader.list_routers()[NAME].require().contract.version == "1"
        (status,) = leader.list_statuses()
        assert [(each.version, each.state) for each in status.versions] == [("1", "missing_from_registry")]
    assert caplog.text.count("all stays as it is") == 1
    await leader.stop()


async def test_a_model_that_is_gone_and_never_answered_is_forgotten(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, {"1": "good"})
    leader = make_version_source(Settings(registry=registry.folder), Telemetry(), open_artifact=open_artifact)
    assert isinstance(leader, RegistryWatcher)
    await leader.look()
    assert list(leader.list_routers()) == [NAME]
    (registry.folder / NAME).rename(tmp_path / "away")
    await leader.look()
    assert leader.list_routers() == {}


async def test_a_model_that_comes_later_is_served_too(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    leader = make_version_source(Settings(registry=folder), Telemetry(), open_artifact=open_artifact)
    await leader.look()
    assert leader.list_routers() == {}
    registry = Registry(folder)
    registry.add(write_artifact(tmp_path / "artifact", "1"), author="test")
    registry.activate(NAME, "1", author="test")
    while not leader.list_routers() or not leader.list_routers()[NAME].active:
        await leader.look()
    assert leader.list_routers()[NAME].list_versions() == ["1"]
    await leader.stop()
