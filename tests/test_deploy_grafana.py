"""The board shows what the service measures: no panel is empty under load."""

import asyncio
import json
import math
import re
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fake_service import CONTRACT, RedSession, draw_halves, open_client, post, save
from live_service import listen

from model.backends.session import Session
from model.contract import Contract
from model.drift import EDGES, MEASURES
from model.histogram import Histogram
from service.artifact.drift import LEAST

WAIT_S = 90.0
SCRAPE = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: useg
    static_configs: [{{targets: ["{target}"]}}]
"""
PHOTO = save(draw_halves())
WORDS = re.compile(r"\b(?:seg|http_server|process)_[a-z_]+\b")

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def board(repository: Path) -> dict[str, Any]:
    """The board as Grafana reads it."""
    text = (repository / "deploy/grafana/dashboards/latency-and-load.json").read_text(encoding="utf-8")
    read: dict[str, Any] = json.loads(text)
    return read


def list_panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that ask for something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def list_queries(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and PromQL of each query, Grafana's variables replaced as it would."""
    for panel in list_panels(board):
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "20s").replace("$instance", ".*")
            assert "$" not in query
            yield f"{panel['title']} {target['refId']}", query


def test_each_panel_has_its_own_title_place_and_words(board: dict[str, Any]) -> None:
    panels = list_panels(board)
    for name in ("id", "title"):
        assert len({panel[name] for panel in board["panels"]}) == len(board["panels"])
    assert [panel["title"] for panel in panels if not panel["description"].endswith(".")] == []
    cells = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_each_panel_asks_the_provisioned_data_source_and_says_its_unit(board: dict[str, Any], repository: Path) -> None:
    sources = (repository / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    uid = yaml.safe_load(sources)["datasources"][0]["uid"]
    panels = list_panels(board)
    assert {panel["datasource"]["uid"] for panel in panels} == {uid}
    drawn = [panel for panel in panels if panel["type"] in ("timeseries", "stat")]
    assert [panel["title"] for panel in drawn if not panel["fieldConfig"]["defaults"].get("unit")] == []


@pytest.mark.parametrize("file", ["grafana/dashboards/latency-and-load.json", "prometheus/alerts.yml"])
async def test_no_metric_is_asked_for_that_the_service_does_not_have(repository: Path, file: str) -> None:
    async with open_client() as client:
        assert (await post(client, PHOTO)).status_code == 200
        measured = (await client.get("/metrics")).text
    known = set(re.findall(r"^# TYPE (\S+)", measured, re.MULTILINE)) | set(WORDS.findall(measured))
    assert set(WORDS.findall((repository / "deploy" / file).read_text(encoding="utf-8"))) - known == set()


@asynccontextmanager
async def scrape(folder: Path, target: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a Prometheus that watches a service."""
    config = folder / "prometheus.yml"
    config.write_text(SCRAPE.format(target=target), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    address = f"127.0.0.1:{port}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            yield client
    finally:
        process.terminate()
        await process.wait()


async def ask(prometheus: httpx.AsyncClient, query: str) -> list[str]:
    """The values that a query has now; none where Prometheus is not there yet."""
    try:
        answer = await prometheus.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if answer.status_code == 503:  # it is still reading its store
        return []
    assert answer.status_code == 200, answer.text
    return [each["value"][1] for each in answer.json()["data"]["result"]]


async def load(service: httpx.AsyncClient) -> None:
    """Good requests of every task, bad ones, and more at once than there are places."""
    for task in ("panoptic", "instance", "semantic"):
        await post(service, PHOTO, params={"task": task})
    await post(service, b"no picture")
    await service.get("/nothing-here")
    await asyncio.gather(*(post(service, PHOTO) for _ in range(40)))


@pytest.mark.slow
async def test_no_panel_is_empty_under_load(board: dict[str, Any], tmp_path: Path) -> None:
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not on the PATH")

    def open_described() -> tuple[Contract, Session]:
        flat = {name: Histogram(edges=EDGES[name], counts=(9,) * (len(EDGES[name]) + 1)) for name in MEASURES}
        return replace(CONTRACT, reference=flat), RedSession()

    waiting = dict(list_queries(board))
    assert len(waiting) >= len(list_panels(board)) > 20
    async with (
        listen(open_described, queue=4) as (host, port),
        scrape(tmp_path, f"{host}:{port}") as prometheus,
        httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=WAIT_S) as service,
    ):
        for _ in range(LEAST):
            await post(service, PHOTO)
        end = asyncio.get_running_loop().time() + WAIT_S
        while waiting and asyncio.get_running_loop().time() < end:
            await load(service)
            for title, query in list(waiting.items()):
                if any(math.isfinite(float(value)) for value in await ask(prometheus, query)):
                    del waiting[title]
    assert waiting == {}
