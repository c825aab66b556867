import json
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 120


@pytest.mark.parametrize("tokens", ["patches", "keys"])
def test_masks_of_a_labelled_set_are_scored_and_timed(
    tmp_path: Path, repository: Path, tiny_truth: Path, tiny_encoder: Path, tokens: str
) -> None:
    command = [sys.executable, repository / "deploy" / "bench_masks.py", tiny_truth, "--encoder", tiny_encoder]
    command += ["--features", tmp_path, "--side-px", "56", "--proposals", "maskcut", "--tokens", tokens]
    command += ["--threshold", "0.2", "--centred"]
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=repository
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["pictures"] == 4
    assert result["masks_per_photo"] > 0
    assert 0.0 <= result["ap"] <= result["ap50"] <= 100.0
    assert 0.0 <= result["boundary_f"] <= 100.0
    assert result["cpu_seconds_per_photo"]["find"] > 0.0
