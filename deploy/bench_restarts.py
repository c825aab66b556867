#!/usr/bin/env python3
"""Whether restarts lose anybody: two services behind a balancer, restarted in turn under load.

    python deploy/bench_restarts.py PHOTOS [--restarts 20] [--share 0.7] [--artifact DIR] [--fake-s S]
        [-- FLAGS OF useg-serve]

With --fake-s the network is a fake that takes so long for a picture and no processor. The balancer does what the
simplest ones do: it asks each service four times a second whether it is ready, passes connections on to those that are,
in turn, and repeats nothing that was sent. The load is a share of what one service alone answers, since one alone is
there while the other restarts. Prints JSON; exit status 1 if any request failed or any service did not end with 0.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from load import make_fake_command, read_photos, send_closed, send_open, summarise

from service.settings import find_bundled_artifact

LIMIT_S = 30.0
_PERIOD_S = 0.25
_PIECE_S = 5.0
"""The load comes in pieces, each begun when the last was sent, whether or not it was answered."""
_CHUNK = 1 << 16


class Backend:
    """A service on a port, that can be started again."""

    def __init__(self, command: Sequence[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._command = [*command, "--port", str(self.port)]
        self.is_ready = False
        self.exits: list[int] = []
        self.process = self._start()

    async def restart(self) -> float:
        """End it and start it again; returns, once it is ready, the seconds until it had ended."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.exits.append(await asyncio.to_thread(self.process.wait, 90))
        ended_s = time.monotonic() - started
        self.process = self._start()
        await self.settle()
        return ended_s

    async def settle(self) -> None:
        """Return once the balancer knows that it is ready."""
        async with asyncio.timeout(300):
            while not self.is_ready:
                await asyncio.sleep(_PERIOD_S)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def _start(self) -> "subprocess.Popen[bytes]":
        self.is_ready = False
        return subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Balancer:
    """Connections, passed on in turn to whoever is ready."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = backends
        self._turn = 0

    async def watch(self) -> None:
        """Ask who is ready until cancelled."""
        async with httpx.AsyncClient(timeout=2.0) as client:
            while True:
                for backend in self._backends:
                    try:
                        answer = await client.get(f"http://127.0.0.1:{backend.port}/readyz")
                        backend.is_ready = answer.status_code == 200
                    except httpx.TransportError:
                        backend.is_ready = False
                await asyncio.sleep(_PERIOD_S)

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on, both ways, until both are done."""
        ready = [backend for backend in self._backends if backend.is_ready]
        if not ready:
            writer.close()
            return
        self._turn += 1
        port = ready[self._turn % len(ready)].port
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream_reader, writer))
        except OSError:
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()
    writer.close()


async def send_alone(client: httpx.AsyncClient, photo: bytes) -> httpx.Response:
    """A request on a connection of its own, so that each is balanced."""
    headers = {"Content-Type": "image/jpeg", "Connection": "close"}
    return await client.post("/v1/segment", content=photo, headers=headers)


async def measure(backends: Sequence[Backend], photos: Sequence[bytes], restarts: int, share: float) -> dict[str, Any]:
    """The load while services restart in turn."""
    balancer = Balancer(backends)
    watching = asyncio.create_task(balancer.watch())
    server = await asyncio.start_server(balancer.take, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for backend in backends:
        await backend.settle()
    alone, took_s = await send_closed(f"http://127.0.0.1:{backends[0].port}", photos, at_once=4, seconds=10.0)
    rate = share * len(alone) / took_s
    endings: list[float] = []

    async def restart_all() -> None:
        for turn in range(restarts):
            endings.append(await backends[turn % len(backends)].restart())
            print(f"restart {turn + 1}: ended in {endings[-1]:.1f} s", file=sys.stderr)

    started = time.monotonic()
    loads = []
    restarting = asyncio.create_task(restart_all())
    while not restarting.done():
        load = send_open(url, photos, rate=rate, seconds=_PIECE_S, limit_s=LIMIT_S, send=send_alone)
        loads.append(asyncio.create_task(load))
        await asyncio.sleep(_PIECE_S)
    await restarting
    seconds = time.monotonic() - started
    answers = [answer for load in loads for answer in await load]
    watching.cancel()
    server.close()
    return {
        "restarts": len(endings),
        "rate_per_s": round(rate, 2),
        "ended_s": {"mean": round(sum(endings) / len(endings), 2), "most": round(max(endings), 2)},
        "exit_statuses": sorted({code for backend in backends for code in backend.exits}),
        **summarise(answers, seconds, LIMIT_S),
        "requests": len(answers),
        "failed": sum(answer.status != 200 for answer in answers),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--artifact", type=Path, default=find_bundled_artifact(), help="directory of the artifact")
    parser.add_argument("--fake-s", type=float, help="seconds that a fake network takes for a picture")
    parser.add_argument("--restarts", type=int, default=20, help="how often a service is restarted (20)")
    parser.add_argument("--share", type=float, default=0.7, help="share of one service's peak that is asked (0.7)")
    parser.add_argument("flags", nargs="*", help="further flags of useg-serve, after --")
    options = parser.parse_args(arguments)
    real = [sys.executable, "-m", "service", "--artifact", str(options.artifact)]
    command = real if options.fake_s is None else make_fake_command(options.fake_s)
    backends = [Backend([*command, "--drain-delay-s", "1.5", *options.flags]) for _ in range(2)]
    try:
        report = asyncio.run(measure(backends, read_photos(options.photos), options.restarts, options.share))
    finally:
        for backend in backends:
            backend.stop()
    print(json.dumps(report, indent=2))
    return 0 if report["failed"] == 0 and report["exit_statuses"] == [0] else 1


if __name__ == "__main__":
    sys.exit(main())
