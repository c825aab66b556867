"""Unusual, broken and hostile files are segmented or rejected, quickly and in little memory."""

import gzip
import resource

import pytest
from bad_images import draw_tiff_of_pages, draw_unusual_images
from fake_service import draw_halves, open_client, post, save

EXPECTED = {
    "read": (200, "application/json"),
    "unreadable": (422, "urn:useg:problem:invalid-image"),
    "too many pixels": (422, "urn:useg:problem:too-many-pixels"),
}
MAX_GROWTH_KIB = 300 * 1024
pytestmark = pytest.mark.anyio


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
