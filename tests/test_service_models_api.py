"""`/v1/models`: listing, selecting and changing models over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_registry import NAME, make_registry, open_artifact, write_artifact
from fake_service import draw_halves, open_client, post, save

from model.registry.category_names import names_path
from model.registry.versions import Registry
from service.app import create_app
from service.oip.tensors import LENGTH_HEADER
from service.schemas import ModelHistory, ModelList
from service.settings import Settings

HALVES = save(draw_halves())
POLL_S = 0.02
LOCAL = "http://127.0.0.1"
pytestmark = pytest.mark.anyio


@asynccontextmanager
async def open_registry(registry: Registry, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service with a registry, once a model is ready."""
    chosen = Settings(registry=registry.folder, registry_poll_interval_s=POLL_S, **settings)
    app = create_app(chosen, load_artifact=open_artifact)
    async with app.router.lifespan_context(app):
        await asyncio.wait_for(app.state.useg.model_repository.wait_ready(), 10)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL) as client:
            yield client


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = make_registry(tmp_path, {"1": "good", "2": "good"})
    made.activate(NAME, "1", author="test")
    return made


async def see(client: httpx.AsyncClient, version: str, state: str) -> ModelHistory:
    """Return the model once the version is in a state."""
    async with asyncio.timeout(10):
        while True:
            await asyncio.sleep(0)  # an response without any waiting would let neither the follower nor the timeout run
            response = await client.get(f"/v1/models/{NAME}")
            if response.status_code == 404:
                continue
            status = ModelHistory.model_validate_json(response.content)
            if {each.version: each.state for each in status.versions}.get(version) == state:
                return status


async def test_a_version_is_activated_and_rolled_back_over_http(registry: Registry) -> None:
    async with open_registry(registry) as client:
        response = await client.post(f"/v1/models/{NAME}/active", json={"version": "2", "reason": "newer"})
        assert ModelHistory.model_validate_json(response.content).active == "2"
        await see(client, "2", "active")
        response = await post(client, HALVES)
        assert (response.json()["model"]["version"], response.headers["x-model-version"]) == ("2", "2")
        back = ModelHistory.model_validate_json((await client.post(f"/v1/models/{NAME}/rollback")).content)
        assert (back.active, back.serving_version) == ("1", "1")  # at once: it was warm
        assert [(event.action, event.author, event.reason) for event in back.history[-2:]] == [
            ("activate", "local", "newer"),
            ("rollback", "local", ""),
        ]
        assert (await post(client, HALVES)).json()["model"]["version"] == "1"
        assert (await client.get("/readyz")).json()["model"] == {"name": NAME, "version": "1"}


async def test_a_canary_is_tried_and_promoted_over_http(registry: Registry) -> None:
    async with open_registry(registry) as client:
        await client.post(f"/v1/models/{NAME}/canary", json={"version": "2", "traffic_fraction": 1.0})
        status = await see(client, "2", "canary")
        assert status.versions[1].traffic_fraction == 1.0
        response = await post(client, HALVES, headers={"X-Routing-Key": "anybody"})
        assert response.json()["model"]["version"] == "2"
        assert (await client.post(f"/v1/models/{NAME}/promote", json={})).json()["active"] == "2"
        await client.post(f"/v1/models/{NAME}/shadow", json={"version": "1", "traffic_fraction": 0.5})
        assert (await see(client, "1", "shadow")).versions[0].traffic_fraction == 0.5
        text = (await client.get("/metrics")).text
        assert f'useg_requests_total{{model="{NAME}",outcome="ok",task="panoptic",version="2"}} 1.0' in text
        assert f'useg_model_version_state{{model="{NAME}",state="shadow",version="1"}} 1.0' in text
        assert f'useg_rollbacks_total{{cause="drift",model="{NAME}"}} 0.0' in text
        await client.post(f"/v1/models/{NAME}/rollback")
        registry.remove(NAME, "1", author="test")
        async with asyncio.timeout(10):
            while 'state="unloaded",version="1"' in (await client.get("/metrics")).text:
                await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("active", {}, 422),
        ("active", {"version": 1}, 422),
        ("active", {"version": "1", "whim": 1}, 422),
        ("active", {"version": "9"}, 404),
        ("active", {"version": "../1"}, 404),
        ("canary", {"version": "2", "traffic_fraction": 0}, 422),
        ("canary", {"version": "1"}, 409),
        ("promote", {}, 409),
        ("rollback", {}, 409),
    ],
)
async def test_an_invalid_change_leaves_the_registry_unchanged(
    registry: Registry, path: str, body: dict[str, Any], status: int
) -> None:
    before = registry.read_state(NAME)
    async with open_registry(registry) as client:
        response = await client.post(f"/v1/models/{NAME}/{path}", json=body)
        assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
        assert (await client.post(f"/v1/models/none/{path}", json={"version": "1"})).status_code in (404, 422)
    assert registry.read_state(NAME) == before


async def test_a_registry_that_cannot_be_written_is_a_conflict_with_the_reason(registry: Registry) -> None:
    async with open_registry(registry) as client:
        lock = registry.folder / NAME / ".lock"
        lock.unlink()
        lock.mkdir()
        response = await client.post(f"/v1/models/{NAME}/active", json={"version": "2"})
    assert response.status_code == 409
    assert f"{NAME} cannot be changed: " in response.json()["detail"]


