"""One artifact or a registry of models is served, each warmed up before it is ready."""

import threading
from pathlib import Path

import pytest
from fake_registry import NAME, make_registry, open_artifact, write_artifact
from fake_service import CONTRACT, CountingSession, RedSession, open_client

from model.backends.session import AutoSession, HotSwapSession, Session
from model.contract import Contract
from model.errors import ArtifactError, RegistryError, SignatureError
from model.registry.signatures import create_signing_key, sign
from model.registry.versions import Registry
from service.inference.loading import make_artifact_loader
from service.metrics import Telemetry
from service.rollout.model_repository import ModelRepository
from service.settings import Settings

pytestmark = pytest.mark.anyio


def make_repository(registry: Path) -> ModelRepository:
    return ModelRepository(Settings(registry=registry), Telemetry(), load_artifact=open_artifact)


async def load_active(repository: ModelRepository, model: str) -> None:
    """Reconcile until a version of the model serves."""
    while not (model in repository.routers.by_name and repository.routers.get(model).active):
        await repository.reconcile()


def test_a_directory_that_is_not_a_registry_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="not a registry"):
        make_repository(tmp_path / "none")


def test_an_artifact_without_a_trusted_signature_is_not_loaded(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="useg[signing] is not installed")
    artifact = write_artifact(tmp_path / "artifact", "1")
    (tmp_path / "trusted").write_text(create_signing_key(tmp_path / "key", name="alice")["trusted_keys_line"])
    load = make_artifact_loader(Settings(trusted_keys_file=tmp_path / "trusted"))
    with pytest.raises(SignatureError, match="is not signed"):
        load(artifact)
    sign(artifact, key=tmp_path / "key", name="alice")
    with pytest.raises(ArtifactError, match="ONNX Runtime"):  # signed: now its network is what is wrong
        load(artifact)


async def test_a_model_that_cannot_be_reconciled_does_not_stop_the_others(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, {"1": "good"})
    registry.activate(NAME, "1", author="test")
    contract = registry.add(tmp_path / "artifact-1", model="alone", author="test")
    registry.activate(contract.name, "1", author="test")
    repository = make_repository(registry.folder)
    await repository.reconcile()
    (registry.folder / "alone").rename(tmp_path / "gone")  # a served model is deleted
    await load_active(repository, NAME)
    assert repository.routers.get(NAME).get_pipeline().contract.name == NAME
    await repository.stop()


async def test_models_keep_serving_when_their_registry_is_unmounted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = make_registry(tmp_path, {"1": "good"})
    registry.activate(NAME, "1", author="test")
    repository = make_repository(registry.folder)
    await load_active(repository, NAME)
    registry.folder.rename(tmp_path / "away")
    for is_mounted in (False, True, True):  # first the directory is missing, then it is empty
        if is_mounted:
            registry.folder.mkdir(exist_ok=True)
        await repository.reconcile()
        assert repository.routers.get(NAME).get_pipeline().contract.version == "1"
        (status,) = repository.list_statuses()
        assert [(each.version, each.state) for each in status.versions] == [("1", "missing_from_registry")]
    assert caplog.text.count("cannot read the registry, keeping the versions") == 2  # once for each of the errors
    await repository.stop()


async def test_a_deleted_model_that_was_never_loaded_is_dropped(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, {"1": "good"})
    repository = make_repository(registry.folder)
    await repository.reconcile()
    assert list(repository.routers.by_name) == [NAME]
    (registry.folder / NAME).rename(tmp_path / "away")
    await repository.reconcile()
    assert repository.routers.by_name == {}


async def test_a_model_that_is_added_later_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    repository = make_repository(folder)
    await repository.reconcile()
    assert repository.routers.by_name == {}
    registry = Registry(folder)
    registry.add(write_artifact(tmp_path / "artifact", "1"), author="test")
    registry.activate(NAME, "1", author="test")
    await load_active(repository, NAME)
    assert repository.routers.get(NAME).get_pipeline().contract.version == "1"
    await repository.stop()


WAIT_S = 10.0


class BlueSession(RedSession):
    backend = "faster"


def open_handover(is_allowed: threading.Event, opened: list[HotSwapSession]) -> tuple[Contract, Session]:
    def build() -> Session:
        assert is_allowed.wait(WAIT_S)
        return BlueSession()

    opened.append(HotSwapSession(RedSession(), build))
    return CONTRACT, opened[0]


async def test_metrics_name_the_current_backend() -> None:
    is_allowed = threading.Event()
    opened: list[HotSwapSession] = []
    async with open_client(lambda _: open_handover(is_allowed, opened)) as client:
        assert 'useg_model_info{backend="fake"' in (await client.get("/metrics")).text
        is_allowed.set()
        opened[0].wait_ready(WAIT_S)
        text = (await client.get("/metrics")).text
        assert 'useg_model_info{backend="faster"' in text
        assert 'backend="fake"' not in text


async def test_the_smallest_and_the_largest_batch_run_before_the_server_is_ready() -> None:
    session = CountingSession()
    async with open_client(lambda _: (CONTRACT, session), max_batch_size=6):
        assert session.counts == [1, 6]
    session.counts.clear()
    async with open_client(lambda _: (CONTRACT, session), max_batch_size=6, max_batch_pixels=2 * 56 * 56 + 1):
        assert session.counts == [1, 2]


async def test_the_chosen_backend_and_the_skipped_ones_are_reported() -> None:
    chosen = AutoSession(session=BlueSession(), skipped_backends={"cuda": "no GPU"})
    async with open_client(lambda _: (CONTRACT, chosen)) as client:
        (version,) = (await client.get("/v1/models")).json()["models"][0]["versions"]
        assert (version["backend"], version["skipped_backends"]) == ("faster", {"cuda": "no GPU"})
        parameters = (await client.get(f"/v2/models/{CONTRACT.name}/config")).json()["parameters"]
        assert {name: each["string_value"] for name, each in parameters.items()} == {
            "backend": "faster",
            "skipped_backends.cuda": "no GPU",
        }
        metrics = (await client.get("/metrics")).text
        assert 'useg_skipped_backend_info{backend="cuda",model="fake",reason="no GPU",version="1+test"} 1.0' in metrics
