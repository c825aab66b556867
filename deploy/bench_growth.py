#!/usr/bin/env python3
"""Whether the service's memory grows: its resident size over many requests of every kind.

    python deploy/bench_growth.py PHOTOS [--requests 20000] [--at-once 4]

The network is a fake that answers at once, so that everything else does its work as often as asked: photos of three
sizes, each task, each of three answers, odd and broken pictures, refused options, callers who hang up. Prints JSON with
the curve: resident MB of the service after each twentieth of the requests. The first tenth warms pools and caches;
growth counts from there.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from load import Served, make_fake_command, open_client, read_photos, serve

_TESTS = Path(__file__).resolve().parent.parent / "tests"
_TASKS = ("panoptic", "instance", "semantic")
_ANSWERS = ("application/json", "image/png", "image/jpeg")


async def ask_one(client: httpx.AsyncClient, photos: Sequence[bytes], odd: Sequence[bytes], rng: random.Random) -> int:
    """A request of some kind; its status, 0 where the caller hung up."""
    kind = rng.random()
    content = rng.choice(odd) if kind < 0.3 else rng.choice(photos)
    parameters = {"task": rng.choice(_TASKS)} if kind < 0.95 else {"tsak": "all"}
    headers = {"Accept": rng.choice(_ANSWERS), "Content-Type": "image/jpeg"}
    try:
        timeout = httpx.Timeout(60.0, read=0.02) if 0.3 < kind < 0.33 else 60.0
        answer = await client.post("/v1/segment", params=parameters, content=content, headers=headers, timeout=timeout)
    except httpx.ReadTimeout:
        return 0
    return answer.status_code


async def measure(served: Served, photos: Sequence[bytes], requests: int, at_once: int) -> dict[str, Any]:
    """The curve, and what was answered."""
    from odd_pictures import draw_odd_pictures

    odd = [content for content, _ in draw_odd_pictures().values()]
    rng, statuses, curve = random.Random(0), {}, [round(served.measure_rss_mb(), 1)]
    done = 0
    started = time.monotonic()
    async with open_client(served.url, 60.0) as client:

        async def call() -> None:
            nonlocal done
            while done < requests:
                done += 1
                if done % (requests // 20) == 0:
                    curve.append(round(served.measure_rss_mb(), 1))
                status = await ask_one(client, photos, odd, rng)
                statuses[status] = statuses.get(status, 0) + 1

        await asyncio.gather(*(call() for _ in range(at_once)))
    return {
        "requests": requests,
        "seconds": round(time.monotonic() - started),
        "statuses": dict(sorted(statuses.items())),
        "rss_mb": curve,
        "growth_mb": round(curve[-1] - curve[2], 1),
        "cpu_s": round(served.measure_cpu_s(), 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--requests", type=int, default=20_000, help="how many (20,000)")
    parser.add_argument("--at-once", type=int, default=4, help="callers at once (4)")
    options = parser.parse_args(arguments)
    sys.path.append(str(_TESTS))
    photos = read_photos(options.photos, count=12, sizes_mp=(0.1, 0.2, 0.4))
    with serve([*make_fake_command(0.0), "--port", "0", "--drain-delay-s", "0"]) as served:
        report = asyncio.run(measure(served, photos, options.requests, options.at_once))
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
