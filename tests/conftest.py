"""Fixtures of many tests, and a home folder for the run: nothing is written to the cache of the user."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from chromium import open_browser
from command_line import Ended, Run
from filelock import FileLock
from playwright.sync_api import Browser

from model.cli import main
from model.export.export import ExportConfig, export_run
from training.data.dataset import PseudoLabelDataset
from training.mask_transformer.config import MASK_TRANSFORMER_PRESETS
from training.pseudo_labels.pipeline import label_photos
from training.train import train
from training.trainer.config import RunOptions

REPOSITORY = Path(__file__).resolve().parent.parent
_HOME = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a home folder of its own, which worker processes inherit; caches of other programs stay."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    os.environ.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    config.stash[_HOME] = tempfile.TemporaryDirectory(prefix="useg-home-")
    os.environ["HOME"] = config.stash[_HOME].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if _HOME in config.stash:
        config.stash[_HOME].cleanup()


@pytest.fixture
def anyio_backend() -> str:
    """Event loop of asynchronous tests."""
    return "asyncio"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore the number of torch threads: commands set it for the process, and sums depend on it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def useg(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        status = main(list(map(str, arguments)))
        printed = capsys.readouterr()
        result = json.loads(printed.out) if printed.out else {}
        return Ended(status, result, "".join(printed.err.splitlines()[-1:]))

    return run


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden() -> Path:
    """Stored outputs of the reference implementations: tests/golden, or the folder that USEG_GOLDEN names."""
    return Path(os.environ.get("USEG_GOLDEN", REPOSITORY / "tests" / "golden"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Photos, annotations and encoder weights for development: USEG_DATA, or shared/data next to the repository."""
    folder = Path(os.environ.get("USEG_DATA", REPOSITORY.parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set USEG_DATA to the folder of reference data")
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder file of random weights."""
    return tiny.write_encoder(tmp_path_factory.mktemp("encoder") / "encoder.safetensors")


@pytest.fixture(scope="session")
def tiny_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn photos."""
    return tiny.draw_photos(tmp_path_factory.mktemp("drawn") / "photos")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_photos: Path) -> PseudoLabelDataset:
    """Finished pseudo-labels; not to be changed."""
    store = PseudoLabelDataset(tmp_path_factory.mktemp("labels") / "store")
    label_photos(*tiny.configure(tiny_photos, tiny_encoder), dataset=store, features=store.features)
    return store


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: PseudoLabelDataset) -> Path:
    """A finished run of four steps; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_store, RunOptions(out=run), MASK_TRANSFORMER_PRESETS["tiny"])
    return run


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """An exported artifact; not to be changed."""
    artifact = tmp_path_factory.mktemp("artifacts") / "artifact"
    export_run(
        tiny_run,
        artifact,
        ExportConfig(name="tiny", version="3", score_threshold=0.0, min_component_area_fraction=0.0),
        [],
        tiny.draw_noise(16, tiny.SIDE_PX, tiny.SIDE_PX).permute(0, 2, 3, 1).numpy(),
    )
    return artifact


@pytest.fixture
def artifact(tmp_path: Path, tiny_artifact: Path) -> Path:
    """A copy of the artifact that a test may change."""
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


@pytest.fixture(scope="session")
def tiny_cascade_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a panoptic cascade of random weights; not to be changed."""
    return tiny.write_cascade_run(tmp_path_factory.mktemp("cascade") / "run")


@pytest.fixture(scope="session")
def tiny_cascade_artifact(tmp_path_factory: pytest.TempPathFactory, tiny_cascade_run: Path, worker_id: str) -> Path:
    """An exported panoptic cascade with three input sizes; not to be changed. All test processes share one."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    artifact = folder / "cascade-artifact"
    with FileLock(folder / "cascade-artifact.lock"):  # the export takes most of a minute
        if not artifact.exists():
            config = ExportConfig(name="cascade", score_threshold=0.3, input_sizes=tiny.INPUT_SIZES)
            export_run(tiny_cascade_run, artifact, config, [])
    return artifact


@pytest.fixture(scope="session")
def tiny_truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set in COCO's panoptic format."""
    return tiny.draw_truth(tmp_path_factory.mktemp("truth") / "set")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for each module: while it is open, its event loop keeps those of other tests from running."""
    with open_browser() as browser:
        yield browser


@pytest.fixture
def console_errors() -> list[str]:
    """Errors in the browser's console; a test that expects one removes it."""
    return []