async def test_several_models_are_selected_by_name(tmp_path: Path, registry: Registry) -> None:
    registry.add(write_artifact(tmp_path / "other", "7"), model="other", author="test")
    registry.activate("other", "7", author="test")
    async with open_registry(registry) as client:
        for model, version in ((NAME, "1"), ("other", "7")):
            response = await post(client, HALVES, params={"model": model})
            assert response.json()["model"] == {"name": model, "version": version}
        ambiguous = await post(client, HALVES)
        assert ambiguous.status_code == 422
        assert "set model=NAME, one of fake, other" in ambiguous.json()["detail"]
        unknown = await post(client, HALVES, params={"model": "none"})
        assert (unknown.status_code, unknown.json()["type"]) == (404, "urn:useg:problem:model-not-found")
        assert (await client.get("/readyz")).status_code == 200
        models = ModelList.model_validate_json((await client.get("/v1/models")).content).models
        assert [(each.name, each.serving_version) for each in models] == [(NAME, "1"), ("other", "7")]
    async with open_registry(registry, default_model="other") as client:
        assert (await post(client, HALVES)).json()["model"]["name"] == "other"
        assert (await client.get("/readyz")).json()["model"]["name"] == "other"


async def test_the_open_inference_protocol_lists_models_and_versions(tmp_path: Path, registry: Registry) -> None:
    registry.add(write_artifact(tmp_path / "other", "7"), model="other", author="test")
    registry.activate("other", "7", author="test")
    async with open_registry(registry) as client:
        index = (await client.post("/v2/repository/index")).json()
        assert [(each["name"], each["version"], each["state"]) for each in index] == [
            (NAME, "1", "READY"),
            (NAME, "2", "UNAVAILABLE"),
            ("other", "7", "READY"),
        ]
        await post(client, b"not an image", params={"model": NAME})
        await client.post(f"/v1/models/{NAME}/active", json={"version": "2"})
        await see(client, "2", "active")
        assert (await client.get(f"/v2/models/{NAME}")).json()["versions"] == ["2", "1"]
        for path, version in ((f"{NAME}", "2"), (f"{NAME}/versions/1", "1"), ("other", "7")):
            response = await client.post(f"/v2/models/{path}/infer", content=HALVES, headers={LENGTH_HEADER: "0"})
            assert (response.status_code, f'"model_version":"{version}"'.encode() in response.content) == (200, True)
        for path in (f"{NAME}/versions/3", "none"):
            assert (await client.get(f"/v2/models/{path}/ready")).status_code == 404
            assert (await client.get(f"/v2/models/{path}/stats")).status_code == 404
        refused = await client.post(f"/v2/repository/models/{NAME}/unload")
        assert (refused.status_code, "versions follow the registry" in refused.json()["error"]) == (422, True)
        kinds = ("success", "fail", "compute_output")
        for path, expected in (
            ("stats", {(NAME, "2"): [1, 0, 1], (NAME, "1"): [1, 1, 1], ("other", "7"): [1, 0, 1]}),
            (f"{NAME}/stats", {(NAME, "2"): [1, 0, 1], (NAME, "1"): [1, 1, 1]}),
            (f"{NAME}/versions/1/stats", {(NAME, "1"): [1, 1, 1]}),
        ):
            stats = (await client.get(f"/v2/models/{path}")).json()["model_stats"]
            counts = {
                (each["name"], each["version"]): [each["inference_stats"][kind]["count"] for kind in kinds]
                for each in stats
            }
            assert counts == expected
            assert all(each["inference_count"] == 1 for each in stats)
        lines = (await client.get("/metrics")).text.splitlines()
        for model, version, count in ((NAME, "1", 1), (NAME, "2", 1), ("other", "7", 1)):
            assert f'useg_segments_per_image_count{{model="{model}",version="{version}"}} {count}.0' in lines


async def test_without_a_registry_there_is_one_version_and_no_history() -> None:
    async with open_client() as client:
        status = ModelHistory.model_validate_json((await client.get("/v1/models/fake")).content)
        assert (status.active, status.serving_version, status.revision) == ("1+test", "1+test", None)
        assert (await client.get("/v1/models/none")).status_code == 404
        assert (await post(client, HALVES, params={"model": "fake"})).status_code == 200
        assert (await post(client, HALVES, params={"model": "none"})).status_code == 404


async def test_category_names_stay_with_their_version_after_rollback_and_restart(registry: Registry) -> None:
    async def read_names(client: httpx.AsyncClient) -> tuple[str, str]:
        response = (await post(client, HALVES)).json()
        (name,) = {each["category_name"] for each in response["segments_info"] if each["cluster_id"] == 1}
        return response["model"]["version"], name

    path = f"/v1/models/{NAME}/clusters/1"
    async with open_registry(registry) as client:
        assert (await client.put(path, json={"category_name": "pepper"})).status_code == 200
        await client.post(f"/v1/models/{NAME}/active", json={"version": "2"})
        await see(client, "2", "active")
        assert (await client.put(f"{path}?version=2", json={"category_name": "chili"})).status_code == 200
        assert await read_names(client) == ("2", "chili")
        await client.post(f"/v1/models/{NAME}/rollback")
        assert await read_names(client) == ("1", "pepper")
    async with open_registry(registry) as client:
        assert await read_names(client) == ("1", "pepper")
    assert names_path(registry.folder / NAME / "2").is_file()
    assert list(registry.list_versions(NAME)) == ["1", "2"]
