"""Category names set at run time appear in all later results and are kept on disk."""

import asyncio
import io
import json
import zipfile
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_service import BLUE as BLUE_RGB
from fake_service import CONTRACT, draw_halves, open_client, post, save
from fake_service import RED as RED_RGB
from live_service import GatedSession, wait_for
from PIL import Image

from model.embeddings import Category
from model.errors import InvalidCategoryNames
from model.registry.category_names import edit_names, empty_names, read_names
from service.auth import generate_api_key
from service.inference.live_category_names import LiveCategoryNames

pytestmark = pytest.mark.anyio

RED = "/v1/models/fake/clusters/1"
NAMES = "/v1/models/fake/names"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fake.names.json"


@pytest.fixture
async def client(file: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(category_names_file=file) as each:
        yield each


async def request_segments(
    client: httpx.AsyncClient, accept: str = "application/json", **options: Any
) -> httpx.Response:
    response = await post(client, save(draw_halves()), headers={"Accept": accept}, **options)
    assert response.status_code == 200, response.text
    return response


async def read_category(client: httpx.AsyncClient) -> str:
    segments = (await request_segments(client)).json()["segments_info"]
    return str(next(each["category_name"] for each in segments if each["cluster_id"] == 1))


async def test_a_request_keeps_the_names_that_it_started_with(file: Path) -> None:
    session = GatedSession()
    async with open_client(session.open, category_names_file=file) as client:
        started = asyncio.create_task(request_segments(client, params={"classes": "tomato"}))
        await wait_for(session.is_inside)
        assert (await client.put(RED, json={"category_name": "potato"})).status_code == 200
        session.gate.set()
        (segment,) = (await started).json()["segments_info"]
        assert (segment["cluster_id"], segment["category_name"]) == (1, "tomato")
        assert await read_category(client) == "potato"


async def test_clusters_of_one_category_are_one_segment(client: httpx.AsyncClient) -> None:
    for cluster in (1, 2):
        await client.put(f"/v1/models/fake/clusters/{cluster}", json={"category_name": "pepper"})
    image = save(draw_halves(RED_RGB, BLUE_RGB))

    async def list_clusters(**options: str) -> list[list[int]]:
        params = {"threshold": "0.1", **options}
        segments = (await post(client, image, params=params)).json()["segments_info"]
        return [each["cluster_ids"] for each in segments]

    assert await list_clusters(task="semantic") == [[1, 2]]
    assert await list_clusters(task="semantic", merge_clusters="false") == [[1], [2]]
    assert await list_clusters(task="semantic", classes="2") == [[2]]
    assert await list_clusters(task="panoptic") == [[1], [2]]
    png = await post(
        client, image, params={"task": "semantic", "threshold": 0.1}, headers={"Accept": 'image/png;profile="clusters"'}
    )
    assert set(np.asarray(Image.open(io.BytesIO(png.content))).flat) == {1, 2}


async def test_a_name_appears_in_all_later_results_and_formats(client: httpx.AsyncClient) -> None:
    assert await read_category(client) == "tomato"
    named = await client.put(RED, json={"category_name": " red pepper "})
    assert named.status_code == 200, named.text
    facts = named.json()
    assert facts.pop("timestamp").endswith("+00:00")
    assert facts == {
        "cluster_id": 1, "isthing": True, "category_id": 71, "category_name": "red pepper", "origin": "user",
        "author": "local", "revision": 1,
    }  # fmt: skip
    assert named.headers["ETag"] == '"1"'
    assert await read_category(client) == "red pepper"
    labelled = (await request_segments(client, "application/vnd.hf.image-segmentation+json")).json()
    assert "red pepper" in [each["label"] for each in labelled]
    features = (await request_segments(client, "application/geo+json")).json()["features"]
    assert "red pepper" in [each["properties"]["category_name"] for each in features]
    arrays = np.load(io.BytesIO((await request_segments(client, "application/x-npz")).content))
    assert (arrays["categories"].tolist(), arrays["category_ids"].tolist()) == (["red pepper", ""], [71, -1])
    archive = zipfile.ZipFile(io.BytesIO((await request_segments(client, "application/zip")).content))
    categories = json.loads(archive.read("panoptic.json"))["categories"]
    assert {"id": 71, "name": "red pepper", "supercategory": "thing", "isthing": 1} in categories
    chosen = (await request_segments(client, params={"classes": "red pepper"})).json()["segments_info"]
    assert [each["cluster_id"] for each in chosen] == [1]


async def test_a_name_appears_in_the_open_inference_protocol(client: httpx.AsyncClient) -> None:
    await client.put(RED, json={"category_name": "pepper"})
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [b64encode(save(draw_halves())).decode()]}
    response = await client.post("/v2/models/fake/infer", json={"inputs": [image]})
    assert '"category_name":"pepper"' in json.loads(response.text)["outputs"][0]["data"][0]


