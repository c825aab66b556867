"""Labels are the same whoever carries the work: one process, parts of an array of jobs, or Ray, even as actors die."""

import logging
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny

from model.errors import ConfigError, LabelStoreError
from training.labels.codebook import read_codebook
from training.labels.engines import WHOLE, Part, read_part
from training.labels.label import label_photos
from training.labels.store import LabelStore
from training.labels.workshop import Workshop

PHOTOS = 130
"""Three shards."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw_photos(tmp_path_factory.mktemp("drawn") / "photos", PHOTOS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, photos: Path, tiny_encoder: Path) -> LabelStore:
    """Labelled by one process."""
    store = LabelStore(tmp_path_factory.mktemp("alone") / "store")
    label_photos(*tiny.configure(photos, tiny_encoder), store=store, features=store.features)
    return store


def read_all(store: LabelStore) -> dict[str, bytes]:
    """Every file but the configuration, which names folders, and the codebook, which holds the time."""
    paths = [path for path in store.folder.rglob("*") if path.is_file() and path.suffix in (".json", ".png", ".npy")]
    return {str(path.relative_to(store.folder)): path.read_bytes() for path in paths if path.name != "label.json"}


def test_a_part_is_named_by_its_number_and_their_count() -> None:
    assert (read_part("3/16"), read_part("0/1")) == (Part(3, 16), WHOLE)
    groups = [[number] for number in range(5)]
    assert [Part(number, 2).choose(groups) for number in (0, 1)] == [[[0], [2], [4]], [[1], [3]]]


@pytest.mark.parametrize("text", ["", "3", "16/16", "-1/2", "1/0", "a/b", "1/2/3"])
def test_anything_else_is_no_part(text: str) -> None:
    with pytest.raises(ConfigError, match="a part is"):
        read_part(text)


def test_parts_in_any_order_make_the_store_that_one_process_makes(
    tmp_path: Path, photos: Path, tiny_encoder: Path, alone: LabelStore
) -> None:
    scan, config = tiny.configure(photos, tiny_encoder)
    book, store = read_codebook(alone.codebook), LabelStore(tmp_path / "store")
    with pytest.raises(ConfigError, match="give the codebook"):
        label_photos(scan, config, store, store.features, part=Part(0, 2))
    counts = [label_photos(scan, config, store, store.features, book, part=Part(i, 2)).photos for i in (1, 0)]
    assert counts == [64, 66]
    assert not (store.folder / "panoptic.json").exists()
    shutil.move(store.features, tmp_path / "features")  # what labels were made from is needed no more
    shutil.move(store.folder / "masks", tmp_path / "masks")
    whole = label_photos(scan, config, store, store.features, book)
    assert whole.photos == PHOTOS
    shutil.move(tmp_path / "features", store.features)
    assert read_all(store) == read_all(alone)


def test_a_vote_carries_its_views_to_the_parts(tmp_path: Path, tiny_photos: Path, tiny_encoder: Path) -> None:
    scan, config = tiny.configure(tiny_photos, tiny_encoder)
    config = replace(config, proposals="vote", objects=2)
    first, second = LabelStore(tmp_path / "first"), LabelStore(tmp_path / "second")
    label_photos(scan, config, first, tmp_path / "features")
    book = read_codebook(first.codebook)
    label_photos(scan, config, second, tmp_path / "features", book, part=Part(0, 2))
    assert second.views.read_bytes() == first.views.read_bytes()
    with pytest.raises(ConfigError, match="lacks the views"):
        label_photos(scan, config, LabelStore(tmp_path / "third"), tmp_path, replace(book, views=None), part=Part(0, 2))


@pytest.mark.slow
def test_ray_makes_the_same_store_though_a_worker_is_killed(
    tmp_path: Path, photos: Path, tiny_encoder: Path, alone: LabelStore
) -> None:
    ray = pytest.importorskip("ray", reason="useg[ray] is not installed")
    from training.labels.ray_engine import RayEngine

    scan, config = tiny.configure(photos, tiny_encoder)
    store = LabelStore(tmp_path / "store")
    victims: list[int] = []
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        watcher = threading.Thread(target=kill_one, args=(store, victims))
        watcher.start()
        report = label_photos(scan, config, store, store.features, engine=RayEngine(1))
        watcher.join()
        other = LabelStore(tmp_path / "none")
        broken = Workshop(config=replace(config, proposals="vote"), store=other, features=store.features)
        with pytest.raises(LabelStoreError, match="holds no views"):
            RayEngine(1).run(broken, "masks", [scan.photos[:1]])
    finally:
        ray.shutdown()
    assert len(victims) == 1
    assert report.photos == PHOTOS
    assert read_all(store) == read_all(alone)


def kill_one(store: LabelStore, victims: list[int]) -> None:
    """SIGKILL to a worker of Ray as soon as masks come."""
    masks = store.folder / "masks"
    while not (masks.is_dir() and any(masks.glob("*.npz"))):
        time.sleep(0.005)
    processes = psutil.Process().children(recursive=True)
    victims.append(next(each.pid for each in processes if "ray::_Worker" in " ".join(each.cmdline())))
    os.kill(victims[0], signal.SIGKILL)
