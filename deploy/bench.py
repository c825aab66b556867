#!/usr/bin/env python3
"""Measures the throughput and latency of the service, and its behaviour under overload.

    python deploy/bench.py PHOTOS [--seconds 20] [--overload-s 120] [--artifact DIR] [-- OPTIONS]

Starts a service and sends photos of a folder, scaled to 0.2, 0.8 and 2.5 megapixels: first one client at a time, then
four for the peak rate, then open-loop arrivals at 50, 80 and 100 % of the peak, then at 300 % for two minutes while
health is checked. Before and after the peak, a bare loop runs the same session on prepared inputs; the service is
reported relative to it. OPTIONS are options of `useg serve`. Prints JSON. Client and service share the machine: on two
cores the ratio of the rates counts the client and the decoding against the service, the ratio of the CPU times only
the decoding.
"""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cyclopts
import httpx
import numpy as np
import psutil
from PIL import Image

from model.backends.loader import load_session
from model.contract import find_bundled_artifact
from model.images import decode_image, letterbox_image

MAX_LATENCY_S = 10.0
"""A later response does not count as successful."""
SIZES_MP = (0.2, 0.8, 2.5)
"""Megapixels that photos are scaled to, in turn."""
_READY = "useg is ready: "
_REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Response:
    """The outcome of one request; status 0 is a broken connection."""

    seconds: float
    status: int
    stages_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Server:
    """The service in a process of its own."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """Return the CPU seconds of the process so far."""
        times = self.process.cpu_times()
        return times.user + times.system


class BareLoop:
    """Runs the session of an artifact without a service, on prepared inputs."""

    def __init__(self, artifact: Path, photos: Sequence[bytes], threads: int) -> None:
        contract, self._session = load_session(artifact, backend="auto", threads=threads)
        self._inputs = []
        for photo in photos:
            pixels, letterbox = letterbox_image(decode_image(photo).image, contract.input_sizes, contract.stride_px)
            self._inputs.append((pixels[None], np.array([letterbox.size])))

    def run(self, seconds: float) -> tuple[float, float]:
        """Return images per second and CPU seconds per image."""
        for pixels, sizes in self._inputs[:3]:
            self._session.run(pixels, sizes)
        started, cpu, runs = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            self._session.run(*self._inputs[runs % len(self._inputs)])
            runs += 1
        return runs / (time.perf_counter() - started), (time.process_time() - cpu) / runs


def main(
    photos: Path,
    *options: str,
    artifact: Path | None = None,
    seconds: float = 20.0,
    overload_s: float = 120.0,
    threads: int = 2,
) -> None:
    """Measure the service at all loads, each for `seconds`, with an overload of `overload_s` (0 for none).

    `options`, after `--`, are those of `useg serve`; `threads` are those of the network.
    """
    artifact = artifact or find_bundled_artifact()
    images = read_photos(photos)
    bare = BareLoop(artifact, images, threads)
    command = [sys.executable, "-m", "model", "serve", "--artifact", str(artifact), *options]
    settings = {"USEG_PORT": "0", "USEG_INTRA_OP_THREADS": str(threads), "USEG_SHUTDOWN_DELAY_S": "0"}
    with serve(command, settings) as server:
        report = asyncio.run(measure(server, bare, images, seconds, overload_s))
    print(json.dumps(report, indent=2))


async def measure(
    server: Server, bare: BareLoop, photos: Sequence[bytes], seconds: float, overload_s: float
) -> dict[str, Any]:
    """Run all loads in turn."""
    await send_closed(server, photos, clients=2, seconds=3.0)
    single, _ = await send_closed(server, photos, clients=1, seconds=seconds)
    report: dict[str, Any] = {"one client": summarize(single, seconds)}
    before = bare.run(seconds / 2)
    cpu_s = server.cpu_s()
    responses, took_s = await send_closed(server, photos, clients=4, seconds=seconds)
    cpu_s = (server.cpu_s() - cpu_s) / max(1, sum(response.status == 200 for response in responses))
    report["peak"] = summarize(responses, took_s)
    report["cpu_s_per_image"] = round(cpu_s, 4)
    peak = float(report["peak"]["goodput_per_s"])
    report["bare loop"] = compare([before, bare.run(seconds / 2)], peak, cpu_s)
    for fraction in (0.5, 0.8, 1.0) if peak else ():  # no peak: every response took longer than the maximum
        responses = await send_open(server, photos, rate=fraction * peak, seconds=seconds)
        report[f"{fraction:.0%} of the peak"] = summarize(responses, seconds)
    if overload_s and peak:
        report["300% of the peak"] = await overload(server, photos, 3 * peak, overload_s)
        again, took_s = await send_closed(server, photos, clients=4, seconds=seconds)
        report["peak again"] = summarize(again, took_s)
    report["rss_mb"] = round(server.process.memory_info().rss / 2**20)
    return report


def compare(bare: Sequence[tuple[float, float]], rate_per_s: float, cpu_s: float) -> dict[str, Any]:
    """Return the service's rate and CPU time per image relative to the bare loop before and after."""
    bare_rate, bare_cpu_s = (float(each) for each in np.mean(bare, axis=0))
    return {
        "rate_per_s": [round(rate, 2) for rate, _ in bare],
        "cpu_s_per_image": round(bare_cpu_s, 4),
        "rate_ratio": round(rate_per_s / bare_rate, 3),
        "cpu_ratio": round(bare_cpu_s / cpu_s, 3),
    }


