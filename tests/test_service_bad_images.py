"""Whatever picture comes, it is answered or refused for what it is, quickly and in little memory."""

import gzip
import resource

import pytest
from bad_images import draw_odd_pictures, draw_tiff_of_pages
from fake_service import draw_halves, open_client, post, save

ANSWERS = {
    "read": (200, "application/json"),
    "unreadable": (422, "urn:useg:problem:invalid-image"),
    "too many pixels": (422, "urn:useg:problem:too-many-pixels"),
}
MOST_GROWTH_KIB = 300 * 1024
pytestmark = pytest.mark.anyio


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
async def test_sixty_odd_pictures_get_the_answers_they_deserve() -> None:
    pictures = draw_odd_pictures()
    assert len(pictures) >= 60
    told, expected = {}, {}
    async with open_client() as client:
        await post(client, save(draw_halves()))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, (content, verdict) in pictures.items():
            answer = await post(client, content)
            kind = answer.headers["content-type"] if answer.status_code == 200 else answer.json()["type"]
            told[name], expected[name] = (answer.status_code, kind), ANSWERS[verdict]
        assert (await post(client, save(draw_halves()))).status_code == 200
    assert told == expected
    # One decoded bomb would be 1.6 GB or more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH_KIB


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
async def test_a_compressed_body_is_refused_before_it_is_inflated(encoding: str) -> None:
    headers = {"Content-Type": "image/png", "Content-Encoding": encoding}
    async with open_client() as client:
        bomb = gzip.compress(bytes(30_000_000))
        answer = await client.post("/v1/segment", content=bomb, headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (415, "urn:useg:problem:unsupported-media-type")


async def test_a_tiff_of_more_pages_than_anybody_has_is_refused_without_counting_them() -> None:
    async with open_client() as client:
        answer = await post(client, draw_tiff_of_pages(20_000))
        assert (answer.status_code, answer.json()["type"]) == (413, "urn:useg:problem:image-too-large")
        assert (await post(client, draw_tiff_of_pages(900))).json()["image"]["num_frames"] == 900


@pytest.mark.parametrize(
    "content", [b'{"inputs":' + b"[" * 500_000, b'{"inputs":"","parameters":' + b'{"a":' * 500_000]
)
async def test_json_nested_without_end_is_refused(content: bytes) -> None:
    async with open_client() as client:
        answer = await client.post("/v1/segment", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:useg:problem:invalid-parameter")
