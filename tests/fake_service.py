"""A service with a fake network that finds red and blue, so that results are known."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from model.backends.session import Session
from model.contract import Contract, Histogram, InputSize, RawOutputs
from model.drift import BIN_EDGES
from model.embeddings import Category
from service.app import create_app
from service.inference.loading import ArtifactLoader
from service.settings import Settings

SIDE_PX, STRIDE_PX = 56, 4
CELLS = SIDE_PX // STRIDE_PX
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
CONTRACT = Contract(
    name="fake",
    version="1+test",
    network="none",
    input_sizes=(InputSize.square(SIDE_PX),),
    stride_px=STRIDE_PX,
    max_detections=2,
    thing_clusters=2,
    stuff_clusters=1,
    categories={1: Category(id=70, name="tomato")},
)


def segment_colors(pixels: np.ndarray) -> RawOutputs:
    """Find red as a thing of cluster 1, score 0.9, and blue as one of cluster 2, score 0.2; stuff is everywhere."""
    red, _, blue = pixels.reshape(3, CELLS, STRIDE_PX, CELLS, STRIDE_PX).mean((2, 4))
    is_seen = np.stack([(red > 160) & (blue < 90), (blue > 160) & (red < 90)])
    return RawOutputs(
        scores=np.array([0.9, 0.2], np.float32) * is_seen.any((1, 2)),
        clusters=np.array([0, 1]),
        boxes=np.zeros((2, 4), np.float32),
        masks=is_seen.astype(np.float32),
        semantic=np.stack([np.zeros((CELLS, CELLS)), np.full((CELLS, CELLS), 5.0)]).astype(np.float32),
    )


class RedSession:
    """A session of the fake network."""

    backend = "fake"

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        return [segment_colors(each) for each in pixels]


class CountingSession(RedSession):
    """Keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        self.counts.append(len(pixels))
        return super().run(pixels, sizes)


def open_fake(_directory: Path) -> tuple[Contract, Session]:
    return CONTRACT, RedSession()


def open_described(_directory: Path) -> tuple[Contract, Session]:
    """Open the fake with a flat reference of its outputs."""
    flat = {name: Histogram(edges=BIN_EDGES[name], counts=(9,) * (len(BIN_EDGES[name]) + 1)) for name in BIN_EDGES}
    return replace(CONTRACT, drift_reference=flat), RedSession()


@asynccontextmanager
async def open_client(opener: ArtifactLoader = open_fake, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that is ready; exceptions of the app are raised here."""
    app = create_app(Settings(**settings), load_artifact=opener)
    async with app.router.lifespan_context(app):
        await asyncio.wait_for(app.state.useg.model_repository.wait_ready(), 10)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            yield client


async def post(client: httpx.AsyncClient, content: bytes, **options: Any) -> httpx.Response:
    """Post a file in a form."""
    return await client.post("/v1/segment", files={"file": ("photo.jpg", content)}, **options)


def draw_halves(left: tuple[int, ...] = RED, right: tuple[int, ...] = WHITE, mode: str = "RGB") -> Image.Image:
    """Draw an image of 56x28 pixels whose left and right halves have different colors."""
    image = Image.new(mode, (56, 28), right)
    image.paste(left, (0, 0, 28, 28))
    return image


def save(image: Image.Image, suffix: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()
