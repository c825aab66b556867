"""Labels are the same from one process, job shards and Ray, even if a worker is killed."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import tiny

from model.errors import ConfigError, DatasetError, TrainingError
from training.data.dataset import PseudoLabelDataset
from training.data.executors import ALL_SHARDS, MultiprocessExecutor, RayExecutor, parse_shard
from training.pseudo_labels.codebook import load_codebook
from training.pseudo_labels.pipeline import PseudoLabelWorker, label_photos

PHOTOS = 130
"""Three chunks."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw_photos(tmp_path_factory.mktemp("drawn") / "photos", PHOTOS)


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory, photos: Path, tiny_encoder: Path) -> PseudoLabelDataset:
    """Labels made by one process."""
    labels = PseudoLabelDataset(tmp_path_factory.mktemp("single") / "labels")
    label_photos(*tiny.configure(photos, tiny_encoder), dataset=labels, features=labels.features)
    return labels


def read_all(labels: PseudoLabelDataset) -> dict[str, bytes]:
    """Return every file but the configuration, which has paths, and the codebook, which has the time."""
    paths = [path for path in labels.folder.rglob("*") if path.is_file() and path.suffix in (".json", ".png", ".npy")]
    return {str(path.relative_to(labels.folder)): path.read_bytes() for path in paths if path.name != "label.json"}


def test_a_shard_is_given_by_index_and_count_and_takes_every_count_th_group() -> None:
    assert parse_shard("0/1") == ALL_SHARDS
    assert [list(range(5))[parse_shard(f"{index}/2")] for index in (0, 1)] == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("text", ["", "3", "16/16", "-1/2", "1/0", "a/b", "1/2/3"])
def test_an_invalid_shard_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="a shard must be"):
        parse_shard(text)


def test_shards_in_any_order_make_the_same_labels_as_one_process(
    tmp_path: Path, photos: Path, tiny_encoder: Path, single_process: PseudoLabelDataset
) -> None:
    scanned, config = tiny.configure(photos, tiny_encoder)
    codebook, labels = load_codebook(single_process.codebook), PseudoLabelDataset(tmp_path / "labels")
    with pytest.raises(ConfigError, match="pass the codebook"):
        label_photos(scanned, config, labels, labels.features, shard=slice(0, None, 2))
    counts = [
        label_photos(scanned, config, labels, labels.features, codebook, shard=slice(i, None, 2)).photos for i in (1, 0)
    ]
    assert counts == [64, 66]
    assert not (labels.folder / "panoptic.json").exists()
    shutil.move(labels.features, tmp_path / "features")  # labels do not need them any more
    shutil.move(labels.folder / "masks", tmp_path / "masks")
    report = label_photos(scanned, config, labels, labels.features, codebook)
    assert report.photos == PHOTOS
    shutil.move(tmp_path / "features", labels.features)
    assert read_all(labels) == read_all(single_process)