async def overload(server: Server, photos: Sequence[bytes], rate: float, seconds: float) -> dict[str, Any]:
    """Send more than the service can process while its health is checked ten times a second."""
    health: list[float] = []

    async def watch() -> None:
        async with open_client(server, MAX_LATENCY_S) as client:
            while True:
                started = time.perf_counter()
                (await client.get("/livez")).raise_for_status()
                health.append(1000 * (time.perf_counter() - started))
                await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    started = time.perf_counter()
    responses = await send_open(server, photos, rate=rate, seconds=seconds)
    took_s = time.perf_counter() - started
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    quantiles = {f"p{percent}": round(float(np.percentile(health, percent)), 1) for percent in (50, 99)}
    return {**summarize(responses, took_s), "health_ms": quantiles}


def read_photos(folder: Path, count: int = 24, sizes_mp: Sequence[float] = SIZES_MP) -> list[bytes]:
    """Return evenly chosen photos of a folder, scaled to the sizes in turn, as JPEG of quality 90."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    photos = []
    for index, path in enumerate(paths[:: max(1, len(paths) // count)][:count]):
        with Image.open(path) as source:
            scale = (sizes_mp[index % len(sizes_mp)] * 1e6 / (source.width * source.height)) ** 0.5
            size = (round(source.width * scale), round(source.height * scale))
            scaled = source.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        scaled.save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


@contextmanager
def serve(command: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    """Start a service and wait until it is ready, which it prints with its address in its first line."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_REPOSITORY), **environment},
    ) as process:
        try:
            assert process.stdout is not None
            first_line = process.stdout.readline()
            if not first_line.startswith(_READY):
                raise RuntimeError("the service did not become ready")
            yield Server(url=first_line.removeprefix(_READY).strip().rstrip("/"), process=psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def open_client(server: Server, timeout_s: float) -> httpx.AsyncClient:
    """Return a client without a limit on its connections."""
    return httpx.AsyncClient(base_url=server.url, timeout=timeout_s, limits=httpx.Limits(max_connections=None))


async def send(client: httpx.AsyncClient, photo: bytes) -> Response:
    """Send one request."""
    started = time.perf_counter()
    try:
        response = await client.post("/v1/segment", content=photo, headers={"Content-Type": "image/jpeg"})
    except httpx.TransportError:
        return Response(seconds=time.perf_counter() - started, status=0)
    stages = re.findall(r"(\w+);dur=([\d.]+)", response.headers.get("server-timing", ""))
    return Response(
        seconds=time.perf_counter() - started,
        status=response.status_code,
        stages_ms={name: float(milliseconds) for name, milliseconds in stages},
    )


async def send_open(server: Server, photos: Sequence[bytes], *, rate: float, seconds: float) -> list[Response]:
    """Send requests as a Poisson process (always the same one), whether or not earlier ones have finished."""
    rng = np.random.default_rng(0)
    async with open_client(server, MAX_LATENCY_S) as client:
        loop, tasks = asyncio.get_running_loop(), []
        due = loop.time()
        until = due + seconds
        while (due := due + rng.exponential(1 / rate)) < until:
            await asyncio.sleep(due - loop.time())
            tasks.append(asyncio.create_task(send(client, photos[rng.integers(len(photos))])))
        return list(await asyncio.gather(*tasks))


async def send_closed(
    server: Server, photos: Sequence[bytes], *, clients: int, seconds: float
) -> tuple[list[Response], float]:
    """Let clients send the next request when the last one has finished; return the responses and the duration."""
    rng = np.random.default_rng(0)
    responses: list[Response] = []
    started = time.perf_counter()
    async with open_client(server, 60.0) as client:

        async def run_client() -> None:
            while time.perf_counter() - started < seconds:
                responses.append(await send(client, photos[rng.integers(len(photos))]))
                if responses[-1].status in (429, 503):
                    await asyncio.sleep(1.0)

        await asyncio.gather(*(run_client() for _ in range(clients)))
    return responses, time.perf_counter() - started


def summarize(responses: Sequence[Response], seconds: float, max_latency_s: float = MAX_LATENCY_S) -> dict[str, Any]:
    """Return the metrics of one load; successful is a 200 within the maximum latency."""
    good = [response for response in responses if response.status == 200 and response.seconds <= max_latency_s]
    latencies = [response.seconds for response in good] or [float("nan")]
    stages = sorted({stage for response in good for stage in response.stages_ms})
    statuses = sorted({response.status for response in responses})
    rejected = sum(response.status in (429, 503) for response in responses)
    return {
        "sent_per_s": round(len(responses) / seconds, 2),
        "goodput_per_s": round(len(good) / seconds, 2),
        **{f"p{percent}_ms": round(1000 * float(np.percentile(latencies, percent)), 1) for percent in (50, 95, 99)},
        "rejected_fraction": round(rejected / max(1, len(responses)), 3),
        "statuses": {status: sum(response.status == status for response in responses) for status in statuses},
        "stages_ms": {
            stage: round(float(np.mean([response.stages_ms.get(stage, 0.0) for response in good])), 1)
            for stage in stages
        },
    }


if __name__ == "__main__":
    cyclopts.run(main)
