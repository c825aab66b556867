"""Alerts are valid, and each is tested to fire and to stay silent."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def folder(repository: Path) -> Path:
    return repository / "deploy" / "prometheus"


def read_rules(folder: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load((folder / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def run_promtool(folder: Path, *arguments: str) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not on the PATH")
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml")])
def test_promtool_accepts_the_files(folder: Path, arguments: tuple[str, ...]) -> None:
    run_promtool(folder, *arguments)


@pytest.mark.slow
def test_alerts_fire_above_and_stay_silent_below_their_thresholds(folder: Path) -> None:
    run_promtool(folder, "test", "rules", "alerts_test.yml")


def test_each_alert_has_a_test_in_which_it_fires(folder: Path) -> None:
    tests = (folder / "alerts_test.yml").read_text(encoding="utf-8")
    assert [rule["alert"] for rule in read_rules(folder) if f'alertname="{rule["alert"]}"' not in tests] == []


def test_each_alert_has_a_severity_a_summary_and_a_description(folder: Path) -> None:
    for rule in read_rules(folder):
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}
