"""The five commands as a user types them, one after the other, and what they say when something is wrong."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from PIL import Image

from model import __main__ as model_main
from service import __main__ as service_main
from training import __main__ as training_main
from training.checkpoint import read_facts
from training.store import LabelStore

LIMIT_S = 120
LABEL_OPTIONS = (
    *("--side-px", 56, "--cuts", 2, "--threshold", 0.6, "--components", 6),
    *("--thing-clusters", 3, "--stuff-clusters", 4),
)


def run(package: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", package, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def expect_error(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    last = ended.stderr.strip().splitlines()[-1]
    assert (ended.returncode, ended.stdout) == (1, "")
    assert last.startswith(("useg-train: ", "useg-model: "))
    assert all(word in last for word in words), last
    assert "Traceback" not in ended.stderr


def test_photos_become_labels_a_run_an_artifact_and_masks(tmp_path: Path, tiny_encoder: Path) -> None:
    photos = tiny.draw_photos(tmp_path / "photos")
    (photos / "broken.jpg").write_text("no photo")
    store, result, artifact, masks = (tmp_path / name for name in ("store", "run", "artifact", "masks.png"))

    labelled = run("training", "label", photos, "--out", store, "--encoder", tiny_encoder, *LABEL_OPTIONS)
    assert labelled.returncode == 0, labelled.stderr
    report = json.loads(labelled.stdout)
    assert report["photos"] == 8
    assert [line.split(":")[0] for line in report["broken"]] == ["broken.jpg"]

    fitted = run("training", "fit", store, "--out", result, "--preset", "tiny")
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(fitted.stdout)["step"] == 4

    exported = run("model", "export", result, "--out", artifact, "--photos", photos, "--score", 0)
    assert exported.returncode == 0, exported.stderr

    checked = run("model", "check", artifact)
    assert json.loads(checked.stdout)["golden"] == "matched"

    segmented = run("model", "segment", artifact, photos / "2.png", "--out", masks)
    assert segmented.returncode == 0, segmented.stderr
    segments = json.loads(segmented.stdout)["segments_info"]
    with Image.open(masks) as picture:
        ids = np.asarray(picture).astype(int) @ [1, 256, 65536]
    assert ids.shape == (56, 64)
    assert {segment["id"]: segment["area"] for segment in segments} == {
        int(each): int((ids == each).sum()) for each in np.unique(ids) if each
    }


def test_every_task_and_an_overlay_come_from_the_same_artifact(tmp_path: Path, tiny_artifact: Path) -> None:
    photo = tmp_path / "photo.jpg"
    cv2.imwrite(str(photo), np.full((50, 70, 3), 99, np.uint8))
    for task in ("panoptic", "instance", "semantic"):
        ended = run("model", "segment", tiny_artifact, photo, "--task", task, "--out", tmp_path / f"{task}.jpg")
        assert json.loads(ended.stdout)["task"] == task
        with Image.open(tmp_path / f"{task}.jpg") as overlay:
            assert (overlay.format, overlay.size) == ("JPEG", (70, 50))


def test_errors_are_one_line_that_names_the_culprit(tmp_path: Path, tiny_artifact: Path, tiny_encoder: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    out = tmp_path / "out"
    expect_error(run("model", "segment", tiny_artifact, text, "--out", out), "text.jpg", "no picture we read")
    expect_error(run("model", "segment", tiny_artifact, tmp_path / "none.jpg", "--out", out), "none.jpg")
    photo = tiny.draw_photos(tmp_path / "photos", count=1) / "0.png"
    expect_error(run("model", "segment", tmp_path, photo, "--out", out), "contract.json")
    expect_error(run("model", "export", tmp_path, "--out", out), "run.json")
    expect_error(run("training", "fit", tmp_path, "--out", out), "is no label store")
    expect_error(
        run("training", "label", photo.parent, "--out", out, "--encoder", "none.pth"), "none.pth does not exist"
    )
    expect_error(run("training", "label", tmp_path, "--out", out, "--encoder", tiny_encoder), "lies in")
    expect_error(run("training", "label", tmp_path / "empty", "--out", out, "--encoder", tiny_encoder), "not a folder")
    expect_error(run("training", "eval", tiny_artifact, "--truth", tmp_path), "COCO's panoptic format")
    assert not out.exists()


def test_wrong_usage_ends_with_status_2(tiny_store: LabelStore, tmp_path: Path) -> None:
    assert run("model", "segmnt").returncode == 2
    assert run("training", "fit").returncode == 2
    assert run("training", "--threads", "0", "fit", tiny_store.folder, "--out", tmp_path / "run").returncode == 2


def test_a_recipe_out_of_range_is_told_before_anything_is_written(tiny_store: LabelStore, tmp_path: Path) -> None:
    out = tmp_path / "run"
    expect_error(run("training", "fit", tiny_store.folder, "--out", out, "--steps", "0"), "steps must be positive")
    assert not out.exists()


SURFACE = {
    ("model",): "--threads export check segment",
    ("model", "export"): "--out --name --version --photos --score --part",
    ("model", "check"): "",
    ("model", "segment"): "--out --task",
    ("training",): "--threads label fit eval",
    ("training", "label"): "--out --encoder --features --limit --note --side-px --cuts --threshold --components "
    "--thing-clusters --stuff-clusters --seed",
    ("training", "fit"): "--out --features --preset --steps --batch --learning-rate --seed --checkpoint-every",
    ("training", "eval"): "--truth",
    ("service",): "--artifact --host --port --max-batch --max-wait-ms --queue --limit-bytes --limit-pixels --threads "
    "--deadline-s",
}


PARSERS = {
    "model": model_main.build_parser,
    "training": training_main.build_parser,
    "service": service_main.make_parser,
}


@pytest.mark.parametrize("command", SURFACE, ids=" ".join)
def test_the_command_lines_are_what_they_were(command: tuple[str, ...]) -> None:
    """Scripts depend on these words: changing one is a decision, and is made here too."""
    package, *words = command
    parser = PARSERS[package]()
    for word in words:
        parser = find_commands(parser)[word]
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    assert flags | set(find_commands(parser)) == set(SURFACE[command].split())


def find_commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return groups[0] if groups else {}


@pytest.mark.parametrize("package", ["model", "training", "service"])
def test_help_is_quick_and_needs_no_heavy_library(package: str) -> None:
    code = f"import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module({package!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: useg-")


def test_ctrl_c_in_a_fit_keeps_its_steps_and_the_same_command_goes_on(tmp_path: Path, tiny_store: LabelStore) -> None:
    command = [sys.executable, "-m", "training", "fit", tiny_store.folder, "--out", tmp_path / "run"]
    command += ["--preset", "tiny", "--steps", "100000"]
    history = tmp_path / "run" / "history.csv"
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        while not (history.exists() and len(history.read_text().splitlines()) > 3):
            assert process.poll() is None
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "go on where they were" in errors
    assert "Traceback" not in errors
    facts = read_facts(tmp_path / "run" / "checkpoint.safetensors")
    assert facts["step"] == len(history.read_text().splitlines()) - 1
