"""Responses in every format, and batches with a status for each image."""

import base64
import io
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from fake_service import BLUE, CONTRACT, WHITE, CountingSession, RedSession, draw_halves, open_client, post, save
from PIL import Image

from model.contract import RawOutputs
from model.errors import NotAcceptable
from model.formats.image_files import decode_panoptic_png
from service.routes.segment import negotiate_media_type
from service.schemas import (
    BatchResponse,
    MultiTaskResponse,
    Problem,
    SegmentationResponse,
)

HALVES = save(draw_halves())
BLUES = save(draw_halves(BLUE, WHITE))
TEXT_FILE = b"no decoded"

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(max_batch_size=4) as each:
        yield each


async def request_segments(
    client: httpx.AsyncClient, accept: str, content: bytes = HALVES, **params: Any
) -> httpx.Response:
    return await post(client, content, headers={"Accept": accept}, params=params)


async def post_files(
    client: httpx.AsyncClient, contents: list[bytes], accept: str = "application/json", **params: Any
) -> httpx.Response:
    files = [("file", (f"{number}.png", content)) for number, content in enumerate(contents)]
    return await client.post("/v1/segment", files=files, headers={"Accept": accept}, params=params)


async def test_geojson_polygons_follow_the_mask_borders(client: httpx.AsyncClient) -> None:
    response = await request_segments(client, "application/geo+json")
    assert response.headers["content-type"] == "application/geo+json"
    collection = response.json()
    assert (collection["type"], collection["image"]["width"]) == ("FeatureCollection", 56)
    thing, stuff = collection["features"]
    assert (thing["type"], thing["geometry"]["type"]) == ("Feature", "MultiPolygon")
    assert thing["geometry"]["coordinates"] == [[[[0, 0], [28, 0], [28, 28], [0, 28], [0, 0]]]]
    names = [each["properties"]["category_name"] for each in (thing, stuff)]
    assert (names, stuff["properties"]["area"]) == (["tomato", None], 784)


async def test_the_clusters_profile_selects_a_png_of_cluster_ids(client: httpx.AsyncClient) -> None:
    response = await request_segments(client, 'image/png;profile="clusters"', task="semantic")
    decoded = Image.open(io.BytesIO(response.content))
    assert (response.headers["content-type"], decoded.mode) == ('image/png;profile="clusters"', "L")
    assert [decoded.getpixel((10, 10)), decoded.getpixel((40, 10))] == [1, 3]


async def test_npz_holds_the_label_map(client: httpx.AsyncClient) -> None:
    with np.load(io.BytesIO((await request_segments(client, "application/x-npz")).content)) as arrays:
        assert arrays["label_map"][0, [0, 55]].tolist() == [1, 2]
        assert arrays["scores"][0] == pytest.approx(0.9)


async def test_the_hugging_face_format_is_a_list_of_labeled_masks(client: httpx.AsyncClient) -> None:
    response = await request_segments(client, "application/vnd.hf.image-segmentation+json", subtask="panoptic")
    labels = [each["label"] for each in response.json()]
    assert labels == ["tomato", "LABEL_3"]


async def test_several_tasks_come_from_one_run_of_the_network() -> None:
    session = CountingSession()
    async with open_client(lambda _: (CONTRACT, session)) as client:
        session.counts.clear()
        response = await request_segments(client, "", task="panoptic,instance,semantic")
    assert session.counts == [1]
    tasks = MultiTaskResponse.model_validate_json(response.content)
    found = {each.task: len(each.segments_info) for each in tasks.results}
    assert found == {"panoptic": 2, "instance": 1, "semantic": 2}


async def test_several_tasks_are_not_acceptable_as_a_single_png(client: httpx.AsyncClient) -> None:
    response = await request_segments(client, "image/png", task="panoptic,instance")
    problem = Problem.model_validate_json(response.content)
    assert problem.status == 406
    assert "of several images or tasks matches 'Accept: image/png': supported are application/json" in problem.detail


async def test_longest_edge_scales_the_result_down(client: httpx.AsyncClient) -> None:
    large = save(draw_halves().resize((560, 280)))
    response = SegmentationResponse.model_validate_json(
        (await request_segments(client, "", large, longest_edge=140)).content
    )
    assert (response.image.width, response.image.height) == (140, 70)
    assert (response.image.original_width, response.image.original_height) == (560, 280)
    assert [each.bbox for each in response.segments_info] == [(0, 0, 70, 70), (70, 0, 70, 70)]
    overlay = Image.open(io.BytesIO((await request_segments(client, "image/jpeg", large, longest_edge=140)).content))
    assert overlay.size == (140, 70)
    untouched = SegmentationResponse.model_validate_json(
        (await request_segments(client, "", large, longest_edge=561)).content
    )
    assert untouched.image.width == 560


