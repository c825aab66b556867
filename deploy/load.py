"""Load on a service, as strangers make it: requests come when they come, whether or not earlier ones were answered."""

import asyncio
import io
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

SIZES_MP = (0.2, 0.8, 2.5)
"""Megapixels that photos are scaled to, in turn."""
_READY_S = 300.0
_PAUSE_S = 1.0
"""What a caller that was turned away waits for before it asks again."""
_TESTS = Path(__file__).resolve().parent.parent / "tests"
_FAKE = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from fake_service import CONTRACT, RedSession
from service.cli import run
from service.settings import read_settings

class SleepySession(RedSession):
    def run(self, pixels, sizes):
        time.sleep({run_s} * len(pixels))
        return super().run(pixels, sizes)

run(read_settings(), load_model=lambda: (CONTRACT, SleepySession()))
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one request; status 0 is a connection that broke."""

    seconds: float
    status: int
    stages_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A service in a process of its own."""

    url: str
    process: psutil.Process

    def measure_cpu_s(self) -> float:
        """CPU seconds of the process so far."""
        times = [each.cpu_times() for each in (self.process, *self.process.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def measure_rss_mb(self) -> float:
        """Resident memory of the process and its children."""
        family = (self.process, *self.process.children(recursive=True))
        return sum(each.memory_info().rss for each in family) / 2**20


def make_fake_command(run_s: float) -> list[str]:
    """A service whose network takes so long for a picture and no processor: a device that is not this machine's."""
    code = _FAKE.format(tests=str(_TESTS), root=str(_TESTS.parent), run_s=run_s)
    return [sys.executable, "-c", code]


def read_photos(folder: Path, count: int = 24, sizes_mp: Sequence[float] = SIZES_MP) -> list[bytes]:
    """Photos of a folder, evenly chosen, scaled to the sizes in turn, as JPEG of quality 90."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    photos = []
    for place, path in enumerate(paths[:: max(1, len(paths) // count)][:count]):
        with Image.open(path) as source:
            scale = (sizes_mp[place % len(sizes_mp)] * 1e6 / (source.width * source.height)) ** 0.5
            size = (round(source.width * scale), round(source.height * scale))
            scaled = source.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        scaled.save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


@contextmanager
def serve(command: Sequence[str], url: str | None = None, ready: str = "/readyz") -> Iterator[Served]:
    """The service that a command starts; `url` is where it will be, if it does not say so in its first line."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL if url else subprocess.PIPE, text=True) as process:
        try:
            if url is None:
                assert process.stdout is not None
                url = process.stdout.readline().removeprefix("useg is ready: ").strip().rstrip("/")
            _wait_until_ready(url + ready, process)
            yield Served(url=url, process=psutil.Process(process.pid))
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            process.wait(60)
            for child in children:  # LitServe leaves its workers behind
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def _wait_until_ready(url: str, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + _READY_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{url} did not become ready")


Sender = Callable[[httpx.AsyncClient, bytes], Awaitable[httpx.Response]]


async def send_body(client: httpx.AsyncClient, photo: bytes) -> httpx.Response:
    """Ask our own route."""
    return await client.post("/v1/segment", content=photo, headers={"Content-Type": "image/jpeg"})


async def ask(client: httpx.AsyncClient, send: Sender, photo: bytes) -> Answer:
    """One request, and what became of it."""
    started = time.perf_counter()
    try:
        response = await send(client, photo)
    except httpx.TransportError:
        return Answer(seconds=time.perf_counter() - started, status=0)
    stages = re.findall(r"(\w+);dur=([\d.]+)", response.headers.get("server-timing", ""))
    return Answer(
        seconds=time.perf_counter() - started,
        status=response.status_code,
        stages_ms={name: float(milliseconds) for name, milliseconds in stages},
    )


def open_client(url: str, timeout_s: float) -> httpx.AsyncClient:
    """A client that never waits for a connection of its own."""
    return httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=httpx.Limits(max_connections=None))


async def send_open(
    url: str, photos: Sequence[bytes], *, rate: float, seconds: float, limit_s: float, send: Sender = send_body
) -> list[Answer]:
    """Arrivals as a Poisson process, the same each time."""
    rng = np.random.default_rng(0)
    async with open_client(url, limit_s) as client:
        loop, tasks = asyncio.get_running_loop(), []
        due = loop.time()
        until = due + seconds
        while (due := due + rng.exponential(1 / rate)) < until:
            await asyncio.sleep(due - loop.time())
            tasks.append(asyncio.create_task(ask(client, send, photos[rng.integers(len(photos))])))
        return list(await asyncio.gather(*tasks))


async def send_closed(
    url: str, photos: Sequence[bytes], *, at_once: int, seconds: float, send: Sender = send_body
) -> tuple[list[Answer], float]:
    """Answers to callers who each ask again as soon as they were answered, and the seconds it really took."""
    rng = np.random.default_rng(0)
    answers: list[Answer] = []
    started = time.perf_counter()
    async with open_client(url, 60.0) as client:

        async def call() -> None:
            while time.perf_counter() - started < seconds:
                answers.append(await ask(client, send, photos[rng.integers(len(photos))]))
                if answers[-1].status in (429, 503):
                    await asyncio.sleep(_PAUSE_S)

        await asyncio.gather(*(call() for _ in range(at_once)))
    return answers, time.perf_counter() - started


def summarise(answers: Sequence[Answer], seconds: float, limit_s: float) -> dict[str, object]:
    """Figures of one load; a good answer is a 200 within the limit."""
    good = [answer for answer in answers if answer.status == 200 and answer.seconds <= limit_s]
    waits = [answer.seconds for answer in good] or [float("nan")]
    stages = sorted({stage for answer in good for stage in answer.stages_ms})
    statuses = sorted({answer.status for answer in answers})
    return {
        "sent_per_s": round(len(answers) / seconds, 2),
        "goodput_per_s": round(len(good) / seconds, 2),
        "p50_ms": round(1000 * float(np.percentile(waits, 50)), 1),
        "p95_ms": round(1000 * float(np.percentile(waits, 95)), 1),
        "p99_ms": round(1000 * float(np.percentile(waits, 99)), 1),
        "rejected_share": round(sum(answer.status in (429, 503) for answer in answers) / max(1, len(answers)), 3),
        "statuses": {status: sum(answer.status == status for answer in answers) for status in statuses},
        "stages_ms": {
            stage: round(float(np.mean([answer.stages_ms.get(stage, 0.0) for answer in good])), 1) for stage in stages
        },
    }
