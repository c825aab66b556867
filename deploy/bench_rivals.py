#!/usr/bin/env python3
"""Measures our service next to LitServe and BentoML, which serve the same artifact with the same pre- and post-steps.

    python deploy/bench_rivals.py PHOTOS [--seconds 15] [--rounds 2] [--python PYTHON]

PYTHON is an environment with LitServe and BentoML (default: this one), installed by
`pip install --constraint deploy/bench-constraints.txt '.[service,bench]'`; BentoML needs other versions than
constraints.txt has.

All servers run throughout, and the loads take turns, so that other load on the machine affects all alike: first one
client, then open-loop arrivals at fractions of a bare loop's rate. Goodput at equal p95 is the highest goodput of a
server with a p95 within `p95_limit_ms`, twice the median latency of a single client on the slowest server. Prints JSON.
"""

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bench import BareLoop, Response, Sender, Server, read_photos, send_body, send_closed, send_open, serve, summarize

from model.backends.loader import load_session
from model.contract import find_bundled_artifact
from model.images import decode_image, letterbox_image
from model.postprocessing.panoptic import make_postprocessor
from service.inference.pipeline import SegmentationResult
from service.requests import SegmentOptions
from service.responses.encoders import encode_result

_FRACTIONS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
_ENVIRONMENT = {"BENTOML_DO_NOT_TRACK": "True", "OPENBLAS_NUM_THREADS": "1", "USEG_PORT": "0"}


class Chain:
    """Decode, infer, postprocess and encode as our service does, without the service."""

    def __init__(self, threads: int = 2) -> None:
        self._contract, self._session = load_session(find_bundled_artifact(), threads=threads)

    def segment(self, content: bytes) -> bytes:
        image = decode_image(content)
        pixels, letterbox = letterbox_image(image.image, self._contract.input_sizes, self._contract.stride_px)
        (raw,) = self._session.run(pixels[None], np.array([letterbox.size]))
        segmentation = make_postprocessor(raw, letterbox, self._contract, self._contract.thresholds)("panoptic")
        size = (image.height, image.width)
        result = SegmentationResult(image=image, original_size=size, segmentations=(("panoptic", segmentation),))
        return encode_result(result, self._contract, SegmentOptions(), "application/json")[0].content


def run_litserve(port: int, workers: int) -> None:
    """Serve with LitServe, as its documentation describes."""
    import litserve
    from fastapi import Response as HttpResponse
    from fastapi import UploadFile

    class Segment(litserve.LitAPI):
        def setup(self, device: str) -> None:
            self.chain = Chain(threads=max(1, 2 // workers))

        def decode_request(self, request: UploadFile) -> bytes:
            return request.file.read()

        def predict(self, content: bytes) -> bytes:
            return self.chain.segment(content)

        def encode_response(self, output: bytes) -> HttpResponse:
            return HttpResponse(output, media_type="application/json")

    server = litserve.LitServer(Segment(), accelerator="cpu", workers_per_device=workers, timeout=30)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


def __getattr__(name: str) -> Any:
    """Make the service of `bentoml serve bench_rivals:Segment`."""
    if name != "Segment":
        raise AttributeError(name)
    import bentoml

    @bentoml.service(workers=1, threads=2, traffic={"timeout": 30})
    class Segment:
        def __init__(self) -> None:
            self.chain = Chain()

        @bentoml.api
        def segment(self, photo: Path) -> str:
            return self.chain.segment(photo.read_bytes()).decode()

    return Segment


async def send_file(client: httpx.AsyncClient, photo: bytes, *, path: str, field: str) -> httpx.Response:
    return await client.post(path, files={field: ("photo.jpg", photo, "image/jpeg")})


def list_servers(python: Path) -> dict[str, tuple[contextlib.AbstractContextManager[Server], Sender]]:
    """Return the servers by name, not started yet, and how to send them a photo."""
    here = Path(__file__).resolve()
    lit = partial(send_file, path="/predict", field="request")
    bento = partial(send_file, path="/segment", field="photo")

    def start(command: list[str], port: int | None = None, ready: str = "/readyz") -> Any:
        return serve(command, _ENVIRONMENT, f"http://127.0.0.1:{port}" if port else None, ready)

    def start_lit(port: int, workers: int) -> Any:
        return start([str(python), str(here), "--litserve", str(port), str(workers)], port, "/health")

    bento_command = [str(python.with_name("bentoml")), "serve", "bench_rivals:Segment"]
    return {
        "useg": (start([sys.executable, "-m", "model", "serve"]), send_body),
        "LitServe, one worker": (start_lit(18301, 1), lit),
        "LitServe, two workers": (start_lit(18302, 2), lit),
        "BentoML": (start([*bento_command, "--working-dir", str(here.parent), "--port", "18303"], 18303), bento),
    }


async def measure(
    servers: dict[str, tuple[Server, Sender]], bare: BareLoop, photos: Sequence[bytes], seconds: float, rounds: int
) -> dict[str, Any]:
    """Run all loads on all servers in turn."""
    single, cpu_s = {}, {}
    for name, (server, sender) in servers.items():
        await send_closed(server.url, photos, clients=2, seconds=3.0, sender=sender)
        before = server.cpu_s()
        responses, took_s = await send_closed(server.url, photos, clients=1, seconds=seconds, sender=sender)
        single[name] = summarize(responses, took_s)
        cpu_s[name] = round((server.cpu_s() - before) / len(responses), 4)
    bare_rate, bare_cpu_s = bare.run(seconds)
    limit_ms = 2 * max(each["p50_ms"] for each in single.values())
    loads: dict[str, dict[str, Any]] = {name: {} for name in servers}
    for fraction in _FRACTIONS if rounds else ():
        collected: dict[str, list[Response]] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, (server, sender) in servers.items():
                rate = fraction * bare_rate
                collected[name] += await send_open(server.url, photos, rate=rate, seconds=seconds, sender=sender)
        for name, responses in collected.items():
            loads[name][f"{fraction:.0%}"] = summarize(responses, seconds * rounds)
    return {
        "bare": {"rate_per_s": round(bare_rate, 2), "cpu_s_per_image": round(bare_cpu_s, 4)},
        "one client": single,
        "cpu_s_per_image": cpu_s,
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
    parser.add_argument("--seconds", type=float, default=15.0, help="duration of each load (15)")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of the open-loop loads (2)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python with litserve and bentoml")
    parser.add_argument("--litserve", type=int, nargs=2, metavar=("PORT", "WORKERS"), help="run LitServe instead")
    options = parser.parse_args(arguments)
    if options.litserve:
        run_litserve(*options.litserve)
        return 0
    photos = read_photos(options.photos)
    bare = BareLoop(find_bundled_artifact(), photos, threads=2)
    with contextlib.ExitStack() as stack:
        servers = {
            name: (stack.enter_context(server), sender)
            for name, (server, sender) in list_servers(options.python).items()
        }
        report = asyncio.run(measure(servers, bare, photos, options.seconds, options.rounds))
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