async def test_each_image_of_a_batch_has_its_own_status(client: httpx.AsyncClient) -> None:
    response = await post_files(client, [HALVES, TEXT_FILE, BLUES], task="instance", threshold="0.1")
    assert response.status_code == 207
    batch = BatchResponse.model_validate_json(response.content)
    assert [(each.index, each.name, each.status) for each in batch.results] == [
        (0, "0.png", 200),
        (1, "1.png", 422),
        (2, "2.png", 200),
    ]
    clusters = [
        [each.cluster_id for each in item.result.segments_info]
        for item in batch.results
        if isinstance(item.result, SegmentationResponse)
    ]
    assert clusters == [[1], [2]]
    assert batch.results[1].error
    assert batch.results[1].error.type == "urn:useg:problem:invalid-image"
    assert batch.results[1].error.instance == f"urn:useg:request:{response.headers['x-request-id']}"


async def test_a_batch_without_a_failure_is_200(client: httpx.AsyncClient) -> None:
    response = await post_files(client, [HALVES] * 9, task="semantic,panoptic")
    batch = BatchResponse.model_validate_json(response.content)
    assert (response.status_code, len(batch.results)) == (200, 9)
    assert all(isinstance(item.result, MultiTaskResponse) for item in batch.results)
    stages = [part.split(";")[0] for part in response.headers["server-timing"].split(", ")]
    assert stages == ["read", "decode", "queue", "infer", "merge", "encode"]


async def test_an_image_on_which_the_network_fails_does_not_fail_the_batch() -> None:
    class PickySession(RedSession):
        def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
            if any(each[2].mean() > 200 > each[0].mean() for each in pixels):
                raise RuntimeError("the secret of the backend")
            return super().run(pixels, sizes)

    poison = save(Image.new("RGB", (56, 56), BLUE))
    async with open_client(lambda _: (CONTRACT, PickySession()), max_batch_size=4) as client:
        response = await post_files(client, [HALVES, HALVES, poison, HALVES])
    assert [item.status for item in BatchResponse.model_validate_json(response.content).results] == [200, 200, 500, 200]
    assert "secret" not in response.text


async def test_a_batch_of_which_no_image_was_started_fails_as_a_whole() -> None:
    async with open_client() as client:
        files = [("file", (f"{number}.png", HALVES)) for number in range(2)]
        response = await client.post("/v1/segment", files=files, headers={"X-Request-Timeout-Ms": "1"})
    assert (response.status_code, Problem.model_validate_json(response.content).status) == (504, 504)


async def test_a_zip_is_a_coco_panoptic_dataset(client: httpx.AsyncClient) -> None:
    response = await post_files(client, [HALVES, TEXT_FILE, BLUES], "application/zip", task="panoptic,semantic")
    assert (response.status_code, response.headers["content-type"]) == (207, "application/zip")
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        data = orjson.loads(archive.read("panoptic.json"))
        assert [(each["id"], each["file_name"], each["width"]) for each in data["images"]] == [
            (1, "0.png", 56),
            (3, "2.png", 56),
        ]
        categories = {each["id"] for each in data["categories"]}
        for annotation in data["annotations"]:
            labels = decode_panoptic_png(archive.read(f"panoptic/{annotation['file_name']}"))
            drawn = {int(each): int((labels == each).sum()) for each in np.unique(labels) if each}
            assert {each["id"]: each["area"] for each in annotation["segments_info"]} == drawn
            assert {each["category_id"] for each in annotation["segments_info"]} <= categories
        names = set(archive.namelist())
        assert {"semantic.json", "semantic/000003.json", "panoptic/000001.png", "results.json"} <= names
        assert not {name for name in names if "000002" in name}
        assert orjson.loads(archive.read("results.json"))[1]["error"]["status"] == 422


@pytest.mark.parametrize("name", ["coco-instances", "coco-polygons"])
async def test_a_zip_has_one_coco_file_of_the_instances_of_all_images(client: httpx.AsyncClient, name: str) -> None:
    files = [HALVES, TEXT_FILE, BLUES]
    response = await post_files(client, files, "application/zip", formats=f"json,{name}")
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        data = orjson.loads(archive.read(f"panoptic.{name.removeprefix('coco-')}.json"))
        segments = [
            (image, segment["area"], segment["bbox"])
            for image in (1, 3)
            for segment in orjson.loads(archive.read(f"panoptic/{image:06}.json"))["segments_info"]
        ]
    assert [(each["image_id"], each["area"], each["bbox"]) for each in data["annotations"]] == segments
    assert [each["id"] for each in data["annotations"]] == list(range(1, len(segments) + 1))
    assert [each["id"] for each in data["images"]] == [1, 3]
    assert isinstance(data["annotations"][0]["segmentation"], list) == (name == "coco-polygons")


