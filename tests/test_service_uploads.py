"""Images in every format and kind of body are segmented or rejected with a 4xx, never a 500."""

import asyncio
import gzip
import io
import resource
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from bad_images import draw_tiff_of_pages, draw_unusual_images, turn
from fake_service import BLUE, RED, WHITE, draw_halves, open_client, post, save
from PIL import Image
from starlette.types import Message

from model.errors import UploadTimeout
from service.middleware import limit_body
from service.schemas import Problem
from service.settings import Settings

LIMIT_BYTES = 100_000

pytestmark = pytest.mark.anyio

# Where the stored left half is seen, by EXIF orientation (EXIF 2.3, section 4.6.4): x, y, width, height.
LEFT_SEEN_AT = {
    1: [0, 0, 28, 28],
    2: [28, 0, 28, 28],
    3: [28, 0, 28, 28],
    4: [0, 0, 28, 28],
    5: [0, 0, 28, 28],
    6: [0, 0, 28, 28],
    7: [0, 28, 28, 28],
    8: [0, 28, 28, 28],
}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(max_body_bytes=LIMIT_BYTES) as each:
        yield each


def assert_problem(response: httpx.Response, status: int, slug: str) -> Problem:
    problem = Problem.model_validate_json(response.content)
    assert (response.status_code, problem.status, problem.type) == (status, status, f"urn:useg:problem:{slug}")
    assert response.headers["content-type"] == "application/problem+json"
    assert problem.instance == f"urn:useg:request:{response.headers['x-request-id']}"
    return problem


def find_thing(response: httpx.Response) -> dict[str, Any]:
    """Return the only thing of a JSON response."""
    assert response.status_code == 200, response.text
    (thing,) = [segment for segment in response.json()["segments_info"] if segment["isthing"]]
    return dict(thing)


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_masks_follow_the_exif_orientation(client: httpx.AsyncClient, orientation: int) -> None:
    response = await post(client, save(draw_halves(), "JPEG", exif=turn(orientation), quality=95))
    image, thing = response.json()["image"], find_thing(response)
    width, height = (56, 28) if orientation < 5 else (28, 56)
    assert (image["width"], image["height"]) == (width, height)
    assert image["exif_transposed"] is (orientation != 1)
    assert thing["segmentation"]["size"] == [height, width]
    assert (thing["bbox"], thing["area"]) == (LEFT_SEEN_AT[orientation], 28 * 28)


async def test_a_decoded_photo_is_upright_and_scaled_down(client: httpx.AsyncClient) -> None:
    file = ("a.jpg", save(draw_halves(), "JPEG", exif=turn(6), quality=95))
    response = await client.post("/v1/decode", params={"longest_edge": 40}, files={"file": file})
    photo = Image.open(io.BytesIO(response.content))
    assert (response.headers["content-type"], photo.format, photo.size) == ("image/jpeg", "JPEG", (20, 40))
    assert photo.getpixel((10, 5)) == pytest.approx(RED, abs=8)  # the stored left half is above
    assert photo.getpixel((10, 35)) == pytest.approx(WHITE, abs=8)
    assert_problem(await client.post("/v1/decode", files=[("file", file)] * 2), 422, "invalid-parameter")
    assert_problem(await client.post("/v1/decode", files={"file": ("a", b"none")}), 422, "invalid-image")


async def test_only_the_first_frame_of_an_animation_is_segmented_with_a_warning(client: httpx.AsyncClient) -> None:
    frames = [draw_halves(WHITE, BLUE), draw_halves(BLUE, BLUE)]
    content = save(draw_halves(), "GIF", save_all=True, append_images=frames)
    response = await post(client, content)
    warning = "only the first of 3 frames was read"
    assert find_thing(response)["bbox"] == [0, 0, 28, 28]
    assert response.json()["image"]["num_frames"] == 3
    assert response.json()["image"]["warnings"] == [warning]
    png = await post(client, content, headers={"Accept": "image/png"})
    assert png.headers["x-image-warnings"] == warning


async def test_the_name_and_type_of_a_form_file_are_ignored(client: httpx.AsyncClient) -> None:
    files = {"file": ("letter.txt", save(draw_halves()), "text/plain")}
    assert find_thing(await client.post("/v1/segment", files=files))["area"] == 28 * 28


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ("filename*=UTF-8''na%C3%AFve%20%22one%22.png", "naïve 'one'.png"),
        ("filename*0*=UTF-8''a%20; filename*1=b.png", "a b.png"),
        ("filename=plain.png; filename*=UTF-8''other.png", "plain.png"),
    ],
)
async def test_an_encoded_file_name_alone_makes_a_file(client: httpx.AsyncClient, parameters: str, name: str) -> None:
    part = f'--abc\r\nContent-Disposition: form-data; name="file"; {parameters}\r\n\r\n'.encode()
    content = part + save(draw_halves()) + b"\r\n" + part + b"no image\r\n--abc--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=abc"}
    response = await client.post("/v1/segment", content=content, headers=headers)
    results = response.json()["results"]
    assert [(each["status"], each["name"]) for each in results] == [(200, name), (422, name)]