def test_the_codebook_carries_the_projections_of_consensus_masks_to_shards(
    tmp_path: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    scanned, config = tiny.configure(tiny_photos, tiny_encoder)
    config = replace(config, proposals="consensus", maskcut_tau=0.3, objects_per_image=2)
    first, second = PseudoLabelDataset(tmp_path / "first"), PseudoLabelDataset(tmp_path / "second")
    label_photos(scanned, config, first, tmp_path / "features")
    codebook = load_codebook(first.codebook)
    label_photos(scanned, config, second, tmp_path / "features", codebook, shard=slice(0, None, 2))
    assert second.projections.read_bytes() == first.projections.read_bytes()


@contextmanager
def lose_an_actor(folder: Path, pattern: str) -> Iterator[list[int]]:
    """Run Ray with two CPUs and send SIGKILL to one actor as soon as a file in the folder matches the pattern.

    Yields a list that then holds the id of the killed process. Skips if Ray is not installed.
    """
    ray = pytest.importorskip("ray", reason="useg[ray] is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    victims: list[int] = []
    watcher = threading.Thread(target=_kill_one, args=(folder, pattern, victims), daemon=True)
    watcher.start()
    try:
        yield victims
        watcher.join()
    finally:
        ray.shutdown()


def _kill_one(folder: Path, pattern: str, victims: list[int]) -> None:
    while not any(folder.glob(pattern)):
        time.sleep(0.005)
    processes = psutil.Process().children(recursive=True)
    victims.append(next(each.pid for each in processes if "ray::_Actor" in " ".join(each.cmdline())))
    os.kill(victims[0], signal.SIGKILL)


@pytest.mark.slow
def test_ray_makes_the_same_labels_although_an_actor_is_killed(
    tmp_path: Path, photos: Path, tiny_encoder: Path, single_process: PseudoLabelDataset
) -> None:
    scanned, config = tiny.configure(photos, tiny_encoder)
    labels = PseudoLabelDataset(tmp_path / "labels")
    with lose_an_actor(labels.folder, "masks/*.npz") as victims:
        report = label_photos(scanned, config, labels, labels.features, executor=RayExecutor(1))
        other = PseudoLabelDataset(tmp_path / "none")
        broken = PseudoLabelWorker(
            config=replace(config, proposals="consensus"), dataset=other, features_dir=labels.features
        )
        with pytest.raises(DatasetError, match="holds no feature projections"):
            RayExecutor(1).run(broken, "masks", [scanned[:1]])
    assert len(victims) == 1
    assert report.photos == PHOTOS
    assert read_all(labels) == read_all(single_process)


@dataclass(frozen=True)
class Counter:
    """Writes a file per number; 13 kills the process."""

    folder: Path
    unit: ClassVar[str] = "number"

    def work(self, stage: str, numbers: Sequence[int]) -> Iterator[int]:
        for each in numbers:
            if each == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            if each < 0:
                raise DatasetError(f"{each} is negative")
            (self.folder / f"{stage}-{each}").write_text(str(os.getpid()))
            yield 1


@pytest.mark.slow
def test_several_processes_share_the_groups_and_report_errors(tmp_path: Path) -> None:
    executor, counter = MultiprocessExecutor(2, 1), Counter(tmp_path)
    executor.run(counter, "count", [])
    executor.run(counter, "count", [[1, 2], [3], [4, 5]])
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(written) == {f"count-{each}" for each in range(1, 6)}
    assert str(os.getpid()) not in written.values()
    assert written["count-1"] == written["count-2"]
    with pytest.raises(DatasetError, match="-7 is negative"):
        executor.run(counter, "count", [[-7]])
    with pytest.raises(TrainingError, match="a worker process died"):
        executor.run(counter, "count", [[12], [13], [14]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_worker_processes_end_with_their_parent(tmp_path: Path, kind: signal.Signals) -> None:
    code = f"""
import time
from dataclasses import dataclass
from pathlib import Path
from test_training_data_executors import Sleeper
from training.data.executors import MultiprocessExecutor
if __name__ == "__main__":
    MultiprocessExecutor(2, 1).run(Sleeper(Path({str(tmp_path)!r})), "sleep", [[1], [2], [3]])
"""
    (tmp_path / "main.py").write_text(code)
    process = subprocess.Popen([sys.executable, tmp_path / "main.py"], start_new_session=True, env=ENVIRONMENT)
    while len(started := list(tmp_path.glob("*.pid"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    children = [psutil.Process(int(each.stem)) for each in started]
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # as a terminal does
    else:
        process.kill()
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


@dataclass(frozen=True)
class Sleeper:
    """Writes its process id and never ends."""

    folder: Path
    unit: ClassVar[str] = "item"

    def work(self, stage: str, items: Sequence[int]) -> Iterator[int]:
        (self.folder / f"{os.getpid()}.pid").touch()
        threading.Event().wait()
        yield len(items)