async def test_an_empty_or_deleted_name_restores_the_models_own(client: httpx.AsyncClient) -> None:
    await client.put(RED, json={"category_name": "pepper"})
    taken = (await client.delete(RED)).json()
    assert (taken["category_name"], taken["origin"], taken["revision"]) == ("tomato", "model", 2)
    await client.put(RED, json={"category_name": "pepper"})
    await client.put(RED, json={"category_name": ""})
    assert await read_category(client) == "tomato"


async def test_clusters_are_listed_with_the_origin_of_their_names(client: httpx.AsyncClient) -> None:
    await client.put("/v1/models/fake/clusters/3", json={"category_name": "wall"})
    listed = (await client.get("/v1/models/fake/clusters")).json()
    assert listed["model"] == {"name": "fake", "version": "1+test"}
    assert listed["revision"] == 1
    facts = [
        (each["cluster_id"], each["isthing"], each["category_name"], each["origin"]) for each in listed["clusters"]
    ]
    assert facts == [(1, True, "tomato", "model"), (2, True, None, None), (3, False, "wall", "user")]


async def test_a_change_of_an_old_revision_is_rejected(client: httpx.AsyncClient) -> None:
    await client.put(RED, json={"category_name": "one"}, headers={"If-Match": '"0"'})
    late = await client.put(RED, json={"category_name": "two"}, headers={"If-Match": '"0"'})
    assert (late.status_code, late.json()["type"]) == (412, "urn:useg:problem:precondition-failed")
    assert await read_category(client) == "one"
    assert (await client.put(RED, json={"category_name": "two"}, headers={"If-Match": "1"})).status_code == 200
    assert (await client.put(RED, json={"category_name": "three"}, headers={"If-Match": "soon"})).status_code == 422


