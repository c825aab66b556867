import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

LIMIT_S = 240
LABELS = "--side-px 56 --maskcut-n 2 --threshold 0.6 --pca-dim 6 --stuff-clusters 4 --thing-clusters 3"


def run(repository: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    command = ["bash", str(repository / "deploy" / "baselines.sh"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=repository, env=environment
    )


@pytest.mark.slow
def test_a_detector_of_one_class_is_trained_clustered_and_scored(
    tmp_path: Path, repository: Path, tiny_photos: Path, tiny_encoder: Path
) -> None:
    truth = tiny.draw_truth(tmp_path / "set")
    ended = run(
        repository, "cutler", tiny_photos, tiny_encoder, truth, tmp_path / "out", "--method", "assignment",
        LABEL_OPTIONS=LABELS, FIT_OPTIONS="--preset tiny",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    assert summary["pictures"] == 4
    assert summary["matching"]["method"] == "assignment"
    config = json.loads((tmp_path / "out" / "maskcut-detected" / "label.json").read_text())
    assert (config["proposals"], config["thing_clusters"]) == ("detector", 3)
    card = json.loads((tmp_path / "out" / "detector" / "run.json").read_text())
    assert card["shape"]["thing_clusters"] == 1
    assert (tmp_path / "out" / "report-cutler" / "report.html").is_file()


@pytest.mark.parametrize("arguments", [("vote", 1, 2, 3, 4), ("maskcut", 1, 2, 3)])
def test_an_unknown_system_and_too_few_arguments_say_what_is_expected(
    repository: Path, arguments: tuple[object, ...]
) -> None:
    ended = run(repository, *arguments)
    assert ended.returncode == 2
    assert "maskcut|cutler|stego|cutler-stego PHOTOS" in ended.stderr
