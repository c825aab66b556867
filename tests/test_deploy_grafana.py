"""Panels of both boards are complete, use existing metrics, and are not empty under load or during training."""

import asyncio
import json
import math
import re
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fake_service import draw_halves, open_client, open_described, post, save
from live_service import listen, serve_folder

from service.metrics import MIN_DRIFT_SAMPLES
from training.trainer.loggers import PrometheusTextfileLogger

WAIT_S = 90.0
PHOTO = save(draw_halves())
WORDS = re.compile(r"\b(?:useg|http_server|process)_[a-z_]+\b")

pytestmark = pytest.mark.anyio
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not on the PATH")

SCRAPE = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: useg
    static_configs: [{{targets: ["{target}"]}}]
"""


def read_board(repository: Path, name: str) -> dict[str, Any]:
    """The board as Grafana reads it."""
    text = (repository / "deploy" / "grafana" / "dashboards" / f"{name}.json").read_text(encoding="utf-8")
    read: dict[str, Any] = json.loads(text)
    return read


def list_panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels with queries."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def list_queries(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and PromQL of each query, Grafana's variables replaced as it would."""
    for panel in list_panels(board):
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "20s").replace("$instance", ".*")
            assert "$" not in query
            yield f"{panel['title']} {target['refId']}", query


@asynccontextmanager
async def scrape(folder: Path, target: str) -> AsyncIterator[httpx.AsyncClient]:
    """Run a Prometheus that scrapes `target`; yield its client."""
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


async def query_prometheus(prometheus: httpx.AsyncClient, query: str) -> list[str]:
    """Return the current values of a query; none while Prometheus starts."""
    try:
        response = await prometheus.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if response.status_code == 503:  # it is still loading its data
        return []
    assert response.status_code == 200, response.text
    return [each["value"][1] for each in response.json()["data"]["result"]]


each_board = pytest.mark.parametrize("name", ["latency-and-load", "training-runs"])


@each_board
def test_each_panel_has_the_provisioned_data_source_and_a_unit(repository: Path, name: str) -> None:
    panels = list_panels(read_board(repository, name))
    sources = (repository / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    assert {panel["datasource"]["uid"] for panel in panels} == {yaml.safe_load(sources)["datasources"][0]["uid"]}
    drawn = [panel for panel in panels if panel["type"] in ("timeseries", "stat")]
    assert [panel["title"] for panel in drawn if not panel["fieldConfig"]["defaults"].get("unit")] == []


@pytest.mark.parametrize("file", ["grafana/dashboards/latency-and-load.json", "prometheus/alerts.yml"])
async def test_queries_use_existing_metrics(repository: Path, file: str) -> None:
    async with open_client() as client:
        assert (await post(client, PHOTO)).status_code == 200
        measured = (await client.get("/metrics")).text
    known = set(re.findall(r"^# TYPE (\S+)", measured, re.MULTILINE)) | set(WORDS.findall(measured))
    assert set(WORDS.findall((repository / "deploy" / file).read_text(encoding="utf-8"))) - known == set()


async def load(service: httpx.AsyncClient) -> None:
    """Send valid requests of every task, invalid ones, and more than the queue holds."""
    for task in ("panoptic", "instance", "semantic"):
        await post(service, PHOTO, params={"task": task})
    await post(service, b"no image")
    await service.get("/nothing-here")
    await asyncio.gather(*(post(service, PHOTO) for _ in range(40)))


@pytest.mark.slow
@needs_prometheus
async def test_no_panel_is_empty_under_load(repository: Path, tmp_path: Path) -> None:
    board = read_board(repository, "latency-and-load")
    waiting = dict(list_queries(board))
    assert len(waiting) >= len(list_panels(board)) > 20
    async with (
        listen(open_described, max_queue_size=4) as (host, port),
        scrape(tmp_path, f"{host}:{port}") as prometheus,
        httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=WAIT_S) as service,
    ):
        for _ in range(MIN_DRIFT_SAMPLES):
            await post(service, PHOTO)
        end = asyncio.get_running_loop().time() + WAIT_S
        while waiting and asyncio.get_running_loop().time() < end:
            await load(service)
            for title, query in list(waiting.items()):
                if any(math.isfinite(float(value)) for value in await query_prometheus(prometheus, query)):
                    del waiting[title]
    assert waiting == {}


LOSSES = {"total": 7.5, "mask": 2.5, "semantic": 5.0, "iou": 0.4, "stuff": 0.6}


def test_queries_use_exactly_the_metrics_that_training_writes(repository: Path, tmp_path: Path) -> None:
    PrometheusTextfileLogger(tmp_path / "train.prom", Path("RUN"), 10).log(1, LOSSES, 9.0, is_last=True)
    written = set(re.findall(r"^# TYPE (\S+)", (tmp_path / "train.prom").read_text(), re.MULTILINE))
    queries = list_queries(read_board(repository, "training-runs"))
    queried = {word for _, query in queries for word in re.findall(r"useg_[a-z_]+", query)}
    assert queried == written


@pytest.mark.slow
@needs_prometheus
async def test_no_panel_is_empty_during_training(repository: Path, tmp_path: Path) -> None:
    PrometheusTextfileLogger(tmp_path / "www" / "metrics", Path("RUN"), 10).log(5, LOSSES, 9.0, is_last=True)
    queries = dict(list_queries(read_board(repository, "training-runs")))
    results: dict[str, list[str]] = {}
    with serve_folder(tmp_path / "www") as port:
        async with scrape(tmp_path, f"127.0.0.1:{port}") as prometheus, asyncio.timeout(WAIT_S):
            while not all(results.get(title) for title in queries):
                results = {title: await query_prometheus(prometheus, query) for title, query in queries.items()}
                await asyncio.sleep(0.5)
    assert results["Progress A"] == ["0.5"]
    assert results["Not finite A"] == ["0"]
    assert sorted(results["Loss terms A"]) == ["2.5", "5"]
    assert sorted(results["Metrics A"]) == ["0.4", "0.6"]
