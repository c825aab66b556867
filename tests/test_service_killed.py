"""A service that is killed while people name clusters: what was acknowledged is there, and no file is torn."""

import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fake_service import CONTRACT
from serve_fake import read_address, start_fake_server

from model.registry.category_names import read_names

WAIT_S = 60
ROUNDS = 8
CLUSTERS = (1, 2, 3)


class Editor:
    """Gives one cluster one name after the other, 1, 2, 3 and so on, for as long as it is answered."""

    def __init__(self, cluster: int, is_acknowledged: threading.Semaphore) -> None:
        self.cluster = cluster
        self.is_acknowledged = is_acknowledged
        self.sent = 0
        self.acknowledged = 0
        self.refused = ""

    def work(self, address: str) -> None:
        with httpx.Client(base_url=address, timeout=WAIT_S) as client:
            while not self.refused:
                self.sent += 1
                try:
                    path = f"v1/models/fake/clusters/{self.cluster}"
                    answer = client.put(path, json={"category": f"name {self.sent}"})
                except httpx.TransportError:
                    return
                if answer.status_code == 200:
                    self.acknowledged = self.sent
                    self.is_acknowledged.release()
                else:
                    self.refused = answer.text

    def check(self, category: str | None) -> None:
        """Hold that the name is the last that was acknowledged, or one that was sent after it."""
        number = int(category.removeprefix("name ")) if category and category.startswith("name ") else 0
        assert self.acknowledged <= number <= self.sent


@contextmanager
def serve(names: Path) -> Iterator[str]:
    """The address of a service, which is killed in the end."""
    with start_fake_server(stderr=subprocess.DEVNULL, category_names_file=names) as process:
        try:
            yield read_address(process)
        finally:
            process.kill()


def read_categories(address: str) -> dict[int, str | None]:
    clusters = httpx.get(f"{address}v1/models/fake/clusters", timeout=WAIT_S).json()["clusters"]
    return {each["cluster_id"]: each["category_name"] for each in clusters}


@pytest.mark.slow
def test_a_service_killed_again_and_again_loses_no_acknowledged_name(tmp_path: Path) -> None:
    file = tmp_path / "fake.names.json"
    is_acknowledged = threading.Semaphore(0)
    editors = [Editor(cluster, is_acknowledged) for cluster in CLUSTERS]
    draw = random.Random(7)
    for _ in range(ROUNDS):
        with serve(file) as address:
            told = read_categories(address)
            for editor in editors:
                editor.check(told[editor.cluster])
            threads = [threading.Thread(target=editor.work, args=(address,)) for editor in editors]
            for thread in threads:
                thread.start()
            for _ in range(draw.randint(1, 8)):
                assert is_acknowledged.acquire(timeout=WAIT_S)
        for thread in threads:
            thread.join()
        assert [editor.refused for editor in editors] == [""] * len(editors)
        written = read_names(file, CONTRACT)  # raises for a file that is torn
        for editor in editors:
            name = written.names.get(editor.cluster)
            editor.check(name.category_name if name else None)
    with serve(file) as address:
        httpx.put(f"{address}v1/models/fake/clusters/1", json={"category": "tidy"}, timeout=WAIT_S)
    assert sorted(each.name for each in tmp_path.iterdir()) == [file.name, f"{file.name}.lock"]
