"""The commands of `useg` one after the other, as a user runs them, and their errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from command_line import Run, expect_error
from PIL import Image
from safetensors.torch import load_file

from model.cli import COMMANDS
from training.data.dataset import PseudoLabelDataset
from training.trainer.checkpoint import read_checkpoint_metadata

TIMEOUT_S = 120
LABEL_OPTIONS = (
    *("--side-px", 56, "--proposals", "maskcut", "--maskcut-n", 2, "--maskcut-tau", 0.6, "--pca-dim", 6),
    *("--thing-clusters", 3, "--stuff-clusters", 4),
)


@pytest.mark.slow
def test_photos_become_labels_a_run_an_artifact_and_masks(useg: Run, tmp_path: Path, tiny_encoder: Path) -> None:
    photos = tiny.draw_photos(tmp_path / "photos")
    (photos / "broken.jpg").write_text("no photo")
    labels, run, artifact, masks = (tmp_path / name for name in ("labels", "run", "artifact", "masks.png"))

    labeled = useg("label", photos, "--out", labels, "--encoder", tiny_encoder, *LABEL_OPTIONS)
    assert labeled.status == 3, labeled.error
    assert labeled.result["photos"] == 8
    assert [line.split(":")[0] for line in labeled.result["skipped"]] == ["broken.jpg"]

    trained = useg("train", labels, "--out", run, "--preset", "tiny")
    assert trained.status == 0, trained.error
    assert trained.result["step"] == 4

    exported = useg("export", run, "--out", artifact, "--photos", photos, "--score-threshold", 0)
    assert exported.status == 0, exported.error
    assert useg("check", artifact).result["golden"] == "matched"

    segmented = useg("segment", artifact, photos / "2.png", "--out", masks)
    assert segmented.status == 0, segmented.error
    with Image.open(masks) as image:
        ids = np.asarray(image).astype(int) @ [1, 256, 65536]
    assert ids.shape == (56, 64)
    assert {segment["id"]: segment["area"] for segment in segmented.result["segments_info"]} == {
        int(each): int((ids == each).sum()) for each in np.unique(ids) if each
    }


@pytest.mark.slow
def test_a_mapping_is_fitted_and_not_evaluated_on_the_same_images(
    useg: Run, tmp_path: Path, tiny_artifact: Path, tiny_truth: Path
) -> None:
    mapping, out = tmp_path / "mapping.json", tmp_path / "report"
    matched = useg("match", tiny_artifact, "--dataset", tiny_truth, "--matching", "cups", "--out", mapping)
    assert matched.status == 0, matched.error
    assert matched.result["images"] == 4
    assert json.loads(mapping.read_text())["method"] == "cups"

    command = ("eval", tiny_artifact, "--dataset", tiny_truth, "--mapping", mapping)
    expect_error(useg(*command), "fitted on 4 of the 4 images", "--allow-train-test-overlap")
    expect_error(useg(*command, "--matching", "cups"), "--mapping is fitted already")
    allowed = (*command, "--allow-train-test-overlap")
    expect_error(useg(*allowed, "--shard", "1/2"), "store their results in a folder: give --out")

    assert useg(*allowed, "--out", out, "--shard", "0/2").result == {"shard": "0/2", "images": 4}
    assert [path.parent.name for path in out.rglob("*.json")] == ["image-results"]
    evaluated = useg(*allowed, "--out", out)
    assert evaluated.status == 0, evaluated.error
    assert not (out / "image-results").exists()
    assert evaluated.result["matching"]["evaluated_on_fit_set"]
    assert json.loads((out / "report.json").read_text())["summary"] == evaluated.result
    assert (out / "report.html").read_text().count("<img") == 3 * 4


def test_runs_and_pseudo_labels_are_evaluated_like_artifacts(
    useg: Run, tmp_path: Path, tiny_run: Path, tiny_encoder: Path
) -> None:
    dataset, labels = tiny.draw_truth(tmp_path / "set"), tmp_path / "labels"
    labeled = useg("label", dataset / "images", "--out", labels, "--encoder", tiny_encoder, *LABEL_OPTIONS)
    assert labeled.status == 0, labeled.error
    for predictor in (tiny_run, labels):
        summary = useg("eval", predictor, "--dataset", dataset).result
        assert (summary["images"], summary["matching"]["evaluated_on_fit_set"]) == (4, False)
        for metrics in (summary["panoptic"], summary["semantic"], summary["instance"]["agnostic_mask"]["headline"]):
            for interval in metrics.values():
                assert 0.0 <= interval["low"] <= interval["high"] <= 100.0


def test_two_predictors_are_compared_and_a_gate_needs_a_drift_reference(
    useg: Run, tmp_path: Path, tiny_artifact: Path, tiny_truth: Path
) -> None:
    compared = useg("compare", tiny_artifact, "--baseline", tiny_artifact, "--dataset", tiny_truth)
    assert compared.result["metrics"]["PQ"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    photos, drift_photos = (tiny.draw_photos(tmp_path / name, count=2) for name in ("photos", "drift"))
    gated = useg("gate", tiny_artifact, tiny_artifact, "--photos", photos, "--drift-photos", drift_photos)
    expect_error(gated, "has no drift reference")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nncf") is None, reason="useg[quantize] is not installed")
def test_an_artifact_is_quantized_checked_drawn_and_evaluated(
    useg: Run, tmp_path: Path, tiny_artifact: Path, tiny_truth: Path
) -> None:
    photos = tiny.draw_photos(tmp_path / "photos", count=58)
    artifact = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    content = json.loads((artifact / "contract.json").read_text())
    content["thresholds"]["min_stuff_area_fraction"] = (
        0.2  # after four steps of training, small stuff is noise in any precision
    )
    (artifact / "contract.json").write_text(json.dumps(content))

    quantized = useg("quantize", artifact, "--photos", photos, "--max-photos", 40)
    assert quantized.status == 0, quantized.error

    checked = useg("check", artifact).result
    assert checked["golden"] == "matched"
    assert checked["backend"].startswith("openvino")
    assert checked["skipped_backends"]
    segmented = useg("segment", artifact, photos / "2.png", "--backend", "openvino", "--out", tmp_path / "masks.png")
    assert segmented.result["task"] == "panoptic"
    assert useg("eval", artifact, "--dataset", tiny_truth).result["predictor"] == "tiny 3 on cpu"


def test_an_error_is_one_line_that_names_the_file(
    useg: Run, tmp_path: Path, tiny_artifact: Path, tiny_encoder: Path
) -> None:
    text, out = tmp_path / "text.jpg", tmp_path / "out"
    text.write_text("not an image")
    photo = tiny.draw_photos(tmp_path / "photos", count=1) / "0.png"
    png = tmp_path / "out.png"
    expect_error(useg("segment", tiny_artifact, text, "--out", png), "text.jpg")
    expect_error(useg("segment", tiny_artifact, tmp_path / "none.jpg", "--out", png), "none.jpg")
    expect_error(useg("segment", tmp_path, photo, "--out", png), "contract.json")
    expect_error(useg("segment", tiny_artifact, photo, "--out", tmp_path / "out.txt"), "out.txt")
    expect_error(useg("export", tmp_path, "--out", out), "run.json")
    expect_error(useg("train", tmp_path, "--out", out), str(tmp_path))
    label = ("label", photo.parent, "--out", out, "--encoder")
    expect_error(useg(*label, "none.pth"), "none.pth")
    expect_error(useg("label", tmp_path, "--out", out, "--encoder", tiny_encoder), "lies in")
    expect_error(useg("label", tmp_path / "empty", "--out", out, "--encoder", tiny_encoder), "empty")
    evaluation = ("eval", tiny_artifact, "--dataset", tmp_path)
    expect_error(useg(*evaluation), "contains none of panoptic.json")
    expect_error(useg(*evaluation, "--format", "voc-masks"), "not a VOC folder")
    assert not out.exists()


def test_a_published_checkpoint_becomes_a_run_or_an_error(useg: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "cups.ckpt", tmp_path / "run"
    weights = load_file(tiny.write_cascade_run(tmp_path / "drawn") / "weights.safetensors")
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}}, source)
    imported = useg("import", source, "--format", "cups", "--clusters", 3, "--out", out)
    assert imported.status == 0, imported.error
    assert imported.result["network_config"]["thing_clusters"] == 3
    assert imported.result["checkpoint"]["family"] == "CUPS"
    rejected = useg("import", source, "--format", "cups", "--clusters", 800, "--out", out)
    expect_error(rejected, source.name, "3 thing clusters, not 800")


def test_an_encoder_is_imported_to_a_file_that_useg_label_accepts(
    useg: Run, tmp_path: Path, tiny_encoder: Path
) -> None:
    out = tmp_path / "encoder.safetensors"
    imported = useg("import", tiny_encoder.as_uri(), "--format", "encoder", "--out", out)
    assert imported.status == 0, imported.error
    assert imported.result["kind"] == "vision transformer"
    assert load_file(out).keys() == load_file(tiny_encoder).keys()


@pytest.mark.slow
def test_a_codebook_labels_other_photos_like_its_own(useg: Run, tmp_path: Path, tiny_encoder: Path) -> None:
    photos, others = tiny.draw_photos(tmp_path / "photos"), tiny.draw_photos(tmp_path / "others", count=3)
    first, second = tmp_path / "first", tmp_path / "second"
    encoder = ("--encoder", tiny_encoder)
    fitted = useg(
        *("label", photos, "--out", first, *encoder, *LABEL_OPTIONS, "--stuff", "stego", "--stego-preset", "tiny"),
        *("--stego-steps", 4),
    )
    assert fitted.status == 0, fitted.error
    command = ("label", others, "--out", second, *encoder, "--codebook", first / "codebook.npz")
    expect_error(useg(*command, "--thing-clusters", 5), "thing_clusters")
    assert not second.exists()
    masks = ("--proposals", "maskcut", "--maskcut-n", 2, "--maskcut-tau", 0.6, "--max-stuff-in-things", 0.2)
    reused = useg(*command, *masks)
    assert reused.status == 0, reused.error
    one, other = (PseudoLabelDataset(folder).read_config() for folder in (first, second))
    assert (other.stuff, other.thing_clusters) == ("stego", one.thing_clusters)
    labeled, relabeled = (read_instances_by_file(folder) for folder in (first, second))
    assert len(relabeled) == 3
    assert all(labeled[name] == annotations for name, annotations in relabeled.items())


def read_instances_by_file(labels: Path) -> dict[str, list[object]]:
    """The annotations of each photo, without ids that depend on the other photos."""
    content = json.loads((labels / "instances.json").read_text())
    annotations: dict[int, list[object]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append((annotation["category_id"], annotation["segmentation"]))
    return {image["file_name"]: annotations[image["id"]] for image in content["images"]}


def test_pseudo_labels_and_predictions_are_plotted(
    useg: Run, tmp_path: Path, tiny_store: PseudoLabelDataset, tiny_artifact: Path, tiny_photos: Path
) -> None:
    labels, predictions = tmp_path / "labels.jpg", tmp_path / "predictions.png"
    command = ("visualize", tiny_store.folder, "--out", labels, "--count", 3)
    assert useg(*command).result == {"figure": str(labels), "photos": 3}
    command = ("visualize", tiny_artifact, "--out", predictions, "--count", 2)
    assert useg(*command, "--photos", tiny_photos).result == {"figure": str(predictions), "photos": 2}
    expect_error(useg(*command), "is an artifact: give --photos")
    for path, image_format in ((labels, "JPEG"), (predictions, "PNG")):
        with Image.open(path) as figure:
            assert figure.format == image_format


def test_help_lists_the_commands_without_heavy_libraries() -> None:
    code = "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module('model', run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.exit(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.returncode == 0, ended.stderr
    assert all(f" {name} " in ended.stdout for commands in COMMANDS.values() for name in commands)


def test_ctrl_c_during_training_keeps_its_steps_and_the_same_command_continues(
    tmp_path: Path, tiny_store: PseudoLabelDataset
) -> None:
    command = [sys.executable, "-m", "model", "train", tiny_store.folder, "--out", tmp_path / "run"]
    command += ["--preset", "tiny", "--max-steps", "100000"]
    losses = tmp_path / "run" / "losses.csv"
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        while not (losses.exists() and len(losses.read_text().splitlines()) > 3):
            assert process.poll() is None, process.communicate()[1]
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    metadata = read_checkpoint_metadata(tmp_path / "run" / "checkpoint.safetensors")
    assert metadata["step"] == len(losses.read_text().splitlines()) - 1
