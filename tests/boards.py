"""Grafana boards as files, and a Prometheus that evaluates their queries."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

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


def read_source(repository: Path) -> str:
    """Return the uid of the provisioned data source."""
    sources = (repository / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    uid: str = yaml.safe_load(sources)["datasources"][0]["uid"]
    return uid


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
