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

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import httpx
from bench import (
    BareLoop,
    Response,
    Sender,
    Server,
    open_client,
    read_photos,
    send,
    send_body,
    send_closed,
    send_open,
    serve,
    summarize,
)

from model.backends.loader import load_session
from model.backends.session import ConcreteBackend
from model.contract import find_bundled_artifact
from model.detail import run_image
from model.images import decode_image
from model.postprocessing.panoptic import make_postprocessor, merge_categories
from service.inference.pipeline import SegmentationResult, encode_result
from service.requests import SegmentOptions

_BACKEND_VARIABLE = "RIVAL_BACKEND"
_ENVIRONMENT = {"BENTOML_DO_NOT_TRACK": "True", "OPENBLAS_NUM_THREADS": "1", "USEG_PORT": "0"}


class Chain:
    """Decode, infer, postprocess and encode as our service does, without the service."""

    def __init__(self, *, threads: int = 2, artifact: Path | None = None) -> None:
        artifact = artifact or find_bundled_artifact()
        backend: Any = os.environ.get(_BACKEND_VARIABLE, "cpu")
        self._contract, self._session = load_session(artifact, backend=backend, threads=threads)

    def segment(self, content: bytes) -> bytes:
        image = decode_image(content)
        raw, prepared = run_image(self._session, image.image, self._contract)
        clusters = make_postprocessor(raw, prepared.letterbox, self._contract, self._contract.thresholds)("panoptic")
        result = SegmentationResult(
            image=image,
            original_size=(image.height, image.width),
            segmentations=(("panoptic", merge_categories(clusters, "panoptic")),),
            clusters={"panoptic": clusters},
        )
        return encode_result(result, self._contract, SegmentOptions(), "application/json")[0].content