async def test_a_zip_holds_the_requested_formats(client: httpx.AsyncClient) -> None:
    everything = "json,geojson,png,clusters,overlay,npz,huggingface,coco-instances,coco-polygons"
    response = await request_segments(client, "application/zip", formats=everything)
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        endings = {name.partition("000001")[2] for name in archive.namelist() if "000001" in name}
        assert {"panoptic.json", "panoptic.instances.json", "panoptic.polygons.json"} <= set(archive.namelist())
    assert endings == {
        ".json", ".geojson", ".png", ".clusters.png", ".overlay.jpg", ".npz", ".huggingface.json"
    }  # fmt: skip
    broken = await request_segments(client, "application/zip", TEXT_FILE)
    assert Problem.model_validate_json(broken.content).status == broken.status_code == 422


def encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


async def test_a_json_body_holds_base64_and_options(client: httpx.AsyncClient) -> None:
    for text in (encode(HALVES), "data:image/png;base64," + encode(HALVES)):
        body = {"inputs": text, "parameters": {"task": "instance", "classes": ["tomato"], "longest_edge": 32}}
        response = SegmentationResponse.model_validate_json((await client.post("/v1/segment", json=body)).content)
        assert (response.task, response.image.width, len(response.segments_info)) == ("instance", 32, 1)


async def test_a_list_of_one_base64_image_is_a_batch(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/segment", json={"inputs": [encode(HALVES)]})
    (item,) = BatchResponse.model_validate_json(response.content).results
    assert (item.name, item.status) == (None, 200)


@pytest.mark.parametrize(
    ("body", "slug", "words"),
    [
        (b"{", "invalid-parameter", "Invalid JSON"),
        (b'{"inputs": 5}', "invalid-parameter", "inputs.str: Input should be a valid string"),
        (b'{"inputs": []}', "invalid-parameter", "at least 1 item"),
        (b'{"inputs": "&&&&"}', "invalid-parameter", "invalid base64"),
        (b'{"inputs": "aGk=", "options": {}}', "invalid-parameter", "options: Extra inputs"),
        (b'{"inputs": "aGk=", "parameters": {"tsak": 1}}', "invalid-parameter", "did you mean 'task'"),
        (b'{"inputs": "aGk=", "parameters": {"model": "fake"}}', "invalid-parameter", "unknown parameter 'model'"),
        (b'{"inputs": "aGk=", "parameters": {"threshold": 1.5}}', "invalid-parameter", "less than or equal to 1"),
        (b'{"inputs": "aGk=", "parameters": {"classes": []}}', "invalid-parameter", "classes"),
        (b'{"inputs": "aGk="}', "invalid-image", "2 bytes"),
        (b'{"inputs": "https://example.org/a.jpg"}', "url-input-unsupported", "image URLs are not supported"),
        (orjson.dumps({"inputs": ["aGk="] * 33}), "invalid-parameter", "at most 32 items"),
    ],
)
async def test_an_invalid_json_body_is_rejected(client: httpx.AsyncClient, body: bytes, slug: str, words: str) -> None:
    response = await client.post("/v1/segment", content=body, headers={"Content-Type": "application/json"})
    problem = Problem.model_validate_json(response.content)
    assert (response.status_code, problem.type) == (422, f"urn:useg:problem:{slug}")
    assert words in problem.detail


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "application/json"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("image/*", "image/png"),
        ("image/*, image/png;q=0", "image/jpeg"),
        ("image/png;q=0.5, */*;q=0.1", "image/png"),
        ("text/html, application/xhtml+xml, image/avif, */*;q=0.8", "application/json"),
        ('image/png;profile="coco-panoptic"', "image/png"),
        ("application/json;q=oops, image/jpeg;q=0.001", "image/jpeg"),
    ],
)
def test_the_accept_header_selects_the_media_type(accept: str, media: str) -> None:
    assert negotiate_media_type(accept) == media


@pytest.mark.parametrize("accept", ["text/html", "application/*;q=0", "*/*;q=0", "image/webp", "*/*;q=nan", ";;;"])
def test_an_unacceptable_media_type_lists_the_supported_ones(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="supported are application/json, image/png, image/jpeg"):
        negotiate_media_type(accept)
