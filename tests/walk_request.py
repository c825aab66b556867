"""`python tests/walk_request.py`: prints the project's files whose functions run in each POST of an image."""

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from fastapi import FastAPI

REPOSITORY = Path(__file__).resolve().parent.parent
REQUESTS = 3
"""What runs in all of them, and not while the service is idle, belongs to a request."""


async def walk_request(make_app: Callable[[], FastAPI], image: bytes, idle_s: float = 0.0) -> dict[str, int]:
    """Return the files of `model` and `service` whose functions run in a request, and the number of these functions."""
    walks: list[set[tuple[str, str]]] = []
    folders = tuple(f"{REPOSITORY / name}/" for name in ("model", "service"))

    def record(frame: FrameType, event: str, _argument: Any) -> None:
        if walks and event == "call" and frame.f_code.co_filename.startswith(folders):
            walks[-1].add((frame.f_code.co_filename, frame.f_code.co_qualname))

    threading.setprofile(record)  # for the threads that decode, run the network and encode
    app = make_app()
    try:
        async with app.router.lifespan_context(app):
            await app.state.useg.model_repository.wait_ready()
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
                await client.post("/v1/segment", content=image, headers={"Content-Type": "image/jpeg"})
                sys.setprofile(record)
                for _ in range(REQUESTS):
                    walks.append(set())
                    await client.post("/v1/segment", content=image, headers={"Content-Type": "image/jpeg"})
                walks.append(set())
                await asyncio.sleep(idle_s)
                sys.setprofile(None)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    idle = walks.pop()
    functions = set.intersection(*walks) - idle
    files = sorted({file for file, _ in functions})
    return {str(Path(file).relative_to(REPOSITORY)): sum(each == file for each, _ in functions) for file in files}


if __name__ == "__main__":
    from service.app import create_app
    from service.settings import Settings

    photo = (REPOSITORY / "docs/example.jpg").read_bytes()
    walk = asyncio.run(walk_request(lambda: create_app(Settings()), photo, idle_s=2.0))
    print(*(f"{count:4} {file}" for file, count in walk.items()), sep="\n")
    print(f"{sum(walk.values()):4} functions in {len(walk)} files")
