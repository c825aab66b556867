#!/usr/bin/env python3
"""How much the service answers, how fast, and what it does when far more is asked.

    python deploy/bench.py PHOTOS [--seconds 20] [--overload-s 120] [--artifact DIR] [--fake-s S]
        [-- FLAGS OF useg-serve]

Sends photos of a folder, scaled to 0.2, 0.8 and 2.5 megapixels, to a service of its own: four callers at once for the
peak, then open-loop arrivals at 50, 80 and 100 % of it, then at 300 % for two minutes with health asked beside it. A
bare loop of the same session on the same placed pixels runs before and after the peak; its rate and its CPU time are
what the service's are divided by. With --fake-s the network is a fake that takes so long for a picture and no
processor, and there is no bare loop. Prints JSON. Client and service share the machine: on two cores the ratio of rates
counts the client and the decoding against the service, the ratio of CPU times the decoding alone.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from load import Answer, Served, make_fake_command, open_client, read_photos, send_closed, send_open, serve, summarise
from prometheus_client.parser import text_string_to_metric_families

from model.backends.loader import load_session
from model.images import decode_image, letterbox_image
from service.settings import find_bundled_artifact

LIMIT_S = 10.0
"""A later answer is no good one."""
_HEALTH_PERIOD_S = 0.1


class BareLoop:
    """The session alone, on pixels that were placed before."""

    def __init__(self, artifact: Path, photos: Sequence[bytes], threads: int) -> None:
        contract, self._session = load_session(artifact, threads=threads)
        self._placed = []
        for photo in photos:
            pixels, placement = letterbox_image(decode_image(photo).image, contract.input_sizes, contract.stride_px)
            self._placed.append((pixels[None], np.array([placement.size])))

    def run(self, seconds: float) -> tuple[float, float]:
        """Pictures a second, and CPU seconds a picture."""
        for pixels, sizes in self._placed[:3]:
            self._session.run(pixels, sizes)
        started, cpu, runs = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            self._session.run(*self._placed[runs % len(self._placed)])
            runs += 1
        return runs / (time.perf_counter() - started), (time.process_time() - cpu) / runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--artifact", type=Path, default=find_bundled_artifact(), help="directory of the artifact")
    parser.add_argument("--fake-s", type=float, help="seconds that a fake network takes for a picture")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load (20)")
    parser.add_argument("--overload-s", type=float, default=120.0, help="length of the overload, 0 for none (120)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the network (2)")
    parser.add_argument("flags", nargs="*", help="further flags of useg-serve, after --")
    options = parser.parse_args(arguments)
    photos = read_photos(options.photos)
    real = [sys.executable, "-m", "service", "--artifact", str(options.artifact)]
    is_real = options.fake_s is None
    command = real if is_real else make_fake_command(options.fake_s)
    bare = BareLoop(options.artifact, photos, options.threads) if is_real else None
    with serve(
        [*command, "--port", "0", "--threads", str(options.threads), "--shutdown-delay-s", "0", *options.flags]
    ) as served:
        report = asyncio.run(measure(served, bare, photos, options.seconds, options.overload_s))
    print(json.dumps(report, indent=2))
    return 0


async def measure(
    served: Served, bare: BareLoop | None, photos: Sequence[bytes], seconds: float, overload_s: float
) -> dict[str, Any]:
    """All loads in turn."""
    await send_closed(served.url, photos, at_once=2, seconds=3.0)
    alone, _ = await send_closed(served.url, photos, at_once=1, seconds=seconds)
    report: dict[str, Any] = {"one caller": summarise(alone, seconds, LIMIT_S)}
    before = bare.run(seconds / 2) if bare else None
    cpu_s = served.measure_cpu_s()
    answers, took_s = await send_closed(served.url, photos, at_once=4, seconds=seconds)
    cpu_s = (served.measure_cpu_s() - cpu_s) / sum(answer.status == 200 for answer in answers)
    report["peak"] = summarise(answers, took_s, LIMIT_S)
    report["cpu_s_per_picture"] = round(cpu_s, 4)
    peak = float(report["peak"]["goodput_per_s"])
    if bare and before:
        report["bare loop"] = compare([before, bare.run(seconds / 2)], peak, cpu_s)
    for share in (0.5, 0.8, 1.0):
        answers = await send_open(served.url, photos, rate=share * peak, seconds=seconds, limit_s=LIMIT_S)
        report[f"{share:.0%} of the peak"] = summarise(answers, seconds, LIMIT_S)
    if overload_s:
        report["300% of the peak"] = await overload(served, photos, 3 * peak, overload_s)
        again, took_s = await send_closed(served.url, photos, at_once=4, seconds=seconds)
        report["peak again"] = summarise(again, took_s, LIMIT_S)
    report["loop lag"] = await read_lag(served.url)
    report["rss_mb"] = round(served.measure_rss_mb())
    return report


def compare(bare: Sequence[tuple[float, float]], rate_per_s: float, cpu_s: float) -> dict[str, Any]:
    """The service's rate and CPU time a picture, beside those of the bare loop before and after."""
    bare_rate, bare_cpu_s = (float(each) for each in np.mean(bare, axis=0))
    return {
        "rate_per_s": [round(rate, 2) for rate, _ in bare],
        "cpu_s_per_picture": round(bare_cpu_s, 4),
        "rate_ratio": round(rate_per_s / bare_rate, 3),
        "cpu_ratio": round(bare_cpu_s / cpu_s, 3),
    }


async def overload(served: Served, photos: Sequence[bytes], rate: float, seconds: float) -> dict[str, Any]:
    """Far more than can be answered, with health asked ten times a second beside it."""
    health: list[float] = []

    async def watch() -> None:
        async with open_client(served.url, LIMIT_S) as client:
            while True:
                started = time.perf_counter()
                (await client.get("/livez")).raise_for_status()
                health.append(1000 * (time.perf_counter() - started))
                await asyncio.sleep(_HEALTH_PERIOD_S)

    watching = asyncio.create_task(watch())
    started = time.perf_counter()
    answers: list[Answer] = await send_open(served.url, photos, rate=rate, seconds=seconds, limit_s=LIMIT_S)
    took_s = time.perf_counter() - started
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    summary = summarise(answers, took_s, LIMIT_S)
    return {**summary, "health_ms": {f"p{share}": round(float(np.percentile(health, share)), 1) for share in (50, 99)}}


async def read_lag(url: str) -> dict[str, float]:
    """The smallest bucket of the event loop's lag that holds 50 and 99 % of the samples, in milliseconds."""
    async with httpx.AsyncClient(base_url=url) as client:
        families = text_string_to_metric_families((await client.get("/metrics")).text)
    (lag,) = [family for family in families if family.name == "useg_event_loop_lag_seconds"]
    buckets = [(float(each.labels["le"]), each.value) for each in lag.samples if each.name.endswith("_bucket")]
    total = buckets[-1][1]
    return {
        f"p{share}_ms_at_most": next(1000 * bound for bound, count in buckets if count >= total * share / 100)
        for share in (50, 99)
    }


if __name__ == "__main__":
    sys.exit(main())