def run_fastapi(port: int, workers: int) -> None:
    """Serve with FastAPI and uvicorn, whose threads call the session at once."""
    import uvicorn
    from fastapi import FastAPI, UploadFile
    from fastapi import Response as HttpResponse

    app, chain = FastAPI(), Chain(threads=max(1, 2 // workers))

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/segment")
    def segment(photo: UploadFile) -> HttpResponse:
        return HttpResponse(chain.segment(photo.file.read()), media_type="application/json")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def run_litserve(port: int, workers: int) -> None:
    """Serve with LitServe, as its documentation describes."""
    import litserve

    api = sys.modules[__name__].LitSegment(threads=max(1, 2 // workers))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=30)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


def make_lit_api() -> Any:
    """Make the class that LitServe's workers unpickle."""
    import litserve
    from fastapi import Response as HttpResponse
    from fastapi import UploadFile

    class LitSegment(litserve.LitAPI):
        def __init__(self, threads: int) -> None:
            super().__init__()
            self.threads = threads

        def setup(self, device: str) -> None:
            self.chain = Chain(threads=self.threads)

        def decode_request(self, request: UploadFile) -> bytes:
            return request.file.read()

        def predict(self, content: bytes) -> bytes:
            return self.chain.segment(content)

        def encode_response(self, output: bytes) -> HttpResponse:
            return HttpResponse(output, media_type="application/json")

    LitSegment.__qualname__ = "LitSegment"
    return LitSegment


def make_bento_service() -> Any:
    """Make the service of `bentoml serve bench_rivals:BentoSegment`."""
    import bentoml

    @bentoml.service(workers=1, threads=2, traffic={"timeout": 30})
    class BentoSegment:
        def __init__(self) -> None:
            self.chain = Chain()

        @bentoml.api
        def segment(self, photo: Path) -> str:
            return self.chain.segment(photo.read_bytes()).decode()

    return BentoSegment


_MAKERS = {"LitSegment": make_lit_api, "BentoSegment": make_bento_service}


def __getattr__(name: str) -> Any:
    """Make a class that a worker imports by its name, of a library that the other servers do without."""
    if name not in _MAKERS:
        raise AttributeError(name)
    return globals().setdefault(name, _MAKERS[name]())


async def send_file(client: httpx.AsyncClient, photo: bytes, *, path: str, field: str) -> httpx.Response:
    return await client.post(path, files={field: ("photo.jpg", photo, "image/jpeg")})


async def send_one(server: Server, sender: Sender, photo: bytes) -> None:
    """Send one photo. Raises httpx.HTTPStatusError if the response is an error."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
        (await sender(client, photo)).raise_for_status()


def list_servers(python: Path, backend: str) -> dict[str, tuple[contextlib.AbstractContextManager[Server], Sender]]:
    """Return the servers by name, not started yet, and how to send them a photo."""
    here = Path(__file__).resolve()
    lit = partial(send_file, path="/predict", field="request")
    bento = partial(send_file, path="/segment", field="photo")

    def start(command: list[str], port: int | None = None, ready: str = "/readyz") -> Any:
        environment = _ENVIRONMENT | {_BACKEND_VARIABLE: backend}
        return serve(command, environment, f"http://127.0.0.1:{port}" if port else None, ready)

    def start_rival(name: str, port: int, workers: int) -> Any:
        return start([str(python), str(here), "--serve", name, str(port), str(workers)], port, "/health")

    bento_command = [str(python.with_name("bentoml")), "serve", "bench_rivals:BentoSegment"]
    return {
        "useg": (start([sys.executable, "-m", "model", "serve"]), send_body),
        "FastAPI": (start_rival("fastapi", 18304, 1), bento),
        "LitServe, one worker": (start_rival("litserve", 18301, 1), lit),
        "LitServe, two workers": (start_rival("litserve", 18302, 2), lit),
        "BentoML": (start([*bento_command, "--working-dir", str(here.parent), "--port", "18303"], 18303), bento),
    }


async def measure(
    servers: dict[str, tuple[Server, Sender]],
    bare: BareLoop,
    photos: Sequence[bytes],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Run all loads on all servers in turn."""
    alone: dict[str, list[Response]] = {name: [] for name in servers}
    cpu_s = dict.fromkeys(servers, 0.0)
    for server, sender in servers.values():
        await send_closed(server.url, photos, clients=2, seconds=3.0, sender=sender)
    for index in range(options.requests):
        for name, (server, sender) in servers.items():
            before = server.cpu_s()
            async with open_client(server.url, 60.0) as client:
                alone[name].append(await send(client, sender, photos[index % len(photos)]))
            cpu_s[name] += server.cpu_s() - before
    single = {name: summarize(each, sum(response.seconds for response in each)) for name, each in alone.items()}
    bare_rate, bare_cpu_s = bare.run(options.seconds)
    limit_ms = 2 * max(each["p50_ms"] for each in single.values())
    loads: dict[str, dict[str, Any]] = {name: {} for name in servers}
    for fraction in options.fractions:
        collected: dict[str, list[Response]] = {name: [] for name in servers}
        load = {"rate": fraction * bare_rate, "seconds": options.seconds}
        for _ in range(options.rounds):
            for name, (server, sender) in servers.items():
                collected[name] += await send_open(server.url, photos, sender=sender, **load)
        for name, responses in collected.items():
            loads[name][f"{fraction:.0%}"] = summarize(responses, options.seconds * options.rounds)
    return {
        "bare": {"rate_per_s": round(bare_rate, 2), "cpu_s_per_image": round(bare_cpu_s, 4)},
        "one client": single,
        "latency_ratio": {
            name: round(median(a.seconds / b.seconds for a, b in zip(each, alone["useg"], strict=True)), 3)
            for name, each in alone.items()
        },
        "cpu_s_per_image": {name: round(cpu_s[name] / len(each), 4) for name, each in alone.items()},
        "rss_mb": {name: round(server.rss_mb()) for name, (server, _) in servers.items()},
        "p95_limit_ms": round(limit_ms),
        "goodput_at_equal_p95": {
            name: max([load["goodput_per_s"] for load in each.values() if load["p95_ms"] <= limit_ms], default=0)
            for name, each in loads.items()
        },
        "loads": loads,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?", help="folder of photos")
    parser.add_argument("--requests", type=int, default=20, help="photos that the single client sends to each (20)")
    parser.add_argument("--seconds", type=float, default=15.0, help="duration of an open-loop load (15)")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of each open-loop load (2)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python with litserve and bentoml")
    parser.add_argument(
        "--rival-backend", choices=get_args(ConcreteBackend), default="cpu", help="backend of the others (cpu)"
    )
    parser.add_argument(
        "--fractions", type=float, nargs="*", default=(0.5, 0.7, 0.8, 0.9, 1.0, 1.2), help="of the bare loop's rate"
    )
    parser.add_argument("--serve", nargs=3, metavar=("NAME", "PORT", "WORKERS"), help="run FastAPI or LitServe instead")
    options = parser.parse_args(arguments)
    if options.serve:
        name, port, workers = options.serve
        {"fastapi": run_fastapi, "litserve": run_litserve}[name](int(port), int(workers))
        return 0
    photos = read_photos(options.photos)
    bare = BareLoop(find_bundled_artifact(), photos, threads=2)
    servers, start = {}, {}
    with contextlib.ExitStack() as stack:
        for name, (starting, sender) in list_servers(options.python, options.rival_backend).items():
            started = time.perf_counter()
            servers[name] = (stack.enter_context(starting), sender)
            asyncio.run(send_one(*servers[name], photos[0]))
            start[name] = {"s": round(time.perf_counter() - started, 1), "cpu_s": round(servers[name][0].cpu_s(), 1)}
        servers["useg again"] = servers["useg"]
        report = asyncio.run(measure(servers, bare, photos, options))
    print(json.dumps({"start": start, **report}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