@pytest.mark.parametrize(
    ("path", "body", "status", "actual"),
    [
        (RED, b'{"category_name": "' + b"x" * 81 + b'"}', 422, "1 to 80 printable characters"),
        (RED, b'{"category_name": 3}', 422, "category_name: Input should be a valid string"),
        (RED, b'{"category_name": "a", "color": "b"}', 422, "color"),
        (RED, b"dog", 422, "JSON decode error"),
        (RED, b'"' + b"x" * 1_100_000 + b'"', 413, "the maximum is 1048576"),
        ("/v1/models/fake/clusters/4", b'{"category_name": "dog"}', 404, "no cluster 4: there are 1..3"),
        ("/v1/models/other/clusters/1", b'{"category_name": "dog"}', 404, "other"),
        (f"{RED}?version=2", b'{"category_name": "dog"}', 404, "version '2' is not loaded"),
        ("/v1/models/fake/clusters/x", b'{"category_name": "dog"}', 422, "integer"),
        (NAMES, b"{}", 422, "the body has no valid names"),
    ],
)
async def test_an_invalid_change_is_reported_and_writes_nothing(
    client: httpx.AsyncClient, file: Path, path: str, body: bytes, status: int, actual: str
) -> None:
    response = await client.put(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert actual in response.json()["detail"]
    assert not file.exists()


async def test_names_are_exported_imported_and_undone(client: httpx.AsyncClient) -> None:
    await client.put(RED, json={"category_name": "pepper"})
    exported = (await client.get(NAMES)).json()
    await client.put(RED, json={"category_name": "chili"})
    await client.put("/v1/models/fake/clusters/2", json={"category_name": "sea"})
    imported = await client.put(NAMES, json=exported)
    assert imported.status_code == 200, imported.text
    assert {cluster: each["category_name"] for cluster, each in imported.json()["names"].items()} == {"1": "pepper"}
    assert imported.json()["revision"] == 4
    undone = (await client.post(f"{NAMES}/undo")).json()
    assert {cluster: each["category_name"] for cluster, each in undone["names"].items()} == {"1": "chili", "2": "sea"}
    earlier = (await client.post(f"{NAMES}/undo", json={"revision": 2})).json()
    assert earlier["names"]["1"]["category_name"] == "pepper"
    assert (await client.post(f"{NAMES}/undo", json={"revision": 99})).status_code == 422


@pytest.mark.parametrize(("category_id", "status"), [(-1, 422), (2**31 - 1, 200), (2**31, 422), (2**64, 422)])
async def test_imported_category_ids_fit_every_format(client: httpx.AsyncClient, category_id: int, status: int) -> None:
    await client.put(RED, json={"category_name": "pepper"})
    exported = (await client.get(NAMES)).json()
    exported["names"]["1"]["category_id"] = category_id
    assert (await client.put(NAMES, json=exported)).status_code == status
    assert (await request_segments(client, "application/json")).status_code == 200
    assert (await request_segments(client, "application/x-npz")).status_code == 200


async def test_concurrent_changes_lose_no_name(client: httpx.AsyncClient, file: Path) -> None:
    edits = [
        client.put(f"/v1/models/fake/clusters/{1 + each % 3}", json={"category_name": f"n{each}"}) for each in range(12)
    ]
    assert {response.status_code for response in await asyncio.gather(*edits)} == {200}
    glossary = read_names(file, CONTRACT)
    assert (glossary.revision, set(glossary.names)) == (12, {1, 2, 3})
    assert (await client.get(NAMES)).json()["revision"] == 12


def test_changes_by_another_process_are_loaded_and_a_broken_file_is_ignored(file: Path) -> None:
    names = LiveCategoryNames(CONTRACT, file)
    edit_names(file, CONTRACT, lambda old: old.rename({2: "sea"}, "somebody"))
    names.refresh()
    assert names.contract.categories == {**CONTRACT.categories, 2: Category(id=72, name="sea")}
    file.write_bytes(b"{")
    names.refresh()
    assert names.contract.categories[2].name == "sea"
    file.unlink()
    names.refresh()
    assert names.contract == CONTRACT


def test_names_are_kept_while_their_folder_is_missing(tmp_path: Path) -> None:
    home, away = tmp_path / "registry", tmp_path / "not mounted"
    home.mkdir()
    names = LiveCategoryNames(CONTRACT, home / "fake.names.json")
    names.edit(lambda old: old.rename({1: "pepper"}, "alice"))
    home.rename(away)
    names.refresh()
    assert names.contract.categories[1].name == "pepper"
    with pytest.raises(InvalidCategoryNames, match="registry is missing"):
        names.edit(lambda old: old.rename({1: "chilli"}, "alice"))
    assert not home.exists()
    away.rename(home)
    names.edit(lambda old: old.rename({1: "chilli"}, "alice"))
    assert names.contract.categories[1].name == "chilli"


OTHERS = empty_names(CONTRACT).rename({1: "pepper"}, "ann").to_json().replace('sha256": ""', 'sha256": "ff"')


@pytest.mark.parametrize(("text", "words"), [("{", "fix or delete it"), (OTHERS, "another network")])
async def test_a_damaged_file_or_one_of_another_network_is_neither_applied_nor_overwritten(
    file: Path, text: str, words: str
) -> None:
    file.write_text(text)
    async with open_client(category_names_file=file) as client:
        assert await read_category(client) == "tomato"
        refused = await client.put(RED, json={"category_name": "pepper"})
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:useg:problem:invalid-category-names")
    assert words in refused.json()["detail"]
    assert file.read_text() == text


async def test_changing_names_needs_an_admin_key(file: Path) -> None:
    (user, user_line), (boss, boss_line) = generate_api_key("user"), generate_api_key("boss")
    async with open_client(category_names_file=file, api_keys=user_line, admin_api_keys=boss_line) as client:
        for method, path in (("PUT", RED), ("DELETE", RED), ("PUT", NAMES), ("POST", f"{NAMES}/undo")):
            assert (await client.request(method, path)).status_code == 401
            response = await client.request(method, path, headers={"X-API-Key": user})
            assert (response.status_code, response.json()["type"]) == (403, "urn:useg:problem:permission-denied")
        named = await client.put(RED, json={"category_name": "pepper"}, headers={"X-API-Key": boss})
        assert named.json()["author"] == "boss"
        read = await client.get(NAMES, headers={"X-API-Key": user})
    assert read.json()["names"]["1"]["category_name"] == "pepper"


async def test_changes_are_counted_and_logged_without_the_name(
    client: httpx.AsyncClient, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.inference.live_category_names")
    edit_names(file, CONTRACT, lambda old: old.rename({2: "sea"}, "another process"))
    await client.put(RED, json={"category_name": "pepper"})
    await client.put(RED, json={"category_name": "pepper"})
    assert 'useg_category_name_edits_total{model="fake"} 1.0' in (await client.get("/metrics")).text
    assert caplog.messages == ["category names of fake 1+test: revision 2 by local, clusters 1"]
