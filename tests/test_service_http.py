"""POST /v1/segment, health, metrics, pages and security headers over HTTP."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_service import BLUE, CONTRACT, RED, RedSession, draw_halves, open_client, open_fake, post, save
from pycocotools import mask as coco
from walk_request import walk_request

from model.backends.session import Session
from model.contract import Contract, RawOutputs
from model.errors import ArtifactError
from service.app import create_app
from service.schemas import ImageInfo, Problem, Readiness
from service.settings import Settings

WAIT_S = 10.0
HALVES = save(draw_halves())
MAX_FILES_OF_A_REQUEST = 15

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client() as each:
        yield each


async def test_an_image_is_segmented(client: httpx.AsyncClient) -> None:
    response = await post(client, HALVES)
    content = response.json()
    image = ImageInfo.model_validate(content["image"])
    assert (image.width, image.height, image.original_width, image.original_height) == (56, 28, 56, 28)
    assert (image.num_frames, image.frame_index, image.exif_transposed, image.warnings) == (1, 0, False, [])
    assert content["model"] == {"name": "fake", "version": "1+test"}
    assert content["task"] == "panoptic"
    thing, stuff = content["segments_info"]
    assert (thing["id"], thing["cluster_id"], thing["category_id"], thing["category_name"]) == (1, 1, 70, "tomato")
    assert (thing["isthing"], thing["bbox"], thing["area"]) == (True, [0, 0, 28, 28], 784)
    assert thing["score"] == pytest.approx(0.9)
    assert (stuff["id"], stuff["cluster_id"], stuff["category_id"], stuff["category_name"]) == (2, 3, None, None)
    assert (stuff["isthing"], stuff["bbox"], stuff["area"]) == (False, [28, 0, 28, 28], 784)
    assert stuff["score"] == round(1 / (1 + np.exp(-5.0)), 4)
    mask = coco.decode(thing["segmentation"])
    assert mask[:, :28].all()
    assert not mask[:, 28:].any()


async def test_responses_have_vary_version_and_server_timing_headers(client: httpx.AsyncClient) -> None:
    response = await post(client, HALVES)
    assert response.headers["vary"] == "Accept"
    assert response.headers["x-model-version"] == "1+test"
    stages = [part.split(";")[0] for part in response.headers["server-timing"].split(", ")]
    assert stages == ["read", "decode", "queue", "infer", "merge", "encode"]


async def test_a_lower_threshold_returns_more_things(client: httpx.AsyncClient) -> None:
    content = save(draw_halves(RED, BLUE))
    for threshold, clusters in (("0.1", [1, 2]), ("0.3", [1]), ("0.95", [])):
        response = await post(client, content, params={"task": "instance", "threshold": threshold})
        assert [each["cluster_id"] for each in response.json()["segments_info"]] == clusters


async def test_a_plain_request_id_of_the_client_is_kept(client: httpx.AsyncClient) -> None:
    for given, is_kept in (("order-66.b_1", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("é", False)):
        response = await client.get("/livez", headers={"X-Request-ID": given.encode()})
        assert (response.headers["x-request-id"] == given) is is_kept


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/segments", 404), ("GET", "/v1/segment", 405)])
async def test_an_unknown_path_or_method_is_a_problem(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.headers["content-type"] == "application/problem+json"
    assert Problem.model_validate_json(response.content).status == response.status_code == status
    assert response.headers.get("allow") == ("POST" if status == 405 else None)


async def test_head_is_get_without_the_body(client: httpx.AsyncClient) -> None:
    for path in ("/", "/static/main.js", "/docs", "/openapi.json", "/livez", "/readyz", "/v1/models", "/v2", "/none"):
        head, get = await client.head(path), await client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert [head.headers[name] for name in ("content-type", "content-length")] == [
            get.headers[name] for name in ("content-type", "content-length")
        ]
    assert (await client.head("/v1/segment")).headers["allow"] == "POST"
    line = 'http_request_method="HEAD",http_response_status_code="200",http_route="/livez"'
    assert line in (await client.get("/metrics")).text


class BrokenSession(RedSession):
    """Fails after the warm-up."""

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        if pixels.any():
            raise RuntimeError("the secret of the backend")
        return super().run(pixels, sizes)


async def test_a_broken_backend_is_a_logged_500_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    async with open_client(lambda _: (CONTRACT, BrokenSession())) as client:
        response = await post(client, HALVES)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "secret" in caplog.text
        assert response.headers["x-request-id"] in Problem.model_validate_json(response.content).detail
        assert (await client.get("/readyz")).status_code == 200


async def test_metrics_count_requests_by_outcome(client: httpx.AsyncClient) -> None:
    await post(client, HALVES)
    await post(client, b"no decoded", params={"task": "instance"})
    await client.get("/some/path/of/mine")
    await client.request("BREW", "/livez")
    text = (await client.get("/metrics")).text
    for line in (
        'useg_requests_total{model="fake",outcome="ok",task="panoptic",version="1+test"} 1.0',
        'useg_requests_total{model="fake",outcome="client_error",task="instance",version="1+test"} 1.0',
        'http_server_request_duration_seconds_count{http_request_method="POST",'
        'http_response_status_code="200",http_route="/v1/segment"} 1.0',
        'http_server_request_duration_seconds_count{http_request_method="GET",'
        'http_response_status_code="404",http_route="unmatched"} 1.0',
        'http_server_request_duration_seconds_count{http_request_method="_OTHER",'
        'http_response_status_code="405",http_route="/livez"} 1.0',
        'useg_stage_duration_seconds_count{stage="merge"} 1.0',
        "useg_queue_depth 0.0",
        'useg_batch_size_count{input_size="56x56",release_reason="max_batch_size"} 1.0',
        'useg_segments_per_image_sum{model="fake",version="1+test"} 2.0',
        'useg_model_info{backend="fake",name="fake",precision="fp32",sha256="",version="1+test"} 1.0',
    ):
        assert line in text.splitlines()


async def test_the_service_is_alive_at_once_and_ready_once_its_model_is_loaded() -> None:
    gate = threading.Event()

    def open_late(_directory: Path) -> tuple[Contract, Session]:
        assert gate.wait(WAIT_S)
        return open_fake(_directory)

    app = create_app(Settings(), load_artifact=open_late)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/livez")).json() == {"status": "alive"}
        early = await client.get("/readyz")
        assert (early.status_code, "is loading" in early.json()["detail"]) == (503, True)
        rejected = await post(client, HALVES)
        assert (rejected.status_code, int(rejected.headers["retry-after"]) >= 1) == (503, True)
        assert 'useg_requests_rejected_total{reason="not_ready"} 1.0' in (await client.get("/metrics")).text
        gate.set()
        await asyncio.wait_for(app.state.useg.model_repository.wait_ready(), WAIT_S)
        ready = await client.get("/readyz")
        assert (ready.status_code, Readiness.model_validate_json(ready.content).model.name) == (200, "fake")
    assert (await httpx.AsyncClient(transport=transport, base_url="http://t").get("/readyz")).status_code == 503


@pytest.mark.parametrize(("error", "words"), [(ArtifactError("golden answers differ"), "differ"), (OSError(), "OSErr")])
async def test_a_rejected_artifact_leaves_the_service_alive_but_not_ready(error: Exception, words: str) -> None:
    def refuse(_directory: Path) -> tuple[Contract, Session]:
        raise error

    app = create_app(Settings(), load_artifact=refuse)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        with pytest.raises(ArtifactError):
            await asyncio.wait_for(app.state.useg.model_repository.wait_ready(), WAIT_S)
        response = await client.get("/readyz")
        assert (response.status_code, words in response.json()["detail"]) == (503, True)
        assert (await client.get("/livez")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_pages_and_their_files_are_served_for_revalidation(client: httpx.AsyncClient, path: str) -> None:
    page = await client.get(path)
    assert page.headers["content-type"].startswith("text/html")
    names = re.findall(r'(?:src|href)="((?:static|docs)/[^"]+)"', page.text)
    assert names
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for name in names:
        response = await client.get(f"/{name}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(types["." + name.rpartition(".")[2]])
        assert response.headers["cache-control"] == "no-cache"
    for path in ("/static/none.js", "/static/..%2fapp.py", "/static/", "/static/%00"):
        assert (await client.get(path)).status_code == 404


@pytest.mark.parametrize("path", ["/", "/livez", "/metrics", "/none", "/static/style.css"])
async def test_every_response_has_security_headers(client: httpx.AsyncClient, path: str) -> None:
    headers = (await client.get(path)).headers
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
    assert (headers["referrer-policy"], headers["cross-origin-resource-policy"]) == ("no-referrer", "same-origin")


async def test_the_csp_allows_only_files_of_the_service(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
    assert (policy["frame-ancestors"], policy["connect-src"]) == ("'none'", "'self'")
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page.text) == []
    assert re.findall(r'(?:src|href)="(?:https?:)?//', page.text) == []


async def test_a_request_runs_through_few_files() -> None:
    walk = await walk_request(lambda: create_app(Settings(), open_fake), HALVES)
    assert "service/routes/segment.py" in walk
    assert len(walk) <= MAX_FILES_OF_A_REQUEST
