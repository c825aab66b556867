#!/usr/bin/env python3
"""Whether a new version costs anybody an answer: versions swapped under load, bad ones among them.

    python deploy/bench_swaps.py PHOTOS [--artifact DIR] [--swaps 20] [--share 0.7] [--fake-s S]
        [-- FLAGS OF useg-serve]

With --fake-s the networks are fakes that take so long for a picture and no processor, and the pictures are drawn.
Two versions of one artifact in a registry of their own are activated in turn over HTTP, each once the one before is
closed, while callers ask for a share of what the service answers at its peak. Then two bad ones: a network that is cut
short, which is to be refused, and one that finds nothing, which is to be taken back by itself. Prints JSON with
resident MB before and after each swap; exit status 1 if a request failed or a bad version stayed.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from load import Answer, Served, read_photos, send_closed, send_open, serve, summarise

from model.contract import NETWORK_FILE, read_contract
from model.registry.registry import Registry
from model.release.reference import write_reference
from service.settings import find_bundled_artifact

LIMIT_S = 30.0
_ROLLBACK_S = 5.0
_PERIOD_S = 0.25
_PIECE_S = 5.0
"""The load comes in pieces, each begun when the last was sent, whether or not it was answered."""
_PATIENCE_S = 600.0
_BY = "bench"
_ALONE = {"Connection": "close"}
_TESTS = Path(__file__).resolve().parent.parent / "tests"
_FAKE = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from fake_registry import FakeSession, open_artifact
from service.__main__ import main

class SleepySession(FakeSession):
    def run(self, pixels, sizes):
        time.sleep({run_s} * len(pixels))
        return super().run(pixels, sizes)

def open_sleepy(folder):
    contract, session = open_artifact(folder)
    return contract, SleepySession(session.kind)

sys.exit(main(sys.argv[1:], open_artifact=open_sleepy))
"""


def fill_registry(folder: Path, artifact: Path, photos: Path) -> Registry:
    """Versions 1 and 2, which are the same; `blind`, which finds nothing; `short`, whose network is cut short."""
    registry = Registry(folder)
    name = registry.add(artifact, version="1", by=_BY).name
    first = registry.find_version(name, "1")
    if not read_contract(first).reference:
        write_reference(first, photos, 100, "cpu", 2)
    for version in ("2", "blind", "short"):
        registry.add(first, version=version, by=_BY)
    blind = registry.find_version(name, "blind")
    contract = read_contract(blind)
    thresholds = replace(contract.thresholds, score=1.0, stuff_area=1.0)
    replace(contract, thresholds=thresholds).write(blind)  # the network is the same, so its golden answers are
    _cut(registry, name, 1000)
    return registry


def fill_fake_registry(folder: Path) -> Registry:
    """The same of fakes."""
    from fake_registry import NAME, SEGMENTS, make_registry

    kinds = {"1": "good", "2": "good", "blind": "blind", "short": "good"}
    registry = make_registry(folder, kinds, reference={"segments": SEGMENTS})
    _cut(registry, NAME, 1)
    return registry


def _cut(registry: Registry, model: str, missing_bytes: int) -> None:
    """Shorten the network of `short`, and activate version 1."""
    network = registry.find_version(model, "short") / NETWORK_FILE
    network.write_bytes(network.read_bytes()[:-missing_bytes])
    registry.activate(model, "1", by=_BY)


async def send_alone(client: httpx.AsyncClient, photo: bytes) -> httpx.Response:
    """A request on a connection of its own: none is lost to a service that closes one which was idle."""
    return await client.post("/v1/segment", content=photo, headers={"Content-Type": "image/jpeg", **_ALONE})


class Load:
    """Callers who keep coming."""

    def __init__(self, url: str, photos: Sequence[bytes], rate: float) -> None:
        self.url, self.photos, self.rate = url, photos, rate
        self._pieces: list[asyncio.Task[list[Answer]]] = []
        self._task = asyncio.create_task(self._send())

    async def stop(self) -> list[Answer]:
        """All answers."""
        self._task.cancel()
        return [answer for piece in self._pieces for answer in await piece]

    async def _send(self) -> None:
        while True:
            load = send_open(self.url, self.photos, rate=self.rate, seconds=_PIECE_S, limit_s=LIMIT_S, send=send_alone)
            self._pieces.append(asyncio.create_task(load))
            await asyncio.sleep(_PIECE_S)


class Control:
    """The registry's own HTTP interface."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._path = f"/v1/models/{model}"

    async def activate(self, version: str) -> int:
        """Status of the answer."""
        return (await self._client.post(f"{self._path}/active", json={"version": version})).status_code

    async def look(self) -> dict[str, Any]:
        """The model and its versions."""
        return dict((await self._client.get(self._path)).json())

    async def see(self, serving: str, *, alone: bool = True) -> dict[str, Any]:
        """The model, once that version answers and, if `alone`, no other is open; RuntimeError if it never will."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                status = await self.look()
                is_alone = not {"standby", "opening"} & {each["state"] for each in status["versions"]}
                if status["serving"] == serving and (is_alone or not alone):
                    return status
                if is_alone and status["active"] != serving:
                    raise RuntimeError(f"{serving} does not answer: {status['history'][-1]}")
                await asyncio.sleep(_PERIOD_S)


