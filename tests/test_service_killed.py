"""A server that is killed while categories are renamed loses no acknowledged name and corrupts no file."""

import random
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from serve_fake import read_address, start_fake_server

WAIT_S = 60
ROUNDS = 8
CLUSTERS = (1, 2, 3)


@dataclass
class Editor:
    """Renames one cluster to "name 1", "name 2" and so on until the server is gone."""

    cluster: int
    is_acknowledged: threading.Semaphore
    sent: int = 0
    acknowledged: int = 0
    refused: str = ""

    def work(self, address: str) -> None:
        with httpx.Client(base_url=address, timeout=WAIT_S) as client:
            while not self.refused:
                self.sent += 1
                try:
                    path = f"v1/models/fake/clusters/{self.cluster}"
                    response = client.put(path, json={"category_name": f"name {self.sent}"})
                except httpx.TransportError:
                    return
                if response.status_code == 200:
                    self.acknowledged = self.sent
                    self.is_acknowledged.release()
                else:
                    self.refused = response.text


@contextmanager
def serve(names: Path) -> Iterator[str]:
    """Yield the address of a server that is killed at the end."""
    with start_fake_server(stderr=subprocess.DEVNULL, category_names_file=names) as process:
        try:
            yield read_address(process)
        finally:
            process.kill()


def check_names(address: str, editors: list[Editor]) -> None:
    """Check that each name is the last acknowledged one, or one that was sent after it."""
    clusters = httpx.get(f"{address}v1/models/fake/clusters", timeout=WAIT_S).json()["clusters"]
    names = {each["cluster_id"]: each["category_name"] or "" for each in clusters}
    for editor in editors:
        sent = re.fullmatch(r"name (\d+)", names[editor.cluster])
        assert editor.acknowledged <= int(sent[1] if sent else 0) <= editor.sent


@pytest.mark.slow
def test_a_repeatedly_killed_server_loses_no_acknowledged_name(tmp_path: Path) -> None:
    file = tmp_path / "fake.names.json"
    is_acknowledged = threading.Semaphore(0)
    editors = [Editor(cluster, is_acknowledged) for cluster in CLUSTERS]
    draw = random.Random(7)
    for _ in range(ROUNDS):
        with serve(file) as address:
            check_names(address, editors)
            threads = [threading.Thread(target=editor.work, args=(address,)) for editor in editors]
            for thread in threads:
                thread.start()
            for _ in range(draw.randint(1, 8)):
                assert is_acknowledged.acquire(timeout=WAIT_S)
        for thread in threads:
            thread.join()
        assert [editor.refused for editor in editors] == [""] * len(editors)
    with serve(file) as address:
        check_names(address, editors)
        httpx.put(f"{address}v1/models/fake/clusters/1", json={"category_name": "tidy"}, timeout=WAIT_S)
    assert sorted(each.name for each in tmp_path.iterdir()) == [file.name, f"{file.name}.lock"]
