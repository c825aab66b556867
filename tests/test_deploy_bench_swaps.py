"""Versions are swapped under load in real processes, and no answer is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 300


@pytest.mark.slow
def test_swaps_lose_nothing_and_bad_versions_do_not_stay(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("psutil", reason="useg[bench] is not installed")
    command = [sys.executable, repository / "deploy" / "bench_swaps.py", tmp_path, "--fake-s", "0.05"]
    command += ["--swaps", "2", "--peak-s", "2"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=repository, env={"PYTHONPATH": "."}
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    good, bad = report["good versions"], report["bad versions"]
    assert (good["failed"], good["swaps"], len(good["rss_mb"]), bad["failed"]) == (0, 2, 3, 0)
    assert good["requests"] > 0
    assert (bad["short"]["status"], bad["blind"]["stayed"]) == (409, False)
    assert bad["blind"]["reason"].startswith("drift: segments")
