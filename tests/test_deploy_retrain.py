import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from model.contract import read_contract
from model.registry.category_names import edit_names, names_path, read_names

TIMEOUT_S = 900
LABEL_OPTIONS = "--side-px 56 --maskcut-n 2 --maskcut-tau 0.6 --pca-dim 6 --stuff-clusters 4 --thing-clusters 3"
LONG_TRAINING = "--preset tiny --max-steps 8 --checkpoint-interval 2"
EXPORT_OPTIONS = "--score-threshold 0 --min-component-area-fraction 0"
TRANSFER_ALL = "--min-images 1 --min-overlap 0 --min-margin 0"
PASS_ALL = "--min-covering 0 --max-segment-ratio 1000 --max-void-increase 1"


class Retraining:
    """The script in a folder of its own, with photos in a folder whose name has a space."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder = folder
        self._script = repository / "deploy" / "retrain.sh"

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LABEL_OPTIONS": LABEL_OPTIONS,
            "EXPORT_OPTIONS": EXPORT_OPTIONS,
            **variables,
        }
        command = ["bash", str(self._script), "my photos", "registry", "--encoder", "encoder.safetensors", *arguments]
        return subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=self.folder, env=environment, start_new_session=True
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        _, log = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, log

    def interrupt(self, sign: Path, *arguments: str, **variables: str) -> int:
        """Send Ctrl-C as soon as a file exists."""
        process = self.start(*arguments, **variables)
        while not (self.folder / sign).exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=TIMEOUT_S)
        return process.returncode

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_bytes())


@pytest.fixture
def retraining(tmp_path: Path, repository: Path) -> Retraining:
    tiny.draw_photos(tmp_path / "my photos")
    tiny.write_encoder(tmp_path / "encoder.safetensors")
    return Retraining(tmp_path, repository)


@pytest.mark.slow
def test_two_versions_from_photos_to_the_registry_one_interrupted_one_rejected_at_first(
    retraining: Retraining,
) -> None:
    folder = retraining.folder
    status = retraining.interrupt(Path("runs/useg/1/run/checkpoint.safetensors"), TRAIN_OPTIONS=LONG_TRAINING)
    assert status in (130, -signal.SIGINT)
    assert not (folder / "registry").exists()
    status, log = retraining.run("--activate", TRAIN_OPTIONS=LONG_TRAINING)
    assert status == 0, log
    assert "retrain: label: skipped: done before" in log
    assert "resumed runs/useg/1/run at step" in log
    assert retraining.read("runs/useg/1/train.json")["step"] == 8
    assert "expected at least 8 to calibrate" in log
    assert "version 1 has no int8 network: CPUs compute in fp32" in log
    assert "gate: passed: there is no active version" in log
    assert retraining.read("registry/useg/deployment.json")["active"] == "1"

    served = folder / "registry" / "useg" / "1"
    for cluster in range(1, 8):  # any of them may be predicted
        edit_names(names_path(served), read_contract(served), lambda old, c=cluster: old.rename({c: "disc"}, "ann"))
    options = {"TRAIN_OPTIONS": "--preset tiny --seed 1", "TRANSFER_OPTIONS": TRANSFER_ALL}
    status, log = retraining.run("--canary", "0.5", "--rounds", "1", GATE_OPTIONS="--min-covering 1", **options)
    assert status == 4, log
    assert "useg: rejected: segmentation covering is 0." in log
    assert "train: train, starting from version 1" in log
    assert not (folder / "registry" / "useg" / "2").exists()
    assert not retraining.read("runs/useg/2/gate.json")["passed"]
    again = ("--canary", "0.5", "--rounds", "1", "--version", "2")
    status, log = retraining.run(*again, GATE_OPTIONS=PASS_ALL, **options)
    assert status == 0, log
    assert "retrain: train: skipped: done before" in log
    state = retraining.read("registry/useg/deployment.json")
    canary = state["canary"]
    assert (state["active"], canary["version"], canary["traffic_fraction"]) == ("1", "2", 0.5)
    newer = folder / "registry" / "useg" / "2"
    names = read_names(names_path(newer), read_contract(newer))
    assert {name.category_name for name in names.names.values()} == {"disc"}
    assert retraining.read("runs/useg/2/run/run.json")["provenance"]["init_weights"]["steps"] == 8
    # The round starts from that run's 4 steps; whether it is used depends on how consistent so short a training is.
    is_rejected = "round 1 is not better than the round before" in log
    assert read_contract(newer).provenance["init_weights"]["steps"] == (8 if is_rejected else 4)
    files = {path.name for path in (folder / "runs" / "useg" / "2").iterdir()}
    assert {"config.txt", "log.txt", "transfer.json", "gate.json"} <= files
    assert {"labels.jpg", "before.jpg", "after.jpg"} <= files


def test_other_options_for_an_attempt_that_was_started_are_rejected(retraining: Retraining) -> None:
    run = retraining.folder / "runs" / "useg" / "1"
    run.mkdir(parents=True)
    (run / "config.txt").write_text("photos=elsewhere\nstart=\n")
    (run / "label.json").write_text("{}")
    status, log = retraining.run()
    assert status == 1
    assert "runs/useg/1 was started with other options" in log


def test_make_passes_folders_with_spaces_and_quotes(retraining: Retraining, repository: Path) -> None:
    (retraining.folder / "bin").mkdir()
    (retraining.folder / "bin" / "python").symlink_to(sys.executable)
    (retraining.folder / ".dev").touch()
    command = ["make", "-s", "-C", repository, f"VENV={retraining.folder}", 'PHOTOS=no one\'s  "photos"', "retrain"]
    ended = subprocess.run([*command, "REGISTRY=a b"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.stderr.startswith('retrain: no one\'s  "photos" is not a folder of photos\n')


@pytest.mark.parametrize("arguments", [("--actvate",), ("a", "b")])
def test_wrong_usage_prints_the_usage(retraining: Retraining, arguments: tuple[str, ...]) -> None:
    status, log = retraining.run(*arguments)
    assert status == 2
    assert "deploy/retrain.sh PHOTOS [REGISTRY]" in log


def test_a_missing_folder_of_photos_is_reported(retraining: Retraining) -> None:
    (retraining.folder / "my photos").rename(retraining.folder / "elsewhere")
    assert retraining.run() == (1, "retrain: my photos is not a folder of photos\n")


def test_a_missing_registry_is_seeded_once_with_the_bundled_model(tmp_path: Path, repository: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", repository / "deploy" / "seed.sh", tmp_path / "new" / "registry"]
    for _ in range(2):
        seeded = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert seeded.returncode == 0, seeded.stderr
    assert seeded.stderr.startswith("useg 1 is active in ")
    state = json.loads((tmp_path / "new" / "registry" / "useg" / "deployment.json").read_bytes())
    assert [event["action"] for event in state["history"]] == ["add", "activate"]