async def swap(control: Control, served: Served, swaps: int) -> dict[str, Any]:
    """The versions in turn, each until the other is closed."""
    times, curve = [], [round(served.measure_rss_mb(), 1)]
    for turn in range(swaps):
        version = str(2 - turn % 2)
        started = time.monotonic()
        await control.activate(version)
        await control.see(version, alone=False)
        times.append(time.monotonic() - started)
        await control.see(version)
        curve.append(round(served.measure_rss_mb(), 1))
        print(f"swap {turn + 1}: {times[-1]:.1f} s, {curve[-1]} MB", file=sys.stderr)
    mean_s = round(sum(times) / swaps, 1)
    return {"swaps": swaps, "swap_s": {"mean": mean_s, "most": round(max(times), 1)}, "rss_mb": curve}


async def try_bad(control: Control) -> dict[str, Any]:
    """What becomes of a version that cannot be opened, and of one that answers nonsense."""
    good = (await control.look())["serving"]
    short = await control.activate("short")
    has_stayed = (await control.look())["active"] == "short"
    started = time.monotonic()
    blind = await control.activate("blind")
    await control.see("blind", alone=False)
    answered = time.monotonic()
    status = await control.see(good, alone=False)
    return {
        "short": {"status": short, "stayed": has_stayed},
        "blind": {
            "status": blind,
            "opened_s": round(answered - started, 1),
            "taken_back_s": round(time.monotonic() - answered, 1),
            "reason": status["history"][-1]["reason"],
            "stayed": status["active"] == "blind",
        },
    }


async def measure(
    served: Served,
    model: str,
    photos: Sequence[bytes],
    options: argparse.Namespace,
    work: Callable[[Control], Awaitable[dict[str, Any]]],
) -> dict[str, Any]:
    """What `work` finds under load, what callers felt of it, and the memory when all is over."""
    await send_closed(served.url, photos, at_once=4, seconds=options.peak_s / 2)
    alone, took_s = await send_closed(served.url, photos, at_once=4, seconds=options.peak_s)
    rate = options.share * len(alone) / took_s
    started = time.monotonic()
    load = Load(served.url, photos, rate)
    async with httpx.AsyncClient(base_url=served.url, timeout=60.0, headers=_ALONE) as client:
        report = await work(Control(client, model))
        seconds = time.monotonic() - started
        answers = await load.stop()
    return {
        "rate_per_s": round(rate, 2),
        "requests": len(answers),
        "failed": sum(answer.status != 200 for answer in answers),
        **report,
        "rss_end_mb": round(served.measure_rss_mb(), 1),
        **summarise(answers, seconds, LIMIT_S),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--artifact", type=Path, default=find_bundled_artifact(), help="directory of the artifact")
    parser.add_argument("--fake-s", type=float, help="seconds that a fake network takes for a picture")
    parser.add_argument("--peak-s", type=float, default=20.0, help="seconds for which the peak is measured (20)")
    parser.add_argument("--swaps", type=int, default=20, help="how often a version is replaced (20)")
    parser.add_argument("--share", type=float, default=0.7, help="share of the peak that is asked for (0.7)")
    parser.add_argument("flags", nargs="*", help="further flags of useg-serve, after --")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.fake_s is None:
            command, photos = [sys.executable, "-m", "service"], read_photos(options.photos)
            registry = fill_registry(Path(folder) / "registry", options.artifact, options.photos)
        else:
            sys.path.append(str(_TESTS))
            from fake_service import draw_halves, save

            code = _FAKE.format(tests=str(_TESTS), root=str(_TESTS.parent), run_s=options.fake_s)
            command, photos = [sys.executable, "-c", code], [save(draw_halves())]
            registry = fill_fake_registry(Path(folder))
        report = run([*command, "--port", "0", "--drain-delay-s", "0", *options.flags], registry, photos, options)
    print(json.dumps(report, indent=2))
    good, bad = report["good versions"], report["bad versions"]
    has_stayed = bad["short"]["stayed"] or bad["blind"]["stayed"]
    return 1 if good["failed"] or bad["failed"] or has_stayed else 0


def run(
    command: Sequence[str], registry: Registry, photos: Sequence[bytes], options: argparse.Namespace
) -> dict[str, Any]:
    """Two services one after the other: a new version is watched for a moment, then for as long as by default."""
    (model,) = registry.list_models()
    command = [*command, "--registry", str(registry.folder)]
    with serve([*command, "--rollback-s", str(_ROLLBACK_S)]) as served:
        work = partial(swap, served=served, swaps=options.swaps)
        good = asyncio.run(measure(served, model, photos, options, work))
    with serve(command) as served:
        bad = asyncio.run(measure(served, model, photos, options, try_bad))
    return {"good versions": good, "bad versions": bad}


if __name__ == "__main__":
    sys.exit(main())
