"""The Grafana board of training runs shows the metrics that training writes."""

import asyncio
import re
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from boards import list_queries, query_prometheus, read_board, scrape

from training.trainer.loggers import PrometheusTextfileLogger

WAIT_S = 60.0
LOSSES = {"total": 7.5, "mask": 2.5, "semantic": 5.0, "iou": 0.4, "stuff": 0.6}

pytestmark = pytest.mark.anyio


@pytest.fixture
def board(repository: Path) -> dict[str, Any]:
    return read_board(repository, "training-runs")


def test_queries_use_exactly_the_metrics_that_training_writes(board: dict[str, Any], tmp_path: Path) -> None:
    PrometheusTextfileLogger(tmp_path / "train.prom", Path("RUN"), 10).log(1, LOSSES, 9.0, is_last=True)
    written = set(re.findall(r"^# TYPE (\S+)", (tmp_path / "train.prom").read_text(), re.MULTILINE))
    queried = {word for _, query in list_queries(board) for word in re.findall(r"useg_[a-z_]+", query)}
    assert queried == written


@asynccontextmanager
async def serve(folder: Path) -> AsyncIterator[str]:
    """Serve the files of a folder, as node_exporter would; yields the address."""
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None, "guess_type": _as_metrics})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def _as_metrics(_handler: SimpleHTTPRequestHandler, _path: str) -> str:
    return "text/plain; version=0.0.4"


@pytest.mark.slow
async def test_no_panel_is_empty_during_training(board: dict[str, Any], tmp_path: Path) -> None:
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not on the PATH")
    PrometheusTextfileLogger(tmp_path / "www" / "metrics", Path("RUN"), 10).log(5, LOSSES, 9.0, is_last=True)
    queries = dict(list_queries(board))
    results: dict[str, list[str]] = {}
    async with serve(tmp_path / "www") as target, scrape(tmp_path, target) as prometheus:
        async with asyncio.timeout(WAIT_S):
            while not all(results.get(title) for title in queries):
                results = {title: await query_prometheus(prometheus, query) for title, query in queries.items()}
                await asyncio.sleep(0.5)
    assert results["Progress A"] == ["0.5"]
    assert results["Not finite A"] == ["0"]
    assert sorted(results["Loss terms A"]) == ["2.5", "5"]
    assert sorted(results["Metrics A"]) == ["0.4", "0.6"]
