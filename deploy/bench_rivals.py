#!/usr/bin/env python3
"""Measures our service next to FastAPI, LitServe and BentoML, which serve the same artifact with the same other steps.

    python deploy/bench_rivals.py PHOTOS [--requests 20] [--seconds 15] [--rounds 2] [--rival-backend cpu] [--python P]

Our service runs with its defaults, the others on ONNX Runtime or on another backend. P is a Python with LitServe and
BentoML (default: this one), installed by `pip install --constraint deploy/bench-constraints.txt '.[service,bench]'`;
BentoML needs other versions than constraints.txt has.

All servers run throughout and take turns, so that other load on the machine affects all alike: first one client that
sends each of them the same photo in turn (`latency_ratio`: median over the photos, to ours), then open-loop arrivals
at fractions of a bare loop's rate; ours is measured first and again last. Goodput at equal p95 is the highest goodput
of a server with a p95 within `p95_limit_ms`, twice the median latency of a single client on the slowest server. A start
ends with the first response. Prints JSON.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import cyclopts
import httpx
import uvicorn
from bench import (
    BareLoop,
    Response,
    Server,
    open_client,
    read_photos,
    send,
    send_closed,
    send_open,
    serve,
    summarize,
)
from fastapi import FastAPI, UploadFile
from fastapi import Response as HttpResponse

from model.backends.loader import load_session
from model.backends.session import ConcreteBackend
from model.contract import find_bundled_artifact
from model.detail import run_image
from model.images import decode_image
from model.postprocessing.panoptic import make_postprocessor, merge_categories
from service.inference.pipeline import SegmentationResult, encode_result
from service.requests import SegmentOptions

_ENVIRONMENT = {"BENTOML_DO_NOT_TRACK": "True", "OPENBLAS_NUM_THREADS": "1", "USEG_PORT": "0"}
_RIVAL = os.environ.get("RIVAL")
"""The server that this process runs: fastapi, litserve or bentoml; None: the bench."""
_RIVAL_PORT = int(os.environ.get("RIVAL_PORT", 0))
_RIVAL_WORKERS = int(os.environ.get("RIVAL_WORKERS", 1))
_RIVAL_BACKEND: Any = os.environ.get("RIVAL_BACKEND", "cpu")


@dataclass(frozen=True, kw_only=True)
class Loads:
    """What each server gets."""

    requests: int = 20
    """Photos that the single client sends to each."""
    seconds: float = 15.0
    """Duration of an open-loop load."""
    rounds: int = 2
    """Repetitions of each open-loop load."""
    fractions: Annotated[tuple[float, ...], cyclopts.Parameter(consume_multiple=True)] = (0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
    """Rates of the open-loop loads, as fractions of the bare loop's."""