@pytest.mark.parametrize("media", ["image/jpeg", "application/octet-stream", "IMAGE/PNG; q=1"])
async def test_the_body_may_be_the_image(client: httpx.AsyncClient, media: str) -> None:
    content = save(draw_halves())
    response = await client.post("/v1/segment", content=content, headers={"Content-Type": media})
    assert find_thing(response)["area"] == 28 * 28


@pytest.mark.parametrize("media", ["application/x-www-form-urlencoded", "application/xml", ""])
async def test_an_unsupported_content_type_lists_the_supported_ones(client: httpx.AsyncClient, media: str) -> None:
    response = await client.post("/v1/segment", content=save(draw_halves()), headers={"Content-Type": media})
    assert "multipart/form-data" in assert_problem(response, 415, "unsupported-media-type").detail


@pytest.mark.parametrize(
    "form",
    [
        {"files": {"photo": ("a.png", b"x")}},
        {"files": [("file", ("a.png", b"x")), ("photo", ("b.png", b"x"))]},
        {"files": [("file", ("a.png", b"x"))] * 33},
        {"files": {"file": (None, b"x")}},
        {"files": {"file": ("a.png", b"x")}, "data": {"task": "instance"}},
        {"content": b"nonsense", "headers": {"Content-Type": "multipart/form-data; boundary=abc"}},
        {"content": b"nonsense", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"--abc\r\nContent-Disp", "headers": {"Content-Type": "multipart/form-data; boundary=abc"}},
    ],
)
async def test_a_form_without_valid_files_is_rejected(client: httpx.AsyncClient, form: dict[str, Any]) -> None:
    response = await client.post("/v1/segment", **form)
    assert "'file'" in assert_problem(response, 422, "invalid-parameter").detail


async def stream(size: int) -> AsyncIterator[bytes]:
    """Yield a chunked body, which has no Content-Length, and which begins as a form does."""
    yield b'--abc\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    for _ in range(size // 1000):
        yield bytes(1000)


@pytest.mark.parametrize("media", ["image/jpeg", "multipart/form-data; boundary=abc"])
async def test_a_chunked_body_over_the_limit_is_rejected(client: httpx.AsyncClient, media: str) -> None:
    response = await client.post("/v1/segment", content=stream(2 * LIMIT_BYTES), headers={"Content-Type": media})
    assert "the body has more than" in assert_problem(response, 413, "image-too-large").detail


async def test_an_image_of_exactly_the_limit_is_accepted(client: httpx.AsyncClient) -> None:
    content = io.BytesIO(save(draw_halves(), "BMP"))
    content.seek(LIMIT_BYTES - 1)
    content.write(b"\0")
    response = await client.post("/v1/segment", content=content.getvalue(), headers={"Content-Type": "image/bmp"})
    assert find_thing(response)["area"] == 28 * 28


EXPECTED = {
    "read": (200, "application/json"),
    "unreadable": (422, "urn:useg:problem:invalid-image"),
    "too many pixels": (422, "urn:useg:problem:too-many-pixels"),
}
MAX_GROWTH_KIB = 300 * 1024


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
async def test_unusual_images_are_segmented_or_rejected_as_expected() -> None:
    images = draw_unusual_images()
    assert len(images) >= 60
    actual, expected = {}, {}
    async with open_client() as client:
        await post(client, save(draw_halves()))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, (content, verdict) in images.items():
            response = await post(client, content)
            kind = response.headers["content-type"] if response.status_code == 200 else response.json()["type"]
            actual[name], expected[name] = (response.status_code, kind), EXPECTED[verdict]
        assert (await post(client, save(draw_halves()))).status_code == 200
    assert actual == expected
    # One decoded bomb would be 1.6 GB or more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
async def test_a_compressed_body_is_rejected_without_decompression(encoding: str) -> None:
    headers = {"Content-Type": "image/png", "Content-Encoding": encoding}
    async with open_client() as client:
        bomb = gzip.compress(bytes(30_000_000))
        response = await client.post("/v1/segment", content=bomb, headers=headers)
    assert (response.status_code, response.json()["type"]) == (415, "urn:useg:problem:unsupported-media-type")


async def test_a_tiff_with_too_many_pages_is_rejected() -> None:
    async with open_client() as client:
        response = await post(client, draw_tiff_of_pages(20_000))
        assert (response.status_code, response.json()["type"]) == (413, "urn:useg:problem:image-too-large")
        assert (await post(client, draw_tiff_of_pages(900))).json()["image"]["num_frames"] == 900


@pytest.mark.parametrize(
    "content", [b'{"inputs":' + b"[" * 500_000, b'{"inputs":"","parameters":' + b'{"a":' * 500_000]
)
async def test_deeply_nested_json_is_rejected(content: bytes) -> None:
    async with open_client() as client:
        response = await client.post("/v1/segment", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["type"]) == (422, "urn:useg:problem:invalid-parameter")


async def test_a_body_that_has_arrived_is_read_after_the_deadline() -> None:
    # Otherwise a service that is slow would blame its client: 408 instead of 504.
    scope = {"type": "http", "path": "/v1/segment", "headers": [], "state": {"deadline": 0.0}}
    message = {"type": "http.request", "body": b"photo", "more_body": True}
    messages: asyncio.Queue[Message] = asyncio.Queue()
    await messages.put(message)
    receive = limit_body(scope, messages.get, Settings())
    assert await receive() == message
    with pytest.raises(UploadTimeout):
        await receive()
