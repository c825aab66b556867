import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

TIMEOUT_S = 240
LABEL_OPTIONS = "--side-px 56 --maskcut-n 2 --maskcut-tau 0.6 --pca-dim 6 --stuff-clusters 4 --thing-clusters 3"


def run(repository: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    command = ["bash", str(repository / "deploy" / "baselines.sh"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=repository, env=environment
    )


@pytest.mark.slow
def test_a_class_agnostic_detector_is_trained_clustered_and_evaluated(
    tmp_path: Path, repository: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    dataset, out = tiny.draw_truth(tmp_path / "set"), tmp_path / "my out"
    ended = run(
        repository, "cutler", tiny_photos, tiny_encoder, dataset, out, "--matching", "hungarian",
        LABEL_OPTIONS=LABEL_OPTIONS, TRAIN_OPTIONS="--preset tiny",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    assert summary["images"] == 4
    assert summary["matching"]["method"] == "hungarian"
    config = json.loads((out / "maskcut-detected" / "label.json").read_text())
    assert (config["mask_source"], config["thing_clusters"]) == ("detector", 3)
    card = json.loads((out / "detector" / "run.json").read_text())
    assert card["network_config"]["thing_clusters"] == 1
    assert (out / "report-cutler" / "report.html").is_file()


@pytest.mark.parametrize("arguments", [("unknown", 1, 2, 3, 4), ("maskcut", 1, 2, 3)])
def test_wrong_usage_prints_the_usage(repository: Path, arguments: tuple[object, ...]) -> None:
    ended = run(repository, *arguments)
    assert ended.returncode == 2
    assert "maskcut|cutler|stego|cutler-stego PHOTOS" in ended.stderr
