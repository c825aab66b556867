#!/usr/bin/env python3
"""Our service beside LitServe and BentoML, which serve the same artifact with the same decoding and encoding.

    python deploy/bench_rivals.py PHOTOS [--seconds 15] [--rounds 2] [--python PYTHON]

PYTHON is an environment with `useg[service]`, litserve and bentoml, by default this one. LitServe runs once with one
worker of two threads, once with two workers of one thread each. All servers are up throughout; the loads take turns, so
that a machine that is busy with other things treats them alike: first one caller, then open-loop arrivals at shares of
a bare loop's rate. Goodput at equal p95 is the highest that a server gave with a p95 within `p95_limit_ms`: twice the
median of a caller alone, of the slowest server. With --rounds 0 there is one caller alone, whose CPU time a picture
can be compared on a machine that is busy with other things. Prints JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from bench import LIMIT_S, BareLoop
from load import Answer, Sender, Served, read_photos, send_body, send_closed, send_open, serve, summarise

from service.settings import find_bundled_artifact

_SHARES = (0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A server that is up, and how it is asked."""

    served: Served
    send: Sender


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each load (15)")
    parser.add_argument("--rounds", type=int, default=2, help="how often the shares are gone through (2)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python with litserve and bentoml")
    options = parser.parse_args(arguments)
    photos = read_photos(options.photos)
    bare = BareLoop(find_bundled_artifact(), photos, threads=2)
    os.environ.update(PYTHONPATH=str(_HERE.parent), BENTOML_DO_NOT_TRACK="True", OPENBLAS_NUM_THREADS="1")
    with contextlib.ExitStack() as stack:
        rivals = {name: stack.enter_context(each) for name, each in open_rivals(options.python)}
        report = asyncio.run(measure(rivals, bare, photos, options.seconds, options.rounds))
    print(json.dumps(report, indent=2))
    return 0


def open_rivals(python: Path) -> list[tuple[str, contextlib.AbstractContextManager[Rival]]]:
    """All servers by name, to be entered."""
    ours = [sys.executable, "-m", "service", "--port", "0", "--shutdown-delay-s", "0"]
    bento = [str(python.with_name("bentoml")), "serve", "rival_bentoml:Segment", "--working-dir", str(_HERE)]
    lit = [str(python), str(_HERE / "rival_litserve.py")]
    return [
        ("useg", _open(ours, send_body, None, "/readyz")),
        ("LitServe, one worker", _open([*lit, "18301", "1"], send_lit, "http://127.0.0.1:18301", "/health")),
        ("LitServe, two workers", _open([*lit, "18302", "2"], send_lit, "http://127.0.0.1:18302", "/health")),
        ("BentoML", _open([*bento, "--port", "18303"], send_bento, "http://127.0.0.1:18303", "/readyz")),
    ]


@contextlib.contextmanager
def _open(command: Sequence[str], send: Sender, url: str | None, ready: str) -> Any:
    with serve(command, url, ready) as served:
        yield Rival(served=served, send=send)


async def send_lit(client: httpx.AsyncClient, photo: bytes) -> httpx.Response:
    return await client.post("/predict", files={"request": ("photo.jpg", photo)})


async def send_bento(client: httpx.AsyncClient, photo: bytes) -> httpx.Response:
    return await client.post("/segment", files={"photo": ("photo.jpg", photo, "image/jpeg")})


async def measure(
    rivals: dict[str, Rival], bare: BareLoop, photos: Sequence[bytes], seconds: float, rounds: int
) -> dict[str, Any]:
    """All loads on all servers in turn."""
    alone, cpu_s = {}, {}
    for name, rival in rivals.items():
        url = rival.served.url
        await send_closed(url, photos, at_once=2, seconds=3.0, send=rival.send)
        before = rival.served.measure_cpu_s()
        answers, took_s = await send_closed(url, photos, at_once=1, seconds=seconds, send=rival.send)
        alone[name] = summarise(answers, took_s, LIMIT_S)
        cpu_s[name] = round((rival.served.measure_cpu_s() - before) / len(answers), 4)
    bare_rate, bare_cpu_s = bare.run(seconds)
    limit_s = 2 * max(float(str(each["p50_ms"])) for each in alone.values()) / 1000
    loads: dict[str, dict[str, Any]] = {name: {} for name in rivals}
    for share in _SHARES if rounds else ():
        gathered: dict[str, list[Answer]] = {name: [] for name in rivals}
        for _ in range(rounds):
            for name, rival in rivals.items():
                gathered[name] += await send_open(
                    rival.served.url, photos, rate=share * bare_rate, seconds=seconds, limit_s=LIMIT_S, send=rival.send
                )
        for name, answers in gathered.items():
            loads[name][f"{share:.0%}"] = summarise(answers, seconds * rounds, LIMIT_S)
    return {
        "bare": {"rate_per_s": round(bare_rate, 2), "cpu_s_per_picture": round(bare_cpu_s, 4)},
        "one caller": alone,
        "cpu_s_per_picture": cpu_s,
        "p95_limit_ms": round(1000 * limit_s),
        "goodput_at_equal_p95": {
            name: max([load["goodput_per_s"] for load in each.values() if load["p95_ms"] <= 1000 * limit_s], default=0)
            for name, each in loads.items()
        },
        "loads": loads,
    }


if __name__ == "__main__":
    sys.exit(main())