class Chain:
    """Decode, infer, postprocess and encode as our service does, without the service."""

    def __init__(self, artifact: Path | None = None) -> None:
        folder, threads = artifact or find_bundled_artifact(), max(1, 2 // _RIVAL_WORKERS)
        self._contract, self._session = load_session(folder, backend=_RIVAL_BACKEND, threads=threads)

    def segment(self, content: bytes) -> bytes:
        image = decode_image(content)
        raw, prepared = run_image(self._session, image.image, self._contract)
        clusters = make_postprocessor(raw, prepared.letterbox, self._contract, self._contract.thresholds)("panoptic")
        result = SegmentationResult(
            image=image,
            original_size=(image.height, image.width),
            segmentations=(("panoptic", merge_categories(clusters, "panoptic")),),
            clusters={"panoptic": clusters},
            contract=self._contract,
        )
        return encode_result(result, SegmentOptions(), "application/json")[0].content


if _RIVAL == "litserve":
    import litserve

    class LitSegment(litserve.LitAPI):
        """As LitServe's documentation describes."""

        def setup(self, device: str) -> None:
            self.chain = Chain()

        def decode_request(self, request: UploadFile) -> bytes:
            return request.file.read()

        def predict(self, content: bytes) -> bytes:
            return self.chain.segment(content)

        def encode_response(self, output: bytes) -> HttpResponse:
            return HttpResponse(output, media_type="application/json")


if _RIVAL == "bentoml":
    import bentoml

    @bentoml.service(workers=1, threads=2, traffic={"timeout": 30})
    class BentoSegment:
        def __init__(self) -> None:
            self.chain = Chain()

        @bentoml.api
        def segment(self, photo: Path) -> str:
            return self.chain.segment(photo.read_bytes()).decode()


def run_litserve() -> None:
    server = litserve.LitServer(LitSegment(), accelerator="cpu", workers_per_device=_RIVAL_WORKERS, timeout=30)
    server.run(host="127.0.0.1", port=_RIVAL_PORT, generate_client_file=False, log_level="warning")


def run_fastapi() -> None:
    """Serve with FastAPI and uvicorn, whose threads call the session at once."""
    app, chain = FastAPI(), Chain()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/segment")
    def segment(photo: UploadFile) -> HttpResponse:
        return HttpResponse(chain.segment(photo.file.read()), media_type="application/json")

    uvicorn.run(app, host="127.0.0.1", port=_RIVAL_PORT, log_level="warning")


async def send_file(client: httpx.AsyncClient, photo: bytes, *, path: str, field: str) -> httpx.Response:
    return await client.post(path, files={field: ("photo.jpg", photo, "image/jpeg")})


async def send_one(server: Server, photo: bytes) -> None:
    """Send one photo. Raises httpx.HTTPStatusError if the response is an error."""
    async with open_client(server, 60.0) as client:
        (await server.send(client, photo)).raise_for_status()


def list_servers(python: Path, backend: str) -> dict[str, contextlib.AbstractContextManager[Server]]:
    """Return the servers by name, not started yet."""
    here = Path(__file__).resolve()
    lit = partial(send_file, path="/predict", field="request")
    bento = partial(send_file, path="/segment", field="photo")

    def start(name: str, send: Any, command: list[str], port: int, workers: int = 1, ready: str = "/health") -> Any:
        variables = {"RIVAL": name, "RIVAL_PORT": str(port), "RIVAL_WORKERS": str(workers), "RIVAL_BACKEND": backend}
        return serve(command, _ENVIRONMENT | variables, f"http://127.0.0.1:{port}", ready, send=send)

    script = [str(python), str(here)]
    bentoml_command = [str(python.with_name("bentoml")), "serve", "bench_rivals:BentoSegment"]
    bentoml_command += ["--working-dir", str(here.parent), "--port", "18303"]
    return {
        "useg": serve([sys.executable, "-m", "model", "serve"], _ENVIRONMENT),
        "FastAPI": start("fastapi", bento, script, 18304),
        "LitServe, one worker": start("litserve", lit, script, 18301),
        "LitServe, two workers": start("litserve", lit, script, 18302, workers=2),
        "BentoML": start("bentoml", bento, bentoml_command, 18303, ready="/readyz"),
    }


async def measure(servers: dict[str, Server], bare: BareLoop, photos: Sequence[bytes], given: Loads) -> dict[str, Any]:
    """Run all loads on all servers in turn."""
    alone: dict[str, list[Response]] = {name: [] for name in servers}
    cpu_s = dict.fromkeys(servers, 0.0)
    for server in servers.values():
        await send_closed(server, photos, clients=2, seconds=3.0)
    for index in range(given.requests):
        for name, server in servers.items():
            before = server.cpu_s()
            async with open_client(server, 60.0) as client:
                alone[name].append(await send(server, client, photos[index % len(photos)]))
            cpu_s[name] += server.cpu_s() - before
    single = {name: summarize(each, sum(response.seconds for response in each)) for name, each in alone.items()}
    bare_rate, bare_cpu_s = bare.run(given.seconds)
    limit_ms = 2 * max(each["p50_ms"] for each in single.values())
    loads: dict[str, dict[str, Any]] = {name: {} for name in servers}
    for fraction in given.fractions:
        collected: dict[str, list[Response]] = {name: [] for name in servers}
        load = {"rate": fraction * bare_rate, "seconds": given.seconds}
        for _ in range(given.rounds):
            for name, server in servers.items():
                collected[name] += await send_open(server, photos, **load)
        for name, responses in collected.items():
            loads[name][f"{fraction:.0%}"] = summarize(responses, given.seconds * given.rounds)
    return {
        "bare": {"rate_per_s": round(bare_rate, 2), "cpu_s_per_image": round(bare_cpu_s, 4)},
        "one client": single,
        "latency_ratio": {
            name: round(median(a.seconds / b.seconds for a, b in zip(each, alone["useg"], strict=True)), 3)
            for name, each in alone.items()
        },
        "cpu_s_per_image": {name: round(cpu_s[name] / len(each), 4) for name, each in alone.items()},
        "rss_mb": {name: round(server.rss_mb()) for name, server in servers.items()},
        "p95_limit_ms": round(limit_ms),
        "goodput_at_equal_p95": {
            name: max([load["goodput_per_s"] for load in each.values() if load["p95_ms"] <= limit_ms], default=0)
            for name, each in loads.items()
        },
        "loads": loads,
    }


def main(
    photos: Path,
    *,
    loads: Annotated[Loads, cyclopts.Parameter(name="*")] = Loads(),
    python: Path = Path(sys.executable),
    rival_backend: ConcreteBackend = "cpu",
) -> None:
    """Measure all servers with a folder of photos; `python` has litserve and bentoml."""
    images = read_photos(photos)
    bare = BareLoop(find_bundled_artifact(), images, threads=2)
    servers, start = {}, {}
    with contextlib.ExitStack() as stack:
        for name, starting in list_servers(python, rival_backend).items():
            started = time.perf_counter()
            servers[name] = stack.enter_context(starting)
            asyncio.run(send_one(servers[name], images[0]))
            start[name] = {"s": round(time.perf_counter() - started, 1), "cpu_s": round(servers[name].cpu_s(), 1)}
        servers["useg again"] = servers["useg"]
        report = asyncio.run(measure(servers, bare, images, loads))
    print(json.dumps({"start": start, **report}, indent=2))


if __name__ == "__main__":
    match _RIVAL:
        case "fastapi":
            run_fastapi()
        case "litserve":
            run_litserve()
        case _:
            cyclopts.run(main)
